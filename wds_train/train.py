"""A training from start or resume to its end: the loader, the engine, the run on S3 and the signals, put together.

    claim the run -> restore the newest checkpoint -> for every step: load, step -> at every epoch: validate, commit

The loop looks at signals, the spot notice and the clock between steps only, so that what is committed is always a whole
step; while validating, between batches: the validation is then repeated after the resume.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wds_train.cache import BlockCache
from wds_train.checkpoint import Run
from wds_train.dataset import Dataset
from wds_train.devserver import home
from wds_train.engine import Trainer
from wds_train.errors import Interrupted, NotFinite, RunError, StoreError, UsageError, WdsTrainError
from wds_train.pipeline import Batch, EvalPlan, EvalTransform, Loader, Mixture, TrainPlan, TrainTransform, shares
from wds_train.recipe import Recipe
from wds_train.report import draw_curves
from wds_train.schedule import lr_share
from wds_train.spot import SpotWatch, StopRequest
from wds_train.state import RunManifest, name_of
from wds_train.store import open_store
from wds_train.tracker import Progress, Tracker, say

LOGS_PER_EPOCH = 4
LOG_STEPS = 50  # at most so many steps between two records; each makes the CPU wait for the GPU
GRACE_SECONDS = 90.0  # for the last commit: the least that supervisors and EC2 wait between asking and killing
ROLLBACKS = 2  # per run, after a loss that is not finite


@dataclass(frozen=True)
class TrainOptions:
    dataset: str
    run: str
    recipe: Recipe
    workers: int
    mix: tuple[tuple[str, float], ...] = ()
    """Other datasets, and the share of every batch that each gives."""
    cache_dir: Path | None = None
    cache_bytes: int = 0
    commit_minutes: float = 10.0
    max_uncommitted_minutes: float = 60.0
    keep_every: int = 0
    wait: bool = True
    deterministic: bool = False

    def __post_init__(self) -> None:
        name_of(self.run)
        if not 0 < self.commit_minutes < self.max_uncommitted_minutes:
            raise UsageError(
                f"--commit-minutes {self.commit_minutes:g} must be more than 0 and less than --max-uncommitted-minutes "
                f"{self.max_uncommitted_minutes:g}"
            )


def train(options: TrainOptions, stop: StopRequest) -> dict[str, float]:
    """Train, or go on with, `options.run`; the final metrics. Raises `Interrupted` once asked to stop, state committed."""
    if options.deterministic:
        _be_deterministic()
    dataset = Dataset.open(options.dataset)
    mixed = [_of_same_classes(Dataset.open(url), dataset) for url, _ in options.mix]
    cache = None
    if options.cache_dir:
        cache = BlockCache(options.cache_dir, options.cache_bytes, dataset.split("train"), dataset.fingerprint)
    stop.check()
    fresh, store = _fresh_run(options, dataset, mixed), open_store(options.run)
    run = Run.claim(store, fresh, say, wait=options.wait, pause=stop.sleep, keep_every=options.keep_every)
    if run.manifest.status == "done":
        say(f"run {options.run} is done already; to train again, choose another run: make train RUN=another")
        _close(run, run.manifest.result, options, None)
        return run.manifest.result
    try:
        return _Session(options, [dataset, *mixed], run, stop, cache).run_to_end()
    except NotFinite as error:
        raise _go_back(run, error, options.deterministic) from error
    except WdsTrainError as error:
        if not isinstance(error, Interrupted | StoreError):  # a store that fails takes no last word either
            _give_up(run, "failed")
        raise


def _be_deterministic() -> None:
    """Only algorithms that give the same bits each time; on GPUs slower, on CPUs no other than the usual ones."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's condition, read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _go_back(run: Run, error: NotFinite, deterministic: bool) -> WdsTrainError:
    """What to raise after a loss that is not finite, which was not committed. On a GPU the next attempt, from the newest
    checkpoint, may round otherwise and pass; where the same arithmetic would only fail again, it is not tried.
    """
    if not run.manifest.checkpoints or deterministic or not torch.cuda.is_available():
        _give_up(run, "failed")
        return error
    if run.manifest.rollbacks == ROLLBACKS:
        _give_up(run, "failed")
        return RunError(f"{error}; {ROLLBACKS} returns to a checkpoint did not help")
    done = run.manifest.rollbacks + 1
    run.end("interrupted", rollbacks=done)
    newest = run.manifest.checkpoints[-1].progress.step
    return Interrupted(f"{error}; the next start goes back to step {newest} (return {done} of {ROLLBACKS})")


