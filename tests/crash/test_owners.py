"""A run has one owner on whatever server, or the server is refused before there is one.

On each odd server, two trainings of one run begin at one moment. The one that owns it falls asleep after its first
commit, and the other takes over. The sleeper must find that out when it wakes, and change nothing.

`make crash-test` sets WDS_CRASH_ROUNDS, by which the rare servers are tried, too.
"""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy
from odd_servers import SERVERS, OddServer, begin, write_credentials
from outcomes import assert_same_end
from trainers import HOLD, STEPS_PER_EPOCH, Job, Training, all_ended, wait_for_commit

from wds_train.checkpoint.lease import read_run
from wds_train.cli import main
from wds_train.storage.open import open_store

ROUNDS = int(os.environ.get("WDS_CRASH_ROUNDS", "2"))
TRIED = [name for name, server in SERVERS.items() if ROUNDS > 2 or not server.rare]
EPOCHS = 2
SLEEP_AT = (
    STEPS_PER_EPOCH + 2
)  # after the first epoch's commit has begun; no successor takes so many steps
# Nobody waits a minute for a sleeper, and parts are of the least length that S3 takes.
CONSTANTS = {"checkpoint.lease.LEASE_SECONDS": 3.0, "storage.s3_write.PART_BYTES": 5 << 20}
SMALL = (f"schedule.epochs={EPOCHS}",)
LARGE = (
    *SMALL,
    "model.name=mobilenetv3_small_050",
    "data.size=32",
    "data.eval_size=32",
)  # 6.5 MB, two parts
TROUBLE_SECONDS = 1.0


def job(dataset: str, run: str, folder: Path, in_parts: bool, **details: Any) -> Job:
    settings = LARGE if in_parts else SMALL
    return Job(dataset, run, str(folder), settings=settings, constants=CONSTANTS, **details)


@pytest.fixture(scope="module")
def unbroken(small: str, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Runs that nothing happened to, in a local directory, by whether their checkpoints need parts."""
    folder = tmp_path_factory.mktemp("unbroken")
    trainings = {
        in_parts: Training(job(small, str(folder / f"{in_parts}"), folder, in_parts))
        for in_parts in (0, 1)
    }
    for training in trainings.values():
        assert training.end() == 0, training.output
    return {bool(in_parts): str(folder / f"{in_parts}") for in_parts in trainings}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TRIED)
def test_a_run_has_one_owner_and_a_sleeper_changes_nothing(
    small: str,
    s3_url: str,
    fault_proxy: FaultProxy,
    aws_env: pytest.MonkeyPatch,
    tmp_path: Path,
    unbroken: dict[bool, str],
    name: str,
) -> None:
    server, run = SERVERS[name], f"{s3_url}/run"
    trouble = begin(server, fault_proxy, aws_env, tmp_path)
    asleep = job(
        small, run, tmp_path, server.in_parts, point="after a step", nth=SLEEP_AT, sent=HOLD
    )
    with all_ended(trainings := [Training(asleep), Training(asleep)]):
        if server.refused:
            assert_refused(server, trainings)
            fault_proxy.faults.clear()
            assert list(open_store(run).list()) == []
            return
        first = one_that_sleeps(trainings)
        second = next(each for each in trainings if each is not first)
        wait_for_commit(run)
        first.send(signal.SIGSTOP)
        assert second.steps() == {}
        if (
            second.process.exitcode is not None
        ):  # it had claimed the run first, and was too slow to begin
            trainings.append(second := Training(asleep))
        second.until("waiting until it ends")
        if trouble:
            pass_through(trouble, server, fault_proxy, tmp_path)
        assert second.end() == 0, second.output
        assert min(second.steps()) == STEPS_PER_EPOCH
        before = open_store(run).read_tagged("manifest.json")
        assert first.end(signal.SIGCONT) == 75, first.output
        assert re.search(
            rf"another instance \(.*, process {second.pid}\) has claimed", first.output
        ), first.output
    assert open_store(run).read_tagged("manifest.json") == before
    assert not server.told or second.output.count(server.told) == 1
    assert read_run(open_store(run))[0].status == "done"
    assert main(["verify", run]) == 0
    assert_same_end(unbroken[server.in_parts], run)


def assert_refused(server: OddServer, trainings: list[Training]) -> None:
    for training in trainings:
        assert training.end() == 1
        assert server.refused in training.output
        assert "Traceback" not in training.output
        assert training.steps() == {}


def one_that_sleeps(trainings: list[Training]) -> Training:
    """Return the training that is held, once there is one."""
    deadline = time.monotonic() + 120
    while True:
        for training in trainings:
            if "held at" in training.output:
                return training
        alive = [training for training in trainings if training.process.is_alive()]
        assert alive and time.monotonic() < deadline, [training.output for training in trainings]
        time.sleep(0.01)


def pass_through(trouble: Fault, server: OddServer, proxy: FaultProxy, folder: Path) -> None:
    """Let the server be in trouble until it passes, or until there are new credentials."""
    trouble.times = 10**9
    time.sleep(TROUBLE_SECONDS)
    if server.renewed:
        write_credentials(folder, proxy, "new")
    else:
        trouble.times = 0
