"""The spot notice: seen in time, never imagined, and no cost where there is no EC2."""

import time
from collections.abc import Callable, Iterator

import pytest
from fake_imds import ROLE, FakeImds

from wds_train.storage.embedded import Endpoint
from wds_train.storage.s3 import S3Store
from wds_train.training.spot import SpotWatch
from wds_train.training.stop import StopRequest

ACTION = "/latest/meta-data/spot/instance-action"
TOKEN = "/latest/api/token"


@pytest.fixture
def imds(aws_env: pytest.MonkeyPatch) -> Iterator[FakeImds]:
    with FakeImds() as imds:
        aws_env.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", imds.url + "/")
        aws_env.setenv("AWS_EC2_METADATA_DISABLED", "false")
        yield imds


@pytest.fixture
def stop() -> StopRequest:
    """That nobody's signals reach."""
    return StopRequest()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_notice_is_seen_with_the_time_that_is_left_and_polling_ends(
    imds: FakeImds, aws_env: pytest.MonkeyPatch, stop: StopRequest
) -> None:
    aws_env.setenv("http_proxy", "http://127.0.0.1:9")  # what is meant for the machine itself must go past it
    with SpotWatch(stop, every=0.02) as spot:
        wait_until(lambda: imds.asked["GET", ACTION, 404] > 3)
        assert (stop.cause, spot.rebalance) == (None, False)
        imds.give_notice(90)
        wait_until(lambda: stop.cause == "the spot notice")
        assert 80 < stop.left <= 90
        spot._thread.join(20)
        assert not spot._thread.is_alive()


def test_the_group_that_ends_the_instance_is_heeded(imds: FakeImds, stop: StopRequest) -> None:
    imds.more["autoscaling/target-lifecycle-state"] = "InService"
    with SpotWatch(stop, every=0.02):
        wait_until(lambda: imds.asked["GET", "/latest/meta-data/autoscaling/target-lifecycle-state", 200] > 1)
        assert stop.cause is None
        imds.more["autoscaling/target-lifecycle-state"] = "Terminated"
        wait_until(lambda: stop.cause == "the Auto Scaling group, which ends this instance")
        assert 80 < stop.left <= 90  # the hook gives 120


def test_a_rebalance_recommendation_is_no_notice(imds: FakeImds, stop: StopRequest) -> None:
    imds.rebalance = True
    with SpotWatch(stop, every=0.02) as spot:
        wait_until(lambda: spot.rebalance)
        assert stop.cause is None


def test_the_instances_type_is_told(imds: FakeImds, stop: StopRequest) -> None:
    told: dict[str, str] = {}
    with SpotWatch(stop, every=3600, tell=told.update):
        wait_until(lambda: told)
    assert told == {"instance": "g5.2xlarge"}


def test_an_expired_token_is_renewed(imds: FakeImds, stop: StopRequest) -> None:
    with SpotWatch(stop, every=3600) as spot:
        wait_until(lambda: any("target-lifecycle-state" in path for _, path, _ in imds.asked))  # the last of a look
        imds.expire_tokens()
        imds.give_notice()
        assert spot.look()
        assert stop.cause == "the spot notice"
    assert imds.asked["PUT", TOKEN, 200] == 2
    assert sum(n for (_, _, status), n in imds.asked.items() if status == 401) == 1


@pytest.mark.parametrize("broken", [500, 403, 401, 1.0])
def test_a_failing_service_says_nothing_and_is_asked_again(imds: FakeImds, stop: StopRequest, broken: float) -> None:
    with SpotWatch(stop, every=3600) as spot:
        wait_until(lambda: imds.asked["GET", ACTION, 404] == 1)
        imds.give_notice()
        imds.broken = broken
        assert not spot.look()
        assert stop.cause is None
        imds.broken = None
        assert spot.look()


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b'{"action": "stop"}', b'{"time": "soon"}', b'{"time": "2026-01-01"}']
)
def test_a_notice_without_a_time_counts_from_now(stop: StopRequest, body: bytes) -> None:
    spot = SpotWatch(stop, lambda method, path, headers: (200, body if path == ACTION else b"token"))
    assert spot.look()
    assert 119 < stop.left <= 120


@pytest.mark.parametrize("left", [-30, 10**6])
def test_a_clock_that_is_off_gives_no_impossible_deadline(imds: FakeImds, stop: StopRequest, left: float) -> None:
    """Nor one that is past: the instance lives, and the last commit takes time."""
    imds.give_notice(left)
    with SpotWatch(stop, every=3600):
        wait_until(lambda: stop.cause is not None)
        assert 105 < stop.left <= 120


@pytest.mark.parametrize("why", ["refused", "silent", "disabled", "no service"])
def test_elsewhere_than_on_ec2_nothing_is_polled(
    imds: FakeImds, aws_env: pytest.MonkeyPatch, stop: StopRequest, why: str
) -> None:
    if why == "refused":
        aws_env.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    elif why == "silent":
        imds.broken = 5.0
    elif why == "disabled":
        aws_env.setenv("AWS_EC2_METADATA_DISABLED", "true")
    else:
        imds.broken = 404
    with SpotWatch(stop, every=0.01) as spot:
        wait_until(lambda: not spot._thread.is_alive())
    assert imds.asked["GET", ACTION, 404] == 0


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
