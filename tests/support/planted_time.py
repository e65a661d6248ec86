"""Trainings whose seconds are planted: the clock stands still but for what each activity is said to take."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers import CONTEXT, Job, run_job

START, STEP, WAIT, COMMIT, VALIDATION, HANG = 30.0, 1.0, 0.5, 2.0, 10.0, 4.0
"""Seconds of a start, a step, the wait for a batch, a commit, a validation, and of what a kill interrupts."""


@dataclass(frozen=True)
class Kill:
    """Where the process sends itself `sent`: in the training step `step`, or in the validation `validation`; never at 0."""

    step: int = 0
    validation: int = 0
    sent: int = signal.SIGKILL


def train_planted(job: Job, kill: Kill = Kill()) -> int:
    """Run the job on planted seconds; its exit status, negative for a signal."""
    log = Path(job.folder) / "planted.log"
    log.touch()
    process = CONTEXT.Process(target=_train, args=(job, kill, str(log)))
    process.start()
    process.join(120)
    assert process.exitcode is not None, log.read_text()
    return process.exitcode


class PlantedClock:
    """A time that only `pass_` moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def _train(job: Job, kill: Kill, log: str) -> None:
    from wds_train.checkpoint.clock import Clock
    from wds_train.training import session as loop
    from wds_train.training.engine import Trainer

    planted = PlantedClock()
    Clock.__init__.__defaults__ = (lambda: planted.now,)
    _before(loop, "fork_loaders", lambda *_: planted.pass_(START))
    _before(Trainer, "snapshot", lambda *_, **__: planted.pass_(COMMIT))
    _plant_waits(loop, planted)

    def before_step(session: Any, *_: Any) -> None:
        if session._trainer.progress.step + 1 == kill.step:
            planted.pass_(HANG)
            _die(session, kill)
        planted.pass_(STEP)

    def before_validation(session: Any) -> None:
        if session._trainer.progress.evaluated + 1 == kill.validation:
            session._run.writer.clock.turn("validation")
            planted.pass_(HANG)
            _die(session, kill)

    _before(loop.Session, "_step", before_step)
    _before(loop.Session, "_end_epoch", before_validation)
    _before(Trainer, "evaluate", lambda *_, **__: planted.pass_(VALIDATION))
    run_job(job, log, os.devnull, {})


def _plant_waits(loop: Any, planted: PlantedClock) -> None:
    """Let every batch come late, of the training and of the validations."""
    read = loop.read_until_stopped

    def late(loader: Any, stop: Any) -> Any:
        for batch in read(loader, stop):
            planted.pass_(WAIT)
            yield batch

    loop.read_until_stopped = late


def _die(session: Any, kill: Kill) -> None:
    """Give a last sign of life, and end."""
    session._run.writer.write(lambda manifest: manifest)
    os.kill(os.getpid(), kill.sent)


def _before(owner: Any, name: str, what: Any) -> None:
    """Call `what` before the method, with its arguments."""
    method = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        what(*arguments, **named)
        return method(*arguments, **named)

    setattr(owner, name, wrapped)
