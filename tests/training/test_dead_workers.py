"""A loader worker that dies, as of memory: one message, a commit, and a restart where it helps."""

import os
import re
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from trainers import HOLD, Job, Training, all_ended, wait_for_commit

from wds_train.checkpoint.lease import read_run
from wds_train.storage.open import open_store

LONG = ("schedule.epochs=400",)
# A worker reads no more than it must, so that the training waits for it soon after it is killed.
SMALL = {"loader.fetch.AHEAD_BYTES": 1}


@pytest.fixture
def job(small: str, tmp_path: Path) -> Job:
    return Job(
        small, str(tmp_path / "run"), str(tmp_path), settings=LONG, workers=2, constants=SMALL
    )


def workers_of(training: Training) -> list[int]:
    """Return the processes that the training forked, by its command line; the oldest first."""
    tasks = Path(f"/proc/{training.pid}/task")
    children = {
        int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()
    }
    own = Path(f"/proc/{training.pid}/cmdline").read_bytes()
    return sorted(pid for pid in children if Path(f"/proc/{pid}/cmdline").read_bytes() == own)


def said_once(output: str, pattern: str) -> re.Match[str]:
    found = re.findall(pattern, output)
    assert len(found) == 1, output
    # A death at the moment in which PyTorch starts the thread that feeds a queue is raised in that
    # start, and Python then shows a KeyError of the thread. It changes nothing.
    shown = re.sub(
        r"Exception ignored in thread.*QueueFeederThread[\s\S]*?KeyError: <Thread\(.*>\n",
        "",
        output,
    )
    assert "Traceback" not in shown
    assert output.count("loader worker") == 1, output
    match = re.search(pattern, output)
    assert match is not None
    return match


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGKILL, "was killed by SIGKILL"),
        (signal.SIGSEGV, "was killed by SIGSEGV"),
        (signal.SIGTERM, "SIGTERM"),
    ],
    ids=["SIGKILL", "SIGSEGV", "SIGTERM"],
)
@pytest.mark.parametrize("which", [0, -1], ids=["train", "val"])
def test_a_worker_that_dies_ends_the_training_with_its_state_committed(
    job: Job, number: signal.Signals, how: str, which: int
) -> None:
    """`which`: the first forked is the train split's, the last the val split's."""
    trainings = [Training(job)]
    with all_ended(trainings):
        trainings[0].until("epoch   1/400")
        wait_for_commit(job.run)
        os.kill(workers_of(trainings[0])[which], number)
        assert trainings[0].end() == 75, trainings[0].output
        step = said_once(
            trainings[0].output,
            rf"wds-train: stopped by the death of a loader worker \(process \d+ .*{how}; if the "
            r"machine ran out of memory, use fewer --workers\) at step (\d+) of 4400, state "
            r"committed to .*; the same command goes on",
        )[1]
        manifest, _ = read_run(open_store(job.run))
        assert (manifest.status, manifest.checkpoints[-1].progress.step) == (
            "interrupted",
            int(step),
        )
        # And it does go on.
        trainings.append(Training(job))
        trainings[1].until(f"resuming at step {step} of 4400")
        wait_for_commit(job.run, beyond=int(step))
        assert trainings[1].end(signal.SIGTERM) == 75


def test_the_commit_under_way_is_finished(job: Job) -> None:
    """The worker dies while the first checkpoint is on its way up."""
    held = replace(job, point="between uploads and manifest", sent=HOLD)
    trainings = [Training(held)]
    with all_ended(trainings):
        trainings[0].until("held at between uploads and manifest")
        for worker in workers_of(trainings[0]):
            os.kill(worker, signal.SIGKILL)
        assert trainings[0].end() == 75, trainings[0].output
    step = said_once(
        trainings[0].output, r"stopped by the death of a loader worker .* at step (\d+) of"
    )[1]
    manifest, _ = read_run(open_store(job.run))
    assert (manifest.status, manifest.checkpoints[-1].progress.step) == ("interrupted", int(step))


@pytest.mark.parametrize("begun", [False, True], ids=["fresh", "resumed"])
def test_a_worker_that_dies_before_the_first_step_ends_it_as_failed(job: Job, begun: bool) -> None:
    """Another start would only repeat it: a supervisor must not try for ever."""
    trainings: list[Training] = []
    with all_ended(trainings):
        if begun:
            trainings.append(Training(job))
            trainings[0].until("epoch   1/400")
            wait_for_commit(job.run)
            assert trainings[0].end(signal.SIGTERM) == 75
        # Every worker ends before its first batch, as where each needs more memory than there is.
        dying = replace(job, constants=SMALL | {"loader.pipeline._init_worker": _die})
        trainings.append(Training(dying))
        assert trainings[-1].end() == 1, trainings[-1].output
    said_once(
        trainings[-1].output,
        r"wds-train: error: a loader worker died \(.*\); if the machine ran out of memory, use "
        r"fewer --workers, then run",
    )
    assert read_run(open_store(job.run))[0].status == "failed"


def _die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_signal_that_ends_the_workers_too_is_a_signal(job: Job) -> None:
    """As systemd and Slurm send it: to all processes at once.

    The training waits for a batch that no worker will bring.
    """
    trainings = [
        Training(replace(job, constants=SMALL | {"training.deadline.SIGNAL_SECONDS": 60.0}))
    ]
    with all_ended(trainings):
        trainings[0].until("epoch   1/400")
        wait_for_commit(job.run)
        for worker in workers_of(trainings[0]):
            os.kill(worker, signal.SIGTERM)
        assert trainings[0].end(signal.SIGTERM) == 75, trainings[0].output
    assert re.search(
        r"stopped by SIGTERM at step \d+ of 4400, state committed", trainings[0].output
    )
    assert "loader worker" not in trainings[0].output
    assert "Traceback" not in trainings[0].output


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_of_one_rank_ends_all_to_be_started_again(job: Job, rank: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    trainings = []
    with all_ended(trainings):
        for number in ("0", "1"):
            environment = place | {"RANK": number, "LOCAL_RANK": number}
            trainings.append(Training(replace(job, environment=environment)))
        trainings[0].until("epoch   1/400")
        wait_for_commit(job.run)
        os.kill(workers_of(trainings[rank])[0], signal.SIGKILL)
        for training in trainings:
            assert training.end() == 75, training.output
            assert "Traceback" not in training.output
    said_once(
        trainings[rank].output,
        r"wds-train: a loader worker died \(process \d+ was killed by SIGKILL\); .*newest",
    )
    assert read_run(open_store(job.run))[0].status == "interrupted"
