"""What is no fault of the server.

A process did not run for minutes, or no sockets can be made in a folder.
"""

from pathlib import Path

import pytest

from wds_train.errors import Unavailable, WdsTrainError
from wds_train.storage import embedded
from wds_train.storage.retry import ATTEMPT_SECONDS, SLOWEST, Retry


class Clock:
    """Stands still but for what a test lets pass, and for the pauses."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("frozen", [ATTEMPT_SECONDS + 1, 135.0, 600.0, 86_400.0])
@pytest.mark.parametrize("times", [1, 3])
def test_time_in_which_the_process_did_not_run_does_not_count(frozen: float, times: int) -> None:
    clock = Clock()
    retry = Retry(120, clock, clock.sleep)
    for _ in range(times):
        clock.now += frozen
        retry.pause(Unavailable("broken"))


@pytest.mark.parametrize("frozen", [135.0, 86_400.0])
def test_a_freeze_in_a_pause_does_not_count_either(frozen: float) -> None:
    clock = Clock()
    retry = Retry(120, clock, lambda seconds: clock.sleep(seconds + frozen))
    for _ in range(3):
        clock.now += 1
        retry.pause(Unavailable("broken"))


@pytest.mark.parametrize("took", [1.0, 20.0, ATTEMPT_SECONDS - 5])
def test_time_of_trying_counts_as_before(took: float) -> None:
    clock = Clock()
    retry = Retry(120, clock, clock.sleep)
    with pytest.raises(Unavailable, match=r"broken; gave up after \d+ attempts in \d+ s"):
        for _ in range(200):
            clock.now += took
            retry.pause(Unavailable("broken"))
    assert 115 - took <= clock.now <= 120 + took


def test_a_large_body_may_take_its_time() -> None:
    clock = Clock()
    # 100 s of it
    size = 100 * SLOWEST
    retry = Retry(10, clock, clock.sleep)
    clock.now += 90
    retry.pause(Unavailable("broken"), size)
    clock.now += 50
    with pytest.raises(Unavailable, match="gave up after 2 attempts in 14"):
        retry.pause(Unavailable("broken"), size)


@pytest.mark.parametrize("kind", ["missing", "a file", "read-only"])
def test_a_folder_without_sockets_is_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    sockets = tmp_path / "sockets"
    if kind == "a file":
        sockets.touch()
    elif kind == "read-only":
        sockets = Path("/proc/self")  # in which nobody can write, root neither
    monkeypatch.setattr(embedded, "SOCKETS", sockets)
    with pytest.raises(
        WdsTrainError,
        match=rf"nothing can be written in {sockets} \(.+\), where the embedded S3 server",
    ):
        embedded.ensure_running(tmp_path / "s3")
    assert embedded.pids((tmp_path / "s3").absolute()) == []
    assert not (tmp_path / "s3" / "data").exists()