def _give_up(run: Run, status: str) -> None:
    """Say in the manifest how it ended. If the store does not let us, the lease runs out by itself."""
    try:
        run.end(status)
    except (StoreError, Interrupted) as error:
        say(f"{run.store.url} could not be marked as {status}: {error}")


def _of_same_classes(other: Dataset, dataset: Dataset) -> Dataset:
    if other.manifest.classes != dataset.manifest.classes:
        raise UsageError(
            f"{other.store.url} cannot be mixed into {dataset.store.url}: its {len(other.manifest.classes)} classes are not "
            f"the same {len(dataset.manifest.classes)}, in the same order; convert it with the same class list"
        )
    return other


def _fresh_run(options: TrainOptions, dataset: Dataset, mixed: list[Dataset]) -> RunManifest:
    return RunManifest(
        run=name_of(options.run),
        recipe=options.recipe.to_dict(),
        dataset={
            "url": dataset.store.url,
            "fingerprint": dataset.fingerprint,
            "classes": len(dataset.manifest.classes),
            "mix": [
                {"fingerprint": other.fingerprint, "share": share}
                for other, (_, share) in zip(mixed, options.mix, strict=True)
            ],
        },
        wandb_id=secrets.token_hex(4),
    )


class _Session:
    """One process's work on a run, from its claim to its end or interruption."""

    def __init__(
        self,
        options: TrainOptions,
        datasets: list[Dataset],
        run: Run,
        stop: StopRequest,
        cache: BlockCache | None,
    ) -> None:
        recipe, dataset = options.recipe, datasets[0]
        self._options, self._run, self._stop = options, run, stop
        run.max_uncommitted = options.max_uncommitted_minutes * 60
        snapshot = run.restore(say)
        start = snapshot.progress.step if snapshot else 0
        val_split, data = dataset.split("val"), recipe.data
        sizes = shares(recipe.batch, [share for _, share in options.mix])
        steps = dataset.manifest.split("train").samples // sizes[0]
        self._total = recipe.schedule.epochs * steps
        self._val_samples = len(val_split)
        loaders = [
            _loader(options, each, size, range(start, self._total), cache if each is dataset else None)
            for each, size in zip(datasets, sizes, strict=True)
        ]
        self._loader = Mixture(loaders, recipe.seed) if len(loaders) > 1 else loaders[0]
        val_plan = EvalPlan(len(val_split), recipe.batch)
        self._val_loader = Loader(val_split, val_plan, EvalTransform(data.eval_size, data.eval_crop), options.workers)
        if start < self._total:
            self._loader.start()
        self._val_loader.start()
        run.start_renewing()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._trainer = Trainer(recipe, len(dataset.manifest.classes), steps, device)
        _introduce(options, dataset, steps, device)
        if snapshot:
            self._trainer.restore(snapshot)
            say(f"resuming at step {start} of {self._total} (epoch {start / steps:.2f})")

    def run_to_end(self) -> dict[str, float]:
        with SpotWatch() as self._spot, Tracker(self._run.manifest, home()) as self._tracker:
            self._progress = Progress(self._total, self._trainer.progress.step, self._options.recipe.batch)
            try:
                self._train()
            except _Stopped:
                self._interrupt()
            finally:
                self._progress.close()
            while not self._run.wait(0.2):
                if self._stopped_by():
                    self._interrupt()
            self._run.end("done")
            where = self._tracker.where
        _close(self._run, self._run.manifest.result, self._options, where)
        return self._run.manifest.result

    def _train(self) -> None:
        trainer, epoch_steps = self._trainer, self._trainer.steps_per_epoch
        self._saved = trainer.progress
        self._saved_at = time.monotonic()
        self._rebalance_said = False
        self._commit_timing: dict[str, float] = {}
        batches = self._timed(iter(self._loader))
        while trainer.progress.evaluated * epoch_steps < self._total:
            self._look_up()
            if time.monotonic() - self._saved_at >= self._options.commit_minutes * 60 and not self._run.busy:
                trainer.epoch_loss()
                self._commit({})
            if trainer.progress.step == (trainer.progress.evaluated + 1) * epoch_steps:
                self._end_epoch()
            else:
                self._step(*next(batches))

    def _look_up(self) -> None:
        """Raise what ends the training: `_Stopped` when asked to stop, and what `Run.check` raises."""
        self._run.check()
        if self._spot.rebalance and not self._rebalance_said:
            self._rebalance_said = True
            say(
                "EC2 recommends to move: this spot instance is at an elevated risk of being taken back; training goes on"
            )
        if self._stopped_by():
            raise _Stopped

    def _stopped_by(self) -> str | None:
        return "the spot notice" if self._spot.notice is not None else self._stop.signal

    def _timed(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
        """Each batch with the seconds that the training waited for it."""
        while True:
            start = time.perf_counter()
            batch = next(batches)
            yield batch, time.perf_counter() - start

    def _step(self, batch: Batch, waited: float) -> None:
        start = time.perf_counter()
        for lost in batch.lost:
            say(f"unreadable sample: {lost.shard}, key {lost.key}: {lost.cause}")
        loss = self._trainer.step(batch)
        done = self._trainer.progress.step
        shown = loss.item() if self._logs(done) else None
        if shown is not None:
            self._trainer.epoch_loss()
            spent = time.perf_counter() - start
            record = {"step": done, "epoch": done / self._trainer.steps_per_epoch, "train/loss": shown}
            record["train/lr"] = self._lr(done - 1)
            timing = {"time/img_s": len(batch.labels) / (waited + spent), "time/data_wait": waited / (waited + spent)}
            self._tracker.log(record, timing | self._drain_commit_timing())
        self._progress.step(done, shown)

    def _logs(self, step: int) -> bool:
        """A function of the step alone, so that a resumed run logs what the unbroken one does."""
        return step % min(LOG_STEPS, max(1, self._trainer.steps_per_epoch // LOGS_PER_EPOCH)) == 0

    def _lr(self, step: int) -> float:
        recipe = self._options.recipe
        return recipe.peak_lr * lr_share(recipe.schedule, step, self._trainer.steps_per_epoch)

    def _end_epoch(self) -> None:
        """Validate and commit."""
        trainer = self._trainer
        loss = trainer.epoch_loss()
        metrics = trainer.evaluate(self._looking_up(self._val_loader), self._val_samples)
        lost = trainer.progress.lost
        trainer.evaluated()
        epoch, epochs = trainer.progress.evaluated, self._options.recipe.schedule.epochs
        record = {
            "step": trainer.progress.step,
            "epoch": float(epoch),
            "epoch/loss": loss,
            "epoch/lost": lost,
        } | metrics
        self._tracker.log(record, {})
        say(
            f"epoch {epoch:3d}/{epochs}  loss {loss:.3f}  "
            f"top-1 {metrics['val/top1']:.2f} %  EMA {metrics['val/top1_ema']:.2f} %"
            + (f"  {lost} unreadable" if lost else "")
        )
        done = {"status": "done", "result": metrics | {"epoch/loss": loss}} if epoch == epochs else {}
        self._commit(metrics, **done)

    def _looking_up(self, batches: Loader) -> Iterator[Batch]:
        for batch in batches:
            self._look_up()
            yield batch

    def _commit(self, metrics: dict[str, float], **changes: Any) -> None:
        start = time.perf_counter()
        snapshot = self._trainer.snapshot()
        self._run.commit(snapshot, metrics, self._tracker.drain(), **changes)
        self._saved, self._saved_at = self._trainer.progress, time.monotonic()
        self._commit_timing["commit/stall_ms"] = (time.perf_counter() - start) * 1000

    def _drain_commit_timing(self) -> dict[str, float]:
        """What the newest commits cost: `stall_ms` the training's pause, `upload_s` the work in the background."""
        timing, self._commit_timing = self._commit_timing, {}
        if self._run.upload_s is not None:
            timing["commit/upload_s"], self._run.upload_s = self._run.upload_s, None
        return timing

    def _interrupt(self) -> None:
        """Commit, unless this very state is committed or on its way, and leave; unless it was the last that was missing."""
        end = min(time.monotonic() + GRACE_SECONDS, self._spot.notice or float("inf"))
        progress = self._trainer.progress
        if (progress.step, progress.evaluated) != (self._saved.step, self._saved.evaluated):
            self._trainer.epoch_loss()
            self._commit({}, status="interrupted")
        stopped = f"stopped by {self._stopped_by()} at step {progress.step} of {self._total}"
        if not self._run.wait(end - time.monotonic()):
            raise Interrupted(
                f"{stopped}, whose state could not be committed in time; the same command goes on from the newest "
                f"checkpoint of {self._run.store.url}"
            )
        self._run.end("interrupted")
        raise Interrupted(f"{stopped}, state committed to {self._run.store.url}; the same command goes on from there")


def _loader(options: TrainOptions, dataset: Dataset, size: int, steps: range, cache: BlockCache | None) -> Loader:
    """`size` samples of every batch from `dataset`, for `steps` at least."""
    recipe, data, split = options.recipe, options.recipe.data, dataset.split("train")
    per_epoch = max(1, len(split) // size)  # a split of less than a batch is TrainPlan's to refuse
    epochs = range(-(-steps.stop // per_epoch))
    plan = TrainPlan(split.shard_samples, dataset.fingerprint, recipe.seed, size, epochs, from_step=steps.start)
    transform = TrainTransform(recipe.seed, data.size, data.scale, data.ratio, data.flip)
    workers = options.workers and max(1, round(options.workers * size / recipe.batch))
    return Loader(split, plan, transform, workers, cache)


class _Stopped(Exception):
    """Asked to stop, between two steps or two batches of a validation."""


def _introduce(options: TrainOptions, dataset: Dataset, steps: int, device: torch.device) -> None:
    recipe, splits = options.recipe, dataset.manifest.splits
    say(
        f"dataset  {dataset.store.url}: {splits['train'].samples:,} train, {splits['val'].samples:,} val, "
        f"{len(dataset.manifest.classes)} classes"
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    say(
        f"run      {options.run}: recipe {recipe.name}, {recipe.model.name}, {recipe.schedule.epochs} epochs of "
        f"{steps} steps of {recipe.batch}, on {name}"
    )


def _close(run: Run, result: dict[str, float], options: TrainOptions, wandb_at: str | None) -> None:
    """Say how it went, where things are, and what to type next."""
    picture = _picture(run, options)
    say(f"top-1 {result['val/top1']:.2f} % raw, {result['val/top1_ema']:.2f} % EMA")
    say(f"state    {options.run}")
    say(f"curves   {picture}")
    if wandb_at:
        say(
            f"W&B      {wandb_at}"
            + ("" if wandb_at.startswith("http") else f" (offline; upload: wandb sync {wandb_at})")
        )
    say("next     make train RUN=second ARGS='--set seed=1', or your own data: make shards SOURCE=/path/to/images")


def _picture(run: Run, options: TrainOptions) -> Path:
    """Two runs of one name in different stores get different folders."""
    place = f"{run.manifest.run}-{hashlib.sha256(options.run.encode()).hexdigest()[:6]}"
    path = home() / "runs" / place / "curves.png"
    draw_curves(run.history(), f"{options.run}: {run.manifest.recipe['name']}", path)
    return Path(os.path.relpath(path))
