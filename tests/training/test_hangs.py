"""A rank that hangs is named, with its place in the code; all end, and the next start goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from machines import Machine, Rank, manifest_of
from trainers import SETTINGS, wait_for_commit

from wds_train.training.watch import DATA_MARGIN, LIMIT_SECONDS, limit_of

# A trainer whose rank hangs at a step, in one of several ways.
SCRIPT = '''
import json, os, re, signal, time

import torch

from wds_train.cli import entry
from wds_train.training.engine import Trainer

fault = json.loads(os.environ["FAULT"])
torch.set_num_threads(1)


def endless_loop():
    while True:
        pass


def dead_fifo():
    with open(fault["fifo"]) as file:
        file.read()


def slow_pattern():
    """C code that lets no other thread run."""
    re.match("(a+)+$", "a" * 60 + "b")


def stopped():
    # The leader's commit of the epoch before is under way: stopped within it, nothing would be
    # committed.
    while not json.load(open(fault["manifest"]))["checkpoints"]:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGSTOP)


def slow_step():
    time.sleep(fault["seconds"])


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        endless_loop()


def now(trainer):
    here = int(os.environ.get("RANK", "0")) == fault.get("rank", 0)
    return here and trainer.progress.step + 1 == fault.get("step")


def gradients(self, batch):
    if now(self) and fault["how"] != "backward":
        globals()[fault["how"]]()
    return usual(self, batch)


def loss(self, model, images, targets):
    found = usual_loss(self, model, images, targets)
    return Wrong.apply(found) if now(self) and fault["how"] == "backward" else found


usual, usual_loss = Trainer.gradients, Trainer.loss
Trainer.gradients, Trainer.loss = gradients, loss
entry()
'''

LIMIT = 15.0
HANGS = ("--hang-minutes", str(LIMIT / 60))
STEP = 14  # in the second epoch


@pytest.fixture
def machine(small: str, tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(SCRIPT, small, tmp_path, ranks=2, settings=("schedule.epochs=2",))
    yield machine
    machine.end()


def ended(processes: list[Rank], seconds: float) -> list[int | None]:
    """Return the exit codes; None of a process that had to be killed after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    return codes


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("ranks", "rank", "how", "where"),
    [
        (1, 0, "endless_loop", r"train\.py:\d+ endless_loop"),
        (1, 0, "dead_fifo", r"train\.py:\d+ dead_fifo"),
        (2, 0, "endless_loop", r"train\.py:\d+ endless_loop"),
        (2, 0, "backward", r"train\.py:\d+ endless_loop"),
        (2, 1, "dead_fifo", r"train\.py:\d+ dead_fifo"),
        (2, 1, "backward", r"train\.py:\d+ endless_loop"),
    ],
)
def test_a_rank_that_hangs_is_named_with_its_place(
    machine: Machine, tmp_path: Path, *, ranks: int, how: str, where: str, rank: int
) -> None:
    os.mkfifo(tmp_path / "fifo")
    there = replace(machine, ranks=ranks)
    run = str(tmp_path / "run")
    fault = {"how": how, "step": STEP, "rank": rank, "fifo": str(tmp_path / "fifo")}
    processes = there.start(run, *HANGS, **fault)
    assert ended(processes, 300) == [75] * ranks, there.said()
    pid = processes[rank].pid
    named = (
        rf"wds-train: rank {rank} \(\S+, process {pid}\) has not got beyond step {STEP} for \d+ s; "
        rf"it is in \S+{where}\. All ranks end"
    )
    assert re.search(named, there.said()), there.said()
    # The stack of the one that hangs, and of no other.
    assert f"rank {rank}, the main thread:" in there.log(rank).read_text()
    assert there.said().count("the main thread:") == 1
    manifest = manifest_of(run)
    assert (manifest.status, manifest.step) == ("interrupted", 11)
    code, said = there.train(run)
    assert code == 0, said
    assert "resuming at step 11 of 22" in said


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("how", "state", "rank"),
    [
        ("stopped", r"T \(stopped\)", 1),
        ("stopped", r"T \(stopped\)", 0),
        ("slow_pattern", r"R \(running\)", 1),
    ],
)
def test_a_rank_that_cannot_speak_is_named_by_the_others(
    machine: Machine, tmp_path: Path, how: str, state: str, rank: int
) -> None:
    """Without a launcher, rank 0 also holds the store by which the ranks meet."""
    run = str(tmp_path / "run")
    processes = machine.start(
        run, *HANGS, how=how, step=STEP, rank=rank, manifest=f"{run}/manifest.json"
    )
    other = 1 - rank
    assert ended(processes[other : other + 1], 300) == [75], machine.said()
    if how == "slow_pattern":
        until = time.monotonic() + 100
        while "slow_pattern" not in machine.log(rank).read_text():  # Python's own watchdog tells
            assert time.monotonic() < until, machine.said()
            time.sleep(0.2)
    ended(processes, 0)
    said = machine.log(other).read_text()
    assert re.search(
        rf"rank {rank} \(\S+, process {processes[rank].pid}\) has told nothing for \d+ s, last at",
        said,
    ), said
    assert re.search(rf"its process is in state {state}", said), said
    manifest = manifest_of(run)
    assert manifest.step == 11
    assert rank == 0 or manifest.status == "interrupted"
    code, said = machine.train(run)
    assert code == 0, said
    assert "resuming at step 11 of 22" in said


