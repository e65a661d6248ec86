"""The spot notice: seen in time, never imagined, and no cost where there is no EC2."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_imds import ROLE, FakeImds
from waiting import wait_until

from wds_train.storage.embedded import Endpoint
from wds_train.storage.s3 import S3Store
from wds_train.training import spot as spots
from wds_train.training.spot import SpotWatch, evidence_of_ec2
from wds_train.training.stop_request import StopRequest

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
    """A request to stop that no signal reaches."""
    return StopRequest()


def assert_left(stop: StopRequest, began: float, least: float, most: float) -> None:
    """Assert that `least` to `most` seconds were left at `began`, a monotonic time, or since."""
    left = stop.left
    gone = time.monotonic() - began
    assert least - gone < left <= most


def test_a_notice_is_seen_with_the_time_that_is_left_and_polling_ends(
    imds: FakeImds, aws_env: pytest.MonkeyPatch, stop: StopRequest
) -> None:
    aws_env.setenv(
        "http_proxy", "http://127.0.0.1:9"
    )  # what is meant for the machine itself must go past it
    with SpotWatch(stop, every=0.02) as spot:
        wait_until(lambda: imds.asked["GET", ACTION, 404] > 3)
        assert (stop.cause, spot.rebalance) == (None, False)
        began = time.monotonic()
        imds.give_notice(90)
        wait_until(lambda: stop.cause == "the spot notice")
        assert_left(stop, began, 88, 90)
        spot._thread.join(120)
        assert not spot._thread.is_alive()


def test_the_group_that_ends_the_instance_is_heeded(imds: FakeImds, stop: StopRequest) -> None:
    imds.more["autoscaling/target-lifecycle-state"] = "InService"
    with SpotWatch(stop, every=0.02):
        wait_until(
            lambda: (
                imds.asked["GET", "/latest/meta-data/autoscaling/target-lifecycle-state", 200] > 1
            )
        )
        assert stop.cause is None
        began = time.monotonic()
        imds.more["autoscaling/target-lifecycle-state"] = "Terminated"
        wait_until(lambda: stop.cause == "the Auto Scaling group, which ends this instance")
        assert_left(stop, began, 80, 90)  # the hook gives 120


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
        wait_until(
            lambda: any("target-lifecycle-state" in path for _, path, _ in imds.asked)
        )  # the last of a look
        imds.expire_tokens()
        imds.give_notice()
        assert spot.look()
        assert stop.cause == "the spot notice"
    assert imds.asked["PUT", TOKEN, 200] == 2
    assert sum(n for (_, _, status), n in imds.asked.items() if status == 401) == 1


@pytest.mark.parametrize("broken", [500, 403, 401, 1.0])
def test_a_failing_service_says_nothing_and_is_asked_again(
    imds: FakeImds, stop: StopRequest, broken: float
) -> None:
    with SpotWatch(stop, every=3600) as spot:
        wait_until(lambda: imds.asked["GET", ACTION, 404] == 1)
        imds.give_notice()
        imds.broken = broken
        spot._seconds = 0.4
        assert not spot.look()
        assert stop.cause is None
        imds.broken = None
        spot._seconds = 20.0
        assert spot.look()


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b'{"action": "stop"}', b'{"time": "soon"}', b'{"time": "2026-01-01"}'],
)
def test_a_notice_without_a_time_counts_from_now(stop: StopRequest, body: bytes) -> None:
    spot = SpotWatch(
        stop, lambda method, path, headers: (200, body if path == ACTION else b"token")
    )
    began = time.monotonic()
    assert spot.look()
    assert_left(stop, began, 119, 120)


@pytest.mark.parametrize("left", [-30, 10**6])
def test_a_clock_that_is_off_gives_no_impossible_deadline(
    imds: FakeImds, stop: StopRequest, left: float
) -> None:
    """Nor one that is past: the instance lives, and the last commit takes time."""
    began = time.monotonic()
    imds.give_notice(left)
    with SpotWatch(stop, every=3600):
        wait_until(lambda: stop.cause is not None)
        assert_left(stop, began, 105, 120)


@pytest.fixture
def nowhere(imds: FakeImds, aws_env: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No machine of EC2, but the fake service at the usual address."""
    aws_env.delenv("AWS_EC2_METADATA_SERVICE_ENDPOINT")
    aws_env.setattr(spots, "ADDRESSES", {"ipv4": imds.url})
    aws_env.setattr(spots, "SYSTEM", tmp_path)
    aws_env.setattr(spots, "ANSWER_SECONDS", 0.4)
    return aws_env


