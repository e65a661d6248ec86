"""The spot notice: seen in time, never imagined, and no cost where there is no EC2."""

import time
from collections.abc import Callable, Iterator

import pytest
from fake_imds import ROLE, FakeImds

from wds_train.devserver import Endpoint
from wds_train.spot import SpotWatch
from wds_train.store import S3Store

ACTION = "/latest/meta-data/spot/instance-action"
TOKEN = "/latest/api/token"


@pytest.fixture
def imds(aws_env: pytest.MonkeyPatch) -> Iterator[FakeImds]:
    with FakeImds() as imds:
        aws_env.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", imds.url + "/")
        aws_env.setenv("AWS_EC2_METADATA_DISABLED", "false")
        yield imds


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_notice_is_seen_with_the_time_that_is_left_and_polling_ends(
    imds: FakeImds, aws_env: pytest.MonkeyPatch
) -> None:
    aws_env.setenv("http_proxy", "http://127.0.0.1:9")  # what is meant for the machine itself must go past it
    with SpotWatch(every=0.02) as spot:
        wait_until(lambda: imds.asked["GET", ACTION, 404] > 3)
        assert (spot.watching, spot.notice, spot.rebalance) == (True, None, False)
        imds.give_notice(90)
        wait_until(lambda: spot.notice is not None)
        assert spot.notice is not None
        assert 80 < spot.notice - time.monotonic() <= 90
        spot._thread.join(20)
        assert not spot._thread.is_alive()


def test_a_rebalance_recommendation_is_no_notice(imds: FakeImds) -> None:
    imds.rebalance = True
    with SpotWatch(every=0.02) as spot:
        wait_until(lambda: spot.rebalance)
        assert spot.notice is None


def test_an_expired_token_is_renewed(imds: FakeImds) -> None:
    with SpotWatch(every=3600) as spot:
        wait_until(lambda: imds.asked["GET", ACTION, 404] == 1)
        imds.expire_tokens()
        imds.give_notice()
        spot.look()
        assert spot.notice is not None
    assert imds.asked["PUT", TOKEN, 200] == 2
    assert sum(n for (_, _, status), n in imds.asked.items() if status == 401) == 1


@pytest.mark.parametrize("broken", [500, 403, 401, 1.0])
def test_a_failing_service_says_nothing_and_is_asked_again(imds: FakeImds, broken: float) -> None:
    with SpotWatch(every=3600) as spot:
        wait_until(lambda: imds.asked["GET", ACTION, 404] == 1)
        imds.give_notice()
        imds.broken = broken
        spot.look()
        assert (spot.watching, spot.notice) == (True, None)
        imds.broken = None
        spot.look()
        assert spot.notice is not None


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b'{"action": "stop"}', b'{"time": "soon"}', b'{"time": "2026-01-01"}']
)
def test_a_notice_without_a_time_counts_from_now(body: bytes) -> None:
    spot = SpotWatch(lambda method, path, headers: (200, body if path == ACTION else b"token"))
    spot.look()
    assert spot.notice is not None
    assert 119 < spot.notice - time.monotonic() <= 120


@pytest.mark.parametrize(("left", "expected"), [(-30, 0), (10**6, 120)])
def test_a_clock_that_is_off_gives_no_impossible_deadline(imds: FakeImds, left: float, expected: float) -> None:
    imds.give_notice(left)
    with SpotWatch(every=3600) as spot:
        wait_until(lambda: spot.notice is not None)
        assert spot.notice is not None
        assert abs(spot.notice - time.monotonic() - expected) < 15


@pytest.mark.parametrize("why", ["refused", "silent", "disabled", "no service"])
def test_elsewhere_than_on_ec2_nothing_is_polled(imds: FakeImds, aws_env: pytest.MonkeyPatch, why: str) -> None:
    if why == "refused":
        aws_env.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    elif why == "silent":
        imds.broken = 5.0
    elif why == "disabled":
        aws_env.setenv("AWS_EC2_METADATA_DISABLED", "true")
    else:
        imds.broken = 404
    began = time.monotonic()
    with SpotWatch(every=0.01) as spot:
        assert time.monotonic() - began < 4  # two tries of 0.4 s; a silent service takes 5 s
        assert not spot.watching
        assert not spot._thread.is_alive()


def test_the_store_signs_with_the_role_of_the_instance(
    s3_server: Endpoint, s3_url: str, imds: FakeImds, aws_env: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        aws_env.delenv(name)
    imds.keys = s3_server.access_key, s3_server.secret_key
    store = S3Store(s3_url.removeprefix("s3://").split("/")[0], "role")
    store.write("a", b"1")
    assert store.read("a") == b"1"
    assert imds.asked["GET", f"/latest/meta-data/iam/security-credentials/{ROLE}", 200] >= 1