def children_of(pid: int) -> list[int]:
    """The loader workers of a process, the oldest first."""
    return sorted(
        int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loader_worker_that_hangs_is_named(machine: Machine, tmp_path: Path, ranks: int) -> None:
    there = replace(machine, ranks=ranks, workers=1, settings=("schedule.epochs=500",))
    run = str(tmp_path / "run")
    processes = there.start(run, *HANGS)
    wait_for_commit_of(run, processes)
    last = processes[-1]
    worker = children_of(last.pid)[0]
    os.kill(worker, signal.SIGSTOP)
    assert ended(processes, 300) == [75] * ranks, there.said()
    named = (
        rf"rank {ranks - 1} \(\S+, process {last.pid}\) has not got beyond the batch of step \d+ "
        r"for \d+ s; it is in .*, "
        rf"which waits for data: .*; of its loader workers, process {worker}: T \(stopped\)"
    )
    assert re.search(named, there.said()), there.said()
    until = time.monotonic() + 20  # for whoever adopts it
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < until, "the loader worker lives on"
        time.sleep(0.1)
    assert manifest_of(run).status == "interrupted"


def wait_for_commit_of(run: str, processes: list[Rank]) -> None:
    until = time.monotonic() + 200
    while not (Path(run) / "manifest.json").exists():
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.1)
    wait_for_commit(run)


@pytest.mark.timeout(900)
def test_the_launcher_ends_what_is_stopped(machine: Machine, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    settings = [part for each in (*SETTINGS, "schedule.epochs=500") for part in ("--set", each)]
    command = [
        sys.executable,
        "-m",
        "wds_train.cli",
        "train",
        run,
        "--dataset",
        machine.dataset,
        "--workers",
        "0",
    ]
    environment = os.environ | {
        "WANDB_MODE": "disabled",
        "WDS_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [*command, *settings, "--processes", "2", *HANGS],
            env=environment,
            stderr=log,
            stdout=log,
            text=True,
        )
    wait_for_commit_of(run, [launcher])
    ranks = [
        pid
        for pid in children_of(launcher.pid)
        if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    os.kill(ranks[0], signal.SIGSTOP)
    assert launcher.wait(300) == 75, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert re.search(
        rf"rank 1 \(\S+, process {ranks[0]}\) has told nothing for \d+ s, .* state T \(stopped\)",
        said,
    ), said
    assert "rank 1 was killed by SIGKILL" in said
    assert not Path(f"/proc/{ranks[0]}").exists()
    assert manifest_of(run).status == "interrupted"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_slow_is_not_hanging(machine: Machine, tmp_path: Path, ranks: int) -> None:
    """A step that takes most of the limit; and a machine that was stopped for longer than it."""
    there = replace(machine, ranks=ranks)
    run = str(tmp_path / "run")
    processes = there.start(
        run, *HANGS, how="slow_step", step=STEP, rank=ranks - 1, seconds=LIMIT / 2
    )
    wait_for_commit_of(run, processes)
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(LIMIT + 3)
    for process in processes:
        process.send_signal(signal.SIGCONT)
    assert ended(processes, 300) == [0] * ranks, there.said()
    assert "has not got beyond" not in there.said()


@pytest.mark.parametrize(
    ("minutes", "patience", "limit"),
    [(None, "120", LIMIT_SECONDS), (None, "3600", 3600 + DATA_MARGIN), (2.0, "3600", 120.0)],
)
def test_what_waits_by_itself_is_not_cut_short(
    monkeypatch: pytest.MonkeyPatch, minutes: float | None, patience: str, limit: float
) -> None:
    monkeypatch.setenv("WDS_S3_PATIENCE", patience)
    assert limit_of(minutes) == limit
