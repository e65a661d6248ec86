"""The steps, the epochs and the commits of one process's work on a run.

    begin_session: fork the loader workers -> connect -> make or restore the trainer
    Session.run_to_end: steps, validations and commits -> the upload of the last state -> "done"

The loop looks at signals, the spot notice and the clock between steps only, so that a commit is
always of a whole step. While validating, it looks between batches: the validation is then repeated
after the resume.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from wds_train.checkpoint.run import Run
from wds_train.checkpoint.scores import telling
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.console import Bar, note, say
from wds_train.dataset.manifest import ClassInfo
from wds_train.dataset.reader import Dataset
from wds_train.errors import Interrupted, StoppedByPerson, WorkerDied
from wds_train.loader.batch import Batch
from wds_train.loader.eval_loader import EvalLoader
from wds_train.loader.train_loader import TrainLoader
from wds_train.models.mistakes import Findings
from wds_train.models.scoring import EVAL_BATCH
from wds_train.tracking.progress import TrainingBar
from wds_train.tracking.tracker import Tracker
from wds_train.training.deadline import Stopped, read_until_stopped
from wds_train.training.ending import cause_of_end, give_up, is_over
from wds_train.training.engine import Trainer, gpu_figures
from wds_train.training.memory import fit_accumulation
from wds_train.training.metrics_rows import MetricsRows
from wds_train.training.options import TrainOptions
from wds_train.training.outcome import resume_command
from wds_train.training.ranks import Ranks, lost_ranks
from wds_train.training.recheck import take_step
from wds_train.training.setup import (
    describe_hardware,
    describe_training,
    epoch_steps,
    expected_pace,
    make_train_loader,
    make_trainer,
    make_val_loader,
)
from wds_train.training.spot import SpotWatch
from wds_train.training.stop_request import StopRequest
from wds_train.training.waits import time_waits
from wds_train.training.watch import Watch

# Rows of metrics in a short epoch, so that its curve has a shape.
LOGS_PER_EPOCH = 4
# The most steps between two rows. Each row makes the CPU wait for the GPU.
LOG_STEPS = 50
REBALANCE = (
    "EC2 recommends to move: this spot instance is at an elevated risk of being taken back; "
    "training goes on"
)
# Seconds before the deadline that the last commit leaves for the last message and the end.
LAST_MOMENT = 2.0


class Loaders(NamedTuple):
    """The loaders of one process, whose workers are forked already."""

    train: TrainLoader
    val: EvalLoader


@dataclass(frozen=True)
class SessionParts:
    """The parts of a training that exist before its session.

    Attributes:
        options: How the training works.
        datasets: The training's dataset, and the others of its mixture.
        run: The run, which is claimed.
        stop: The request to stop.
        ranks: The processes of the training, not connected yet.
        tracker: Passes metrics on to W&B; not started yet.
        watch: Finds ranks that hang; not started yet.
    """

    options: TrainOptions
    datasets: list[Dataset]
    run: Run
    stop: StopRequest
    ranks: Ranks
    tracker: Tracker
    watch: Watch


class StateSaver:
    """Hands the state of a training to the run's committer, and remembers the newest one."""

    def __init__(
        self, trainer: Trainer, run: Run, rows: MetricsRows, classes: Sequence[ClassInfo]
    ) -> None:
        self._trainer = trainer
        self._run = run
        self._rows = rows
        self._classes = [[each.id, each.name] for each in classes]
        self._saved = trainer.progress
        self._saved_at = time.monotonic()

    def is_due(self, minutes: float) -> bool:
        """Return True if the last commit is `minutes` old, and none is under way."""
        is_old = time.monotonic() - self._saved_at >= minutes * 60
        return is_old and not self._run.committer.busy

    def has_newest(self) -> bool:
        """Return True if the trainer's present state is committed or on its way."""
        now = self._trainer.progress
        return (now.step, now.evaluated) == (self._saved.step, self._saved.evaluated)

    def commit(self, metrics: dict[str, float], **changes: Any) -> None:
        """Copy the state, and hand it over with the newest rows.

        All ranks take part; the leader's committer uploads it in the background.

        Args:
            metrics: Of the validation at this step; empty without one.
            changes: Other fields of the manifest.
        """
        start = time.perf_counter()
        self._run.writer.clock.turn("commit")
        snapshot = self._trainer.snapshot(classes=self._classes)
        rows = self._rows.drain()
        if snapshot is not None:
            self._run.committer.commit(snapshot, metrics, rows, **changes)
        self._saved = self._trainer.progress
        self._saved_at = time.monotonic()
        self._rows.stall_ms = (time.perf_counter() - start) * 1000