@pytest.mark.parametrize("why", ["refused", "silent", "disabled", "no service"])
def test_elsewhere_than_on_ec2_nothing_is_polled(
    imds: FakeImds, nowhere: pytest.MonkeyPatch, stop: StopRequest, why: str
) -> None:
    said: list[str] = []
    if why == "refused":
        nowhere.setattr(spots, "ADDRESSES", {"ipv4": "http://127.0.0.1:9"})
    elif why == "silent":
        imds.broken = 5.0
    elif why == "disabled":
        nowhere.setenv("AWS_EC2_METADATA_DISABLED", "true")
    else:
        imds.broken = 404
    with SpotWatch(stop, every=0.01, say=said.append) as spot:
        wait_until(lambda: not spot._thread.is_alive())
    assert imds.asked["GET", ACTION, 404] == 0
    assert said == []


def test_a_service_that_answers_is_polled_whatever_the_machine_says(
    imds: FakeImds, nowhere: pytest.MonkeyPatch, stop: StopRequest
) -> None:
    with SpotWatch(stop, every=0.01):
        wait_until(lambda: imds.asked["GET", ACTION, 404] > 3)
        imds.give_notice()
        wait_until(lambda: stop.cause == "the spot notice")


MACHINES = {
    "class/dmi/id/sys_vendor": ("Amazon EC2\n", "sys_vendor is Amazon EC2"),
    "class/dmi/id/board_vendor": ("Amazon EC2", "board_vendor is Amazon EC2"),
    "class/dmi/id/bios_vendor": ("Amazon EC2", "bios_vendor is Amazon EC2"),
    "class/dmi/id/bios_version": ("4.11.amazon\n", "bios_version names Amazon"),
    "class/dmi/id/product_uuid": (
        "EC2E1916-9099-7CAF-FD21-012345ABCDEF",
        "class/dmi/id/product_uuid begins with ec2",
    ),
    "hypervisor/uuid": (
        "ec2e1916-9099-7caf-fd21-012345abcdef\n",
        "hypervisor/uuid begins with ec2",
    ),
}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)


@pytest.mark.parametrize("path", MACHINES)
def test_a_machine_of_ec2_is_known(nowhere: pytest.MonkeyPatch, tmp_path: Path, path: str) -> None:
    text, evidence = MACHINES[path]
    write(tmp_path / path, text)
    assert evidence_of_ec2() == evidence


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("class/dmi/id/sys_vendor", "Google"),
        ("class/dmi/id/board_vendor", "Microsoft Corporation"),
        ("class/dmi/id/product_uuid", "4c4c4544-0042-ec2e-8051-b7c04f435831"),
        ("hypervisor/uuid", ""),
        ("class/dmi/id/bios_version", "1.0"),
        ("class/dmi/other", "Amazon EC2"),
    ],
)
def test_another_machine_is_none_of_ec2(
    nowhere: pytest.MonkeyPatch, tmp_path: Path, path: str, text: str
) -> None:
    write(tmp_path / path, text)
    assert evidence_of_ec2() == ""


@pytest.mark.parametrize("path", [*list(MACHINES)[::2], "the variable"])
def test_a_service_that_is_slow_at_first_is_asked_on(
    imds: FakeImds, nowhere: pytest.MonkeyPatch, tmp_path: Path, stop: StopRequest, path: str
) -> None:
    """Its answers come after the first patience of those who ask, but come."""
    if path == "the variable":
        nowhere.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", imds.url)
    else:
        write(tmp_path / path, MACHINES[path][0])
    nowhere.setattr(spots, "ANSWER_SECONDS", 60.0)
    said: list[str] = []
    imds.broken = 1.0
    with SpotWatch(stop, every=0.01, say=said.append):
        wait_until(lambda: imds.asked["GET", ACTION, 404] > 0)
        imds.broken = None
        imds.give_notice()
        wait_until(lambda: stop.cause == "the spot notice")
    assert said == []


HOPS = "--http-put-response-hop-limit 2 (HttpPutResponseHopLimit 2)"


