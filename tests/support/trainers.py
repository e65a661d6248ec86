"""Trainings as processes, for tests that kill them by the hundred.

PyTorch and timm take eight seconds of CPU to import. A server process imports them once, starts no thread, and forks
into a trainer in milliseconds; what runs there is `wds-train train` itself, through its command line.
"""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from waiting import SECONDS, wait_until

from wds_train.checkpoint.lease import read_run
from wds_train.cli import entry, main
from wds_train.errors import NotFound
from wds_train.storage.open import open_store

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["wds_train.training.run_training", "wds_train.cli"])

SETTINGS = [
    "model.name=test_resnet",
    "model.drop_path=0.1",
    "mix.mixup=0.2",
    "batch=16",
    "optimizer.name=sgd",
    "optimizer.lr=0.1",
    "optimizer.weight_decay=5e-4",
    "data.size=16",
    "data.eval_size=16",
    "schedule.epochs=4",
    "schedule.warmup_epochs=1",
]
STEPS_PER_EPOCH, EPOCHS, BATCH = 11, 4, 16
SAMPLES = STEPS_PER_EPOCH * BATCH + 5  # of which five are left over in each epoch

# Instead of a signal: the thread that comes by is held until the test releases the training, the others go on; with
# POISON, the weights of the trainer that comes by break before.
HOLD = 0
POISON = -1

# Where a process can be made to stop: (module, owner of the function, function, before or after it).
POINTS = {
    "claimed": ("checkpoint.run", "Run", "_take", "after"),
    "resuming": ("training.engine", "Trainer", "restore", "before"),
    "resumed": ("training.engine", "Trainer", "restore", "after"),
    "before a step": ("training.engine", "Trainer", "step", "before"),
    "after a step": ("training.engine", "Trainer", "step", "after"),
    "validating": ("training.engine", "", "sums", "before"),
    "validated": ("training.engine", "Trainer", "evaluate", "after"),
    "before the snapshot": ("training.engine", "Trainer", "snapshot", "before"),
    "after the snapshot": ("training.engine", "Trainer", "snapshot", "after"),
    "uploading": ("storage.s3_write", "S3Writer", "_send", "before"),
    "between uploads and manifest": (
        "checkpoint.run_manifest",
        "RunManifest",
        "with_commit",
        "before",
    ),
    "announced": ("checkpoint.writer", "Writer", "announce", "after"),
    "before the manifest": ("checkpoint.writer", "Writer", "write", "before"),
    "after the manifest": ("checkpoint.writer", "Writer", "write", "after"),
    "before the garbage": ("checkpoint.committer", "", "collect", "before"),
    "in the garbage": ("storage.s3", "S3Store", "delete", "after"),
}


@dataclass(frozen=True)
class Job:
    """One attempt, or with `command` another command of wds-train. The process sends itself `sent` when it passes `point` for the `nth` time. `constants` are set in
    modules of wds_train: {"checkpoint.lease.LEASE_SECONDS": 2.0}. With `revalidate`, it begins by printing what the state that it
    resumed from scores.
    """

    dataset: str
    run: str
    folder: str
    workers: int = 0
    arguments: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    point: str = ""
    nth: int = 1
    sent: int = signal.SIGKILL
    revalidate: bool = False
    constants: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    defaults: tuple[str, ...] = tuple(SETTINGS)
    command: tuple[str, ...] = ()


def wait_for_commit(run: str, beyond: int = 0) -> None:
    """Until the run's manifest names a checkpoint of a step beyond that: an epoch's line comes before its commit, which
    goes on beside the training.
    """

    def committed() -> bool:
        try:
            manifest, _ = read_run(open_store(run))
        except NotFound:
            return False  # it has not been claimed yet
        return manifest.step > beyond

    wait_until(committed, f"a commit beyond step {beyond} to {run}")


def make_dataset(folder: Path) -> str:
    """Noise in two classes: small, so that a training takes a second or two."""
    rng = np.random.default_rng(0)
    for split, samples in (("train", SAMPLES), ("val", 40)):
        for i in range(samples):
            path = folder / "images" / split / f"class{i % 2}" / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(
                rng.integers(128 * (i % 2), 128 + 128 * (i % 2), (16, 16, 3), dtype=np.uint8)
            ).save(path)
    assert main(["shards", str(folder / "images"), str(folder / "data")]) == 0
    return str(folder / "data")