class Session:
    """One process's work on a run, from its first step to its end or interruption.

    `begin_session` makes it, since workers, threads and the GPU must come in that order.
    """

    def __init__(self, parts: SessionParts, loaders: Loaders, trainer: Trainer) -> None:
        self._options = parts.options
        self._schedule = parts.options.recipe.schedule
        self._run = parts.run
        self._stop = parts.stop
        self._ranks = parts.ranks
        self._tracker = parts.tracker
        self._watch = parts.watch
        self._loader = loaders.train
        self._val_loader = loaders.val
        self._trainer = trainer
        self._rows = MetricsRows(parts.run, parts.tracker, parts.options.recipe.batch)
        manifest = parts.datasets[0].manifest
        self._classes = manifest.classes
        self._val_samples = manifest.split("val").samples
        self._epoch_steps = trainer.steps_per_epoch
        self._total = self._schedule.epochs * self._epoch_steps

        # The state that changes while it trains.
        self._began_at = trainer.progress
        self._saver = StateSaver(trainer, parts.run, self._rows, self._classes)
        self._rebalance_said = False

        # The instance's notices, shown by one process a machine, and the bar of the leader.
        voice = _quiet_unless(parts.ranks.local == 0, say)
        self._spot = SpotWatch(parts.stop, tell=parts.run.writer.note, say=voice)
        self._bar = _make_bar(parts, trainer.progress.step)

    def run_to_end(self) -> None:
        """Train until the run is done and uploaded.

        Raises:
            Interrupted: Asked to stop; the state is committed if the time was enough.
            StoppedByPerson: The same, for good.
        """
        with self._spot:
            try:
                self._train()
            except Stopped:
                self._interrupt()
            except WorkerDied as error:
                # Commit, and let the next start try once more.
                trained = self._trainer.progress != self._began_at
                self._stop.ask(cause_of_end(error, trained, self._ranks.size))
                self._interrupt()
            finally:
                self._bar.close()
            self._finish_upload()
            self._run.end("done")
            self._stop.code = 0
            _leave_together(self._stop, self._ranks)
            self._stop.doing = "what comes after the run"

    def _train(self) -> None:
        """Take steps, validate and commit until the schedule ends."""
        trainer = self._trainer
        read = read_until_stopped(self._loader, self._stop)
        batches = time_waits(read, self._run.writer.clock, trainer.device)
        while not is_over(self._schedule, trainer.progress):
            # A commit that is due. A loss that is not finite must not be committed.
            if self._look_up():
                trainer.epoch_loss()
                self._saver.commit({})
            # A resume may begin at the end of an epoch, before its validation.
            step = trainer.progress.step
            if step == (trainer.progress.evaluated + 1) * self._epoch_steps:
                self._end_epoch()
            else:
                self._watch.beat(f"the batch of step {step + 1}", step, 1)
                batch, waited = next(batches)
                self._step(batch, waited)

    def _look_up(self) -> bool:
        """Return True if it is time for a commit; all ranks come to the same answer.

        Raises:
            Stopped: A rank was asked to stop.
            WdsTrainError: As `Committer.check`.
        """
        self._run.committer.check()
        if self._spot.rebalance and not self._rebalance_said:
            self._rebalance_said = True
            say(REBALANCE)
        is_due = self._ranks.leads and self._saver.is_due(self._options.commit_minutes)
        stopped, commits = self._ranks.total(self._stop.cause is not None, is_due)
        if stopped:
            raise Stopped
        return commits > 0

    def _step(self, batch: Batch, waited: float) -> None:
        """Take a step on `batch`, for which the training waited `waited` seconds."""
        trainer = self._trainer
        start = time.perf_counter()
        self._watch.beat(f"step {batch.step + 1}", batch.step, 2)
        if batch.step == 0:
            self._tracker.show_batch(batch.images)
        for entry in batch.unreadable:
            say(f"unreadable sample: {entry.named}")
        with lost_ranks():
            loss = take_step(trainer, batch, self._options.recheck, self._began_at.step)

        # Read the loss of a step that is logged. It waits for the GPU, within the step's time.
        done = trainer.progress.step
        mean_loss = None
        if _is_logged(done, self._epoch_steps):
            mean_loss = self._ranks.total(loss.item())[0] / self._ranks.size
            trainer.epoch_loss()

        # Log the step, and show it.
        self._rows.add_step(waited, time.perf_counter() - start)
        if mean_loss is not None:
            row = _figures(trainer, batch, mean_loss, self._loader.fallbacks)
            self._rows.log_step(row, trainer.progress)
        self._bar.step(done, waited, trainer.lr(done - 1), mean_loss)

    def _end_epoch(self) -> None:
        """Validate and commit."""
        trainer = self._trainer
        before = trainer.progress
        self._run.writer.clock.turn("validation")
        self._watch.beat(f"the validation of epoch {before.evaluated + 1}", before.step, 0)
        loss = trainer.epoch_loss()
        findings: Findings | None = None
        if self._tracker.watching:
            findings = Findings()
        with lost_ranks():
            batches = self._look_up_before(read_until_stopped(self._val_loader, self._stop))
            metrics = trainer.evaluate(batches, self._val_samples, findings)
        unreadable = trainer.epoch_unreadable()
        trainer.end_epoch(metrics)

        # Report the epoch to W&B, in the run's metrics, and on the console.
        if findings is not None:
            self._tracker.show_findings(findings, self._classes)
        self._rows.log_epoch(loss, unreadable, metrics, trainer.progress)
        if self._ranks.leads:
            note(_epoch_line(trainer, loss, metrics, unreadable, self._loader.fallbacks))

        # Commit it. The commit of the last epoch also ends the run.
        if is_over(self._schedule, trainer.progress):
            self._saver.commit(metrics, status="done", result=metrics | {"epoch/loss": loss})
        else:
            self._saver.commit(metrics)
        self._bar.validated()

    def _look_up_before(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches of a validation, with a look up before each that all ranks have."""
        # Ranks may differ by one batch: in the last one some would wait for the others in vain.
        size = min(self._options.recipe.batch, EVAL_BATCH)
        shared = -(-self._val_samples // size) // self._ranks.size
        progress = self._trainer.progress
        epoch = progress.evaluated + 1
        for number, batch in enumerate(batches):
            self._watch.beat(
                f"batch {number + 1} of the validation of epoch {epoch}", progress.step, 0
            )
            if number < shared:
                self._look_up()
            self._bar.validating(epoch, number * size * self._ranks.size, self._val_samples)
            yield batch

    def _finish_upload(self) -> None:
        """Wait until the last state is committed, or the training is asked to stop."""
        with Bar(1, shown=self._ranks.leads) as bar:
            while not self._run.committer.wait(0.2):
                if self._stop.cause:
                    self._interrupt()
                self._watch.beat("the upload of the last state", self._total, 1)
                bar.show(0, f"uploading the last state to {self._run.store.url}")

    def _interrupt(self) -> None:
        """Commit the current state if needed, then stop.

        Return normally if that commit was the last that the run needed.
        """
        # The cause if this rank knows of none. The deadline runs in every rank.
        self._stop.ask("another rank")
        self._stop.doing = f"the last commit to {self._run.store.url}"
        status = "stopped" if self._stop.by_person else "interrupted"
        progress = self._trainer.progress
        self._run.writer.clock.turn("commit")
        if not self._saver.has_newest():
            self._trainer.epoch_loss()
            self._saver.commit({}, status=status)

        # Wait for the upload, as long as the deadline allows.
        committed = self._run.committer.wait(self._stop.left - LAST_MOMENT)
        if self._run.manifest.status == "done":
            return
        if committed:
            give_up(self._run, status)
        _leave_together(self._stop, self._ranks)
        where = self._run.store.url
        raise _stop_error(self._stop, _outcome(progress.step, self._total, where, committed))


def begin_session(parts: SessionParts, snapshot: Snapshot | None) -> Session:
    """Begin a process's work on a claimed run, and return it ready to run.

    The order matters: loader workers are forked, and a forked child survives neither the threads of
    its parent nor its use of a GPU.

    Args:
        parts: The parts of the training.
        snapshot: The checkpoint to go on from; None begins at step 0.

    Raises:
        RunError: The checkpoint does not fit the model.
        RanksLost: Another rank has gone.
    """
    options = parts.options
    run = parts.run
    ranks = parts.ranks

    # 1. Processes.
    from_step = 0
    if snapshot is not None:
        from_step = snapshot.progress.step
    loaders = fork_loaders(options, parts.datasets, ranks, from_step)

    # 2. Threads: hold the run, and meet the other ranks and W&B.
    run.committer.max_uncommitted = options.max_uncommitted_minutes * 60
    run.begin()
    machine = {"hardware": describe_hardware(ranks), "price": options.price}
    run.writer.note(**machine)
    parts.stop.doing = "the training"
    if ranks.leads:
        splits = parts.datasets[0].manifest.splits
        samples = {name: split.samples for name, split in splits.items()}
        # Reading the history names the segments that are damaged.
        parts.tracker.start(run.history(), samples=samples, **machine)
    parts.watch.start()
    ranks.connect(parts.watch.silence)

    # 3. The GPU.
    trainer = _restore_trainer(options, parts.datasets, ranks, snapshot)
    return Session(parts, loaders, trainer)


def fork_loaders(
    options: TrainOptions, datasets: list[Dataset], ranks: Ranks, from_step: int
) -> Loaders:
    """Make both loaders, and fork their workers.

    Those of the training begin to read at once, for step `from_step`.
    """
    train = make_train_loader(options, datasets, ranks, from_step)
    val = make_val_loader(options, datasets[0], ranks)
    train.start()
    val.start()
    return Loaders(train, val)


def _restore_trainer(
    options: TrainOptions, datasets: list[Dataset], ranks: Ranks, snapshot: Snapshot | None
) -> Trainer:
    """Make the trainer in the state of `snapshot`, and introduce the training."""
    # Make it. All ranks cut their batches alike: the one with the least memory decides.
    resumes = snapshot is not None
    trainer = make_trainer(options, datasets, ranks.device, ranks, resumes=resumes)
    # A CPU's memory holds any batch that it can work on.
    if options.accumulate is None and ranks.device.type == "cuda":
        trainer.accumulate = round(ranks.largest(fit_accumulation(trainer)))

    # Introduce it: the leader alone.
    tell = _quiet_unless(ranks.leads, note)
    steps = epoch_steps(options, datasets)
    tell(describe_training(options, datasets[0], steps, ranks))
    for each in trainer.notes:
        tell(f"weights  {each}")
    if trainer.accumulate > 1:
        tell(f"memory   each batch in {trainer.accumulate} micro-batches")

    # Restore it.
    if snapshot:
        trainer.restore(snapshot)
        step = trainer.progress.step
        total = options.recipe.schedule.epochs * steps
        tell(f"resuming at step {step} of {total} (epoch {step / steps:.2f})")
    return trainer


def _leave_together(stop: StopRequest, ranks: Ranks) -> None:
    """Wait for the other ranks: to them, one that leaves earlier looks lost."""
    stop.doing = "another rank"
    ranks.total(1)


def _make_bar(parts: SessionParts, step: int) -> TrainingBar:
    """Make the bar, which the leader alone shows."""
    options = parts.options
    pace = expected_pace(options, parts.datasets)
    batch = options.recipe.batch
    return TrainingBar(pace, step, batch, options.price, shown=parts.ranks.leads)


def _quiet_unless(speaks: bool, tell: Callable[[str], object]) -> Callable[[str], object]:
    """Return `tell`, or for a process that does not speak, a function that says nothing."""
    if speaks:
        return tell
    return _keep_quiet


def _keep_quiet(_: str) -> None:
    """Say nothing."""


def _figures(trainer: Trainer, batch: Batch, loss: float, fallbacks: int) -> dict[str, Any]:
    """Return the row of the step that was just taken."""
    done = trainer.progress.step
    figures: dict[str, Any] = {
        "step": done,
        "epoch": done / trainer.steps_per_epoch,
        "train/loss": loss,
        "train/lr": trainer.lr(done - 1),
        "train/grad_norm": trainer.grad_norm.item(),
        "train/resolution": batch.images.shape[1],
    }
    if fallbacks:
        figures["s3/fallbacks"] = fallbacks
    return figures | gpu_figures(trainer)


def _epoch_line(
    trainer: Trainer, loss: float, metrics: dict[str, float], unreadable: int, fallbacks: int
) -> str:
    """Return the line of an epoch on the console."""
    recipe = trainer.recipe
    shown = telling(metrics, trainer.progress.step, recipe.ema.every)
    ema = "not updated yet"
    if "val/top1_ema" in shown:
        ema = f"{shown['val/top1_ema']:.2f} %"
    epoch = f"{trainer.progress.evaluated:3d}/{recipe.schedule.epochs}"
    line = f"epoch {epoch}  loss {loss:.3f}  top-1 {shown['val/top1']:.2f} %  EMA {ema}"
    if unreadable:
        line += f"  {unreadable} unreadable"
    if fallbacks:
        line += f"  {fallbacks} ranges asked for twice"
    return line


def _is_logged(step: int, epoch_steps: int) -> bool:
    """Return True if the step has a row.

    It depends on the step alone, so that a resumed run has the rows of an unbroken one.
    """
    return step % min(LOG_STEPS, max(1, epoch_steps // LOGS_PER_EPOCH)) == 0


def _stop_error(stop: StopRequest, outcome: str) -> Interrupted | StoppedByPerson:
    """Return the error that a training ends with when it was asked to stop."""
    if stop.by_person:
        return StoppedByPerson(f"stopped for good by {stop.cause}, {outcome}, given --go-on")
    return Interrupted(f"stopped by {stop.cause} {outcome}")


def _outcome(step: int, total: int, where: str, committed: bool) -> str:
    """Return where the training was, if its state is safe, and how to go on, as a sentence."""
    if not step:
        return f"before the first of {total} steps; the same command begins anew"
    at = f"at step {step} of {total}"
    if committed:
        return (
            f"{at}, state committed to {where}; the same command goes on from there, or: "
            f"{resume_command(where)}"
        )
    return (
        f"{at}, whose state could not be committed in time; the same command goes on from the "
        f"newest checkpoint of {where}"
    )