@pytest.mark.parametrize(
    ("why", "seen"),
    [
        ("refused", ("cannot be reached ([Errno 111] Connection refused)", HOPS)),
        ("silent", ("cannot be reached (timed out)", HOPS)),
        ("no address", ("cannot be reached (nonsense is no address such as", HOPS)),
        (500, ("cannot be reached (status 500)", HOPS)),
        (403, ("gives no token (status 403)", "--http-endpoint enabled")),
        (404, ("gives no token (status 404)", "--http-endpoint enabled")),
    ],
)
def test_on_ec2_a_service_that_cannot_be_reached_is_said_and_asked_on(
    imds: FakeImds,
    nowhere: pytest.MonkeyPatch,
    tmp_path: Path,
    why: str | int,
    seen: tuple[str, str],
) -> None:
    stop = StopRequest()
    write(tmp_path / "class/dmi/id/sys_vendor", "Amazon EC2")
    nowhere.setattr(spots, "ANSWER_SECONDS", 0.1 if why == "silent" else 20.0)
    imds.broken = 1.0 if why == "silent" else why if isinstance(why, int) else None
    elsewhere = {"refused": "http://127.0.0.1:9", "no address": "nonsense"}
    said: list[str] = []
    if why in elsewhere:
        nowhere.setattr(spots, "ADDRESSES", {"ipv4": elsewhere[str(why)]})
    with SpotWatch(stop, every=0.01, say=said.append) as spot:
        wait_until(lambda: said != [])
        assert said[0].startswith(
            "spot     this is EC2 (sys_vendor is Amazon EC2), whose metadata service at "
        )
        assert "no spot notice would be seen" in said[0]
        assert all(part in said[0] for part in seen)
        assert spot._thread.is_alive() and stop.cause is None
        # It comes back, and is heeded.
        nowhere.setattr(spots, "ANSWER_SECONDS", 20.0)
        nowhere.setattr(spots, "ADDRESSES", {"ipv4": imds.url})
        spot._seconds = 20.0
        imds.broken = None
        imds.give_notice()
        wait_until(lambda: stop.cause == "the spot notice")
    assert len(said) == 2 and said[1].endswith("answers now: a spot notice will be heeded")


@pytest.mark.parametrize("why", ["over at once", "disabled"])
def test_what_could_not_be_seen_is_said_of_the_shortest_training(
    imds: FakeImds, nowhere: pytest.MonkeyPatch, stop: StopRequest, tmp_path: Path, why: str
) -> None:
    write(tmp_path / "class/dmi/id/board_vendor", "Amazon EC2")
    said: list[str] = []
    imds.broken = 5.0
    if why == "disabled":
        nowhere.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with SpotWatch(stop, every=0.01, say=said.append):
        pass
    assert len(said) == 1 and "no spot notice would be seen" in said[0]
    assert ("AWS_EC2_METADATA_DISABLED = true" in said[0]) == (why == "disabled")


@pytest.mark.parametrize("broken", [500, 401, 1.0])
def test_a_service_that_falls_silent_is_said_once(
    imds: FakeImds, aws_env: pytest.MonkeyPatch, stop: StopRequest, broken: float
) -> None:
    aws_env.setattr(spots, "SILENT_LOOKS", 2)
    said: list[str] = []
    with SpotWatch(stop, every=0.01, say=said.append) as spot:
        wait_until(lambda: imds.asked["GET", ACTION, 404] > 0)
        spot._seconds = 0.1
        imds.broken = broken
        wait_until(lambda: said != [])
        imds.broken = None
        spot._seconds = 20.0
        imds.give_notice()
        wait_until(lambda: stop.cause == "the spot notice")
    assert len(said) == 1 and "answers no more (" in said[0]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, "http://169.254.169.254"),
        ({"_MODE": "IPv6"}, "http://[fd00:ec2::254]"),
        ({"_MODE": "ipv4"}, "http://169.254.169.254"),
        ({"_MODE": "IPv6", "": "http://127.0.0.1:1/"}, "http://127.0.0.1:1/"),
        ({"": ""}, "http://169.254.169.254"),
    ],
)
def test_the_service_is_where_the_aws_settings_say(
    aws_env: pytest.MonkeyPatch, settings: dict[str, str], found: str
) -> None:
    for end in ("", "_MODE"):
        aws_env.delenv(f"AWS_EC2_METADATA_SERVICE_ENDPOINT{end}", raising=False)
    for end, text in settings.items():
        aws_env.setenv(f"AWS_EC2_METADATA_SERVICE_ENDPOINT{end}", text)
    assert spots.address() == found


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