class Training:
    """A running `Job`. Its output, and the steps that it took, are in files, which outlive it."""

    count = 0

    def __init__(self, job: Job) -> None:
        Training.count += 1
        place = Path(job.folder) / f"{Training.count:04d}"
        self.log, self.steps_log = place.with_suffix(".log"), place.with_suffix(".steps")
        self._released = self.log.with_suffix(".go")
        self.log.touch()
        environment = {
            name: value for name, value in os.environ.items() if name.startswith(("AWS_", "WDS_"))
        }
        arguments = (job, str(self.log), str(self.steps_log), environment)
        self.process = CONTEXT.Process(target=run_job, args=arguments)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text()

    def until(self, pattern: str, seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.output):
            assert self.process.is_alive() and time.monotonic() < deadline, (
                f"{pattern!r} never came:\n{self.output}"
            )
            time.sleep(0.005)

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def release(self) -> None:
        """Let a training that is held go on."""
        self._released.touch()

    def end(self, sent: int | None = None, seconds: float = SECONDS) -> int:
        """The exit status, negative for a signal. One that is held goes on once it has the signal."""
        if sent is not None:
            self.send(sent)
        self.release()
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running:\n{self.output}"
        return self.process.exitcode

    def steps(self) -> dict[int, list[int]]:
        """The sample numbers of each step that the process took. A line cut by a kill is a step that was not done."""
        if not self.steps_log.exists():
            return {}
        lines = self.steps_log.read_text().split("\n")[:-1]
        return {entry[0]: entry[1] for entry in map(json.loads, lines)}


def run_job(job: Job, log: str, steps_log: str, environment: dict[str, str]) -> None:
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(
        environment | {"WANDB_MODE": "disabled", "WDS_HOME": job.folder} | job.environment
    )
    # As in a command that a person starts. From the fork server's context, a killed process would leave the semaphore of
    # tqdm's lock.
    multiprocessing.set_start_method("fork", force=True)
    import torch

    from wds_train.training.engine import Trainer
    from wds_train.training.spot import SpotWatch

    torch.set_num_threads(1)
    for name, value in job.constants.items():
        module, _, constant = name.rpartition(".")
        setattr(_module(module), constant, value)
    SpotWatch.__init__.__defaults__ = (None, 0.02)  # looks for the notice more often
    _log_steps(Trainer, steps_log)
    if job.point:
        _stop_at(job, Path(log).with_suffix(".go"))
    if job.revalidate:
        _revalidate()
    settings = [part for setting in (*job.defaults, *job.settings) for part in ("--set", setting)]
    training = [
        "train",
        "--dataset",
        job.dataset,
        "--run",
        job.run,
        "--workers",
        str(job.workers),
        *settings,
    ]
    sys.argv[1:] = [*(job.command or training), *job.arguments]
    entry()


def _module(name: str) -> Any:
    import importlib

    return importlib.import_module(f"wds_train.{name}")


def _log_steps(trainer: Any, path: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    step = trainer.step

    def logged(self: Any, batch: Any) -> Any:
        loss = step(self, batch)
        os.write(file, (json.dumps([batch.step, batch.ids.tolist()]) + "\n").encode())
        return loss

    trainer.step = logged


def _revalidate() -> None:
    from wds_train.training.session import Session as _Session

    begin = _Session._train

    def scored(self: Any) -> None:
        scores = self._trainer.evaluate(self._val_loader, self._val_samples)
        print(f"resumed with {json.dumps(scores)}", flush=True)
        begin(self)

    _Session._train = scored  # type: ignore[method-assign]


def _stop_at(job: Job, released: Path) -> None:
    module, owner, name, when = POINTS[job.point]
    held = getattr(_module(module), owner) if owner else _module(module)
    function: Callable[..., Any] = getattr(held, name)
    passes = iter(range(1, 1 << 30))

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if when == "before":
            stop(arguments)
        result = function(*arguments, **named)
        if when == "after":
            stop(arguments)
        return result

    def stop(arguments: tuple[Any, ...]) -> None:
        if next(passes) != job.nth:
            return
        print(f"held at {job.point}", flush=True)
        if job.sent > 0:
            os.kill(os.getpid(), job.sent)
            return
        if job.sent == POISON:
            next(arguments[0].model.parameters()).data.fill_(float("nan"))
        wait_until(released.exists, "the release")

    # `getattr` gave a classmethod bound, and must not be bound once more.
    setattr(held, name, staticmethod(wrapped) if hasattr(function, "__self__") else wrapped)


def start_ranks(job: Job, ranks: int, last: tuple[str, ...] = ()) -> list[Training]:
    """Start all ranks of a training; the last one is given the settings `last`, too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    each = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    jobs = [replace(job, environment=environment) for environment in each]
    return [
        Training(each) for each in (*jobs[:-1], replace(jobs[-1], settings=(*job.settings, *last)))
    ]


@contextlib.contextmanager
def all_ended(trainings: list[Training]) -> Iterator[None]:
    """Whatever happens, no training outlives the test."""
    try:
        yield
    finally:
        for training in trainings:
            training.send(signal.SIGKILL)
            training.process.join()
