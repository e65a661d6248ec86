"""The steps, the epochs and the commits of one process's work on a run.

The loop looks at signals, the spot notice and the clock between steps only, so that what is committed is always a whole
step; while validating, between batches: the validation is then repeated after the resume.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from wds_train.checkpoint.run import Run
from wds_train.checkpoint.scores import telling
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.console import Bar, note, say
from wds_train.dataset.reader import Dataset
from wds_train.errors import Interrupted, StoppedByPerson, WorkerDied
from wds_train.loader.batch import Batch
from wds_train.models.mistakes import Findings
from wds_train.models.scoring import EVAL_BATCH
from wds_train.tracking.progress import TrainingBar
from wds_train.tracking.tracker import Tracker
from wds_train.training.deadline import Stopped, in_time
from wds_train.training.ending import cause_of_end, give_up, is_over
from wds_train.training.engine import Trainer, gpu_figures
from wds_train.training.memory import fit_accumulation
from wds_train.training.metrics_rows import Rows
from wds_train.training.options import TrainOptions
from wds_train.training.outcome import going_on
from wds_train.training.ranks import Ranks, lost_ranks
from wds_train.training.recheck import take_step
from wds_train.training.setup import (
    epoch_steps,
    expected_pace,
    hardware,
    introduction,
    make_train_loader,
    make_trainer,
    make_val_loader,
)
from wds_train.training.spot import SpotWatch
from wds_train.training.stop_request import StopRequest
from wds_train.training.waits import timed
from wds_train.training.watch import Watch

LOGS_PER_EPOCH = 4
LOG_STEPS = 50  # at most so many steps between two records; each makes the CPU wait for the GPU
REBALANCE = "EC2 recommends to move: this spot instance is at an elevated risk of being taken back; training goes on"
LAST_MOMENT = 2.0  # seconds of the last commit's time that are left to say how it went


class Session:
    """One process's work on a run, from its claim to its end or interruption: `fork`, `connect`, `restore`, `run_to_end`."""

    def __init__(
        self,
        options: TrainOptions,
        datasets: list[Dataset],
        run: Run,
        stop: StopRequest,
        *,
        ranks: Ranks,
        tracker: Tracker,
        watch: Watch,
    ) -> None:
        self._options, self._run, self._stop, self._ranks, self._tracker = options, run, stop, ranks, tracker
        self._watch = watch
        self._say = note if ranks.leads else _keep_quiet
        self._rows = Rows(run, tracker, options.recipe.batch)
        self._datasets = datasets
        self._classes = [[entry.id, entry.name] for entry in datasets[0].manifest.classes]
        self._epoch_steps = epoch_steps(options, datasets)
        self._total = options.recipe.schedule.epochs * self._epoch_steps
        self._val_samples = datasets[0].manifest.split("val").samples

    def fork(self, start: int) -> None:
        """Begin to read, for the steps from `start` on. It is to be called before this process has threads or uses a
        GPU: loader workers are forked, and a forked child survives neither.
        """
        self._loader = make_train_loader(self._options, self._datasets, self._ranks, start)
        self._val_loader = make_val_loader(self._options, self._datasets[0], self._ranks)
        self._loader.start()
        self._val_loader.start()

    def connect(self) -> None:
        """Hold the run, and meet the other ranks and W&B: from here on there are threads."""
        self._run.committer.max_uncommitted = self._options.max_uncommitted_minutes * 60
        self._run.begin()
        machine = {"hardware": hardware(self._ranks), "price": self._options.price}
        self._run.writer.note(**machine)
        self._stop.doing = "the training"
        if self._ranks.leads:
            samples = {name: split.samples for name, split in self._datasets[0].manifest.splits.items()}
            history = self._run.history()  # which names what is damaged
            self._tracker.start(history, samples=samples, **machine)
        self._watch.start()
        self._ranks.connect(self._watch.silence)

    def restore(self, snapshot: Snapshot | None) -> None:
        """Make the trainer, as `snapshot` left it."""
        options, ranks = self._options, self._ranks
        trainer = self._trainer = make_trainer(
            options, self._datasets, ranks.device, ranks, resumes=snapshot is not None
        )
        if options.accumulate is None and ranks.device.type == "cuda":  # a CPU's memory holds any batch it can work on
            trainer.accumulate = round(ranks.largest(fit_accumulation(trainer)))
        for line in (introduction(options, self._datasets[0], self._epoch_steps, ranks), *_notes(trainer)):
            self._say(line)
        if snapshot:
            trainer.restore(snapshot)
            step = trainer.progress.step
            self._say(f"resuming at step {step} of {self._total} (epoch {step / self._epoch_steps:.2f})")

    def run_to_end(self) -> None:
        with SpotWatch(self._stop, tell=self._run.writer.note, say=_voice(self._ranks)) as self._spot:
            options, leads, pace = self._options, self._ranks.leads, expected_pace(self._options, self._datasets)
            self._begun_at = self._trainer.progress
            self._bar = TrainingBar(pace, self._begun_at.step, options.recipe.batch, options.price, shown=leads)
            try:
                self._train()
            except (Stopped, WorkerDied) as error:
                if isinstance(error, WorkerDied):
                    self._stop.ask(cause_of_end(error, self._begun_at != self._trainer.progress, self._ranks.size))
                self._interrupt()
            finally:
                self._bar.close()
            with Bar(1, shown=leads) as bar:
                while not self._run.committer.wait(0.2):
                    if self._stop.cause:
                        self._interrupt()
                    self._watch.beat("the upload of the last state", self._total, 1)
                    bar.show(0, f"uploading the last state to {self._run.store.url}")
            self._run.end("done")
            self._stop.code = 0
            self._stop.doing = "another rank"
            self._ranks.total(1)  # all leave together: a rank that leaves earlier looks like one that was lost
            self._stop.doing = "what comes after the run"

    def _train(self) -> None:
        trainer, epoch_steps = self._trainer, self._epoch_steps
        self._saved, self._saved_at = trainer.progress, time.monotonic()
        self._rebalance_said = False
        batches = timed(in_time(self._loader, self._stop), self._run.writer.clock, trainer.device)
        while not is_over(self._options.recipe.schedule, trainer.progress):
            if self._look_up():
                trainer.epoch_loss()
                self._commit({})
            if trainer.progress.step == (trainer.progress.evaluated + 1) * epoch_steps:
                self._end_epoch()
            else:
                self._watch.beat(f"the batch of step {trainer.progress.step + 1}", trainer.progress.step, 1)
                self._step(*next(batches))

    def _look_up(self) -> bool:
        """Whether it is time for a commit. Raises what ends the training: `Stopped` when any rank was asked to stop, and
        what `Committer.check` raises. All ranks look up at the same step, and come to the same answer.
        """
        self._run.committer.check()
        if self._spot.rebalance and not self._rebalance_said:
            self._rebalance_said = True
            say(REBALANCE)
        old = time.monotonic() - self._saved_at >= self._options.commit_minutes * 60
        due = self._ranks.leads and old and not self._run.committer.busy
        stopped, commits = self._ranks.total(self._stop.cause is not None, due)
        if stopped:
            raise Stopped
        return commits > 0

    def _step(self, batch: Batch, waited: float) -> None:
        start = time.perf_counter()
        self._watch.beat(f"step {batch.step + 1}", batch.step, 2)
        if not batch.step:
            self._tracker.show_batch(batch.images)
        _tell_unreadable(batch)
        with lost_ranks():
            loss = take_step(self._trainer, batch, self._options.recheck, self._begun_at.step)
        done, shown = self._trainer.progress.step, None
        if _is_logged(done, self._epoch_steps):
            shown = self._ranks.total(loss.item())[0] / self._ranks.size
            self._trainer.epoch_loss()
        self._rows.add_step(waited, time.perf_counter() - start)
        if shown is not None:
            figures = _figures(self._trainer, batch, self._loader.fallbacks)
            self._rows.log_step(figures | {"train/loss": shown}, self._trainer.progress)
        self._bar.step(done, waited, self._trainer.lr(done - 1), shown)

    def _end_epoch(self) -> None:
        """Validate and commit."""
        trainer = self._trainer
        self._run.writer.clock.turn("validation")
        self._watch.beat(f"the validation of epoch {trainer.progress.evaluated + 1}", trainer.progress.step, 0)
        loss = trainer.epoch_loss()
        findings = Findings() if self._tracker.watching else None
        with lost_ranks():
            batches = self._looking_up(in_time(self._val_loader, self._stop))
            metrics = trainer.evaluate(batches, self._val_samples, findings)
        unreadable = trainer.epoch_unreadable()
        trainer.evaluated(metrics)
        epoch, schedule = trainer.progress.evaluated, self._options.recipe.schedule
        record = {"step": trainer.progress.step, "epoch": float(epoch), "epoch/loss": loss, "epoch/lost": unreadable}
        if findings is not None:
            self._tracker.show_findings(findings, self._datasets[0].manifest.classes)
        self._rows.log(record | metrics, trainer.progress)
        shown = telling(metrics, trainer.progress.step, self._options.recipe.ema.every)
        self._say(_epoch_line(f"{epoch:3d}/{schedule.epochs}", loss, shown, unreadable, self._loader.fallbacks))
        over = is_over(schedule, trainer.progress)
        done = {"status": "done", "result": metrics | {"epoch/loss": loss}} if over else {}
        self._commit(metrics, **done)
        self._bar.validated()

    def _looking_up(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with a look up before each that all ranks have: their numbers of batches differ by one."""
        size, samples = min(self._options.recipe.batch, EVAL_BATCH), self._val_samples
        shared = -(-samples // size) // self._ranks.size
        epoch = self._trainer.progress.evaluated + 1
        for number, batch in enumerate(batches):
            self._watch.beat(f"batch {number + 1} of the validation of epoch {epoch}", self._trainer.progress.step, 0)
            if number < shared:
                self._look_up()
            self._bar.validating(epoch, number * size * self._ranks.size, samples)
            yield batch

    def _commit(self, metrics: dict[str, float], **changes: Any) -> None:
        start = time.perf_counter()
        self._run.writer.clock.turn("commit")
        snapshot, records = self._trainer.snapshot(classes=self._classes), self._tracker.drain()
        if snapshot is not None:
            self._run.committer.commit(snapshot, metrics, records, **changes)
        self._saved, self._saved_at = self._trainer.progress, time.monotonic()
        self._rows.stall_ms = (time.perf_counter() - start) * 1000

    def _interrupt(self) -> None:
        """Commit, unless this very state is committed or on its way, and leave; unless it was the last that was missing."""
        self._stop.ask("another rank")
        self._stop.doing = f"the last commit to {self._run.store.url}"
        status = "stopped" if self._stop.by_person else "interrupted"
        progress = self._trainer.progress
        self._run.writer.clock.turn("commit")
        if (progress.step, progress.evaluated) != (self._saved.step, self._saved.evaluated):
            self._trainer.epoch_loss()
            self._commit({}, status=status)
        committed = self._run.committer.wait(self._stop.left - LAST_MOMENT)
        if self._run.manifest.status == "done":
            return
        if committed:
            give_up(self._run, status)
        self._stop.doing = "another rank"
        self._ranks.total(1)  # the others wait for the leader's commit; the first that leaves ends them all
        raise _stopped(self._stop, _outcome(progress.step, self._total, self._run.store.url, committed))


def _tell_unreadable(batch: Batch) -> None:
    for entry in batch.unreadable:
        say(f"unreadable sample: {entry.named}")


def _notes(trainer: Trainer) -> Iterator[str]:
    """What to tell of how the trainer was made."""
    for each in trainer.notes:
        yield f"weights  {each}"
    if trainer.accumulate > 1:
        yield f"memory   each batch in {trainer.accumulate} micro-batches"


def _figures(trainer: Trainer, batch: Batch, fallbacks: int) -> dict[str, Any]:
    """What a record tells of the step that was just taken, besides its loss."""
    done = trainer.progress.step
    figures = {"step": done, "epoch": done / trainer.steps_per_epoch, "train/lr": trainer.lr(done - 1)}
    figures |= {"train/grad_norm": trainer.grad_norm.item(), "train/resolution": batch.images.shape[1]}
    figures |= {"s3/fallbacks": fallbacks} if fallbacks else {}
    return figures | gpu_figures(trainer)


def _voice(ranks: Ranks) -> Callable[[str], object]:
    """What says what every process on this machine sees: that of one of them."""
    return _keep_quiet if ranks.local else say


def _keep_quiet(_: str) -> None:
    """Say nothing."""


def _epoch_line(epoch: str, loss: float, metrics: dict[str, float], unreadable: int, fallbacks: int) -> str:
    ema = f"{metrics['val/top1_ema']:.2f} %" if "val/top1_ema" in metrics else "not updated yet"
    return (
        f"epoch {epoch}  loss {loss:.3f}  top-1 {metrics['val/top1']:.2f} %  EMA {ema}"
        + (f"  {unreadable} unreadable" if unreadable else "")
        + (f"  {fallbacks} ranges asked for twice" if fallbacks else "")
    )


def _is_logged(step: int, epoch_steps: int) -> bool:
    """Whether the step has a record: a function of the step alone, so that a resumed run logs what the unbroken one
    does.
    """
    return step % min(LOG_STEPS, max(1, epoch_steps // LOGS_PER_EPOCH)) == 0


def _stopped(stop: StopRequest, outcome: str) -> Interrupted | StoppedByPerson:
    if stop.by_person:
        return StoppedByPerson(f"stopped for good by {stop.cause}, {outcome}, given --go-on")
    return Interrupted(f"stopped by {stop.cause} {outcome}")


def _outcome(step: int, total: int, where: str, committed: bool) -> str:
    """Where the training was, what became of its state, and what the same command will do."""
    if not step:
        return f"before the first of {total} steps; the same command begins anew"
    at = f"at step {step} of {total}"
    if committed:
        return f"{at}, state committed to {where}; the same command goes on from there, or: {going_on(where)}"
    return (
        f"{at}, whose state could not be committed in time; the same command goes on from the newest checkpoint of "
        f"{where}"
    )
