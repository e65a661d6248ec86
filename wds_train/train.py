"""A training from start or resume to its end: the loader, the engine, the run on S3 and the signals, put together.

    claim the run -> restore the newest checkpoint -> for every step: load, step -> at every epoch: validate, commit

The loop looks at the signals between steps only, so that what is committed is always a whole step.
"""

import hashlib
import os
import secrets
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from wds_train.cache import BlockCache
from wds_train.checkpoint import Run, Snapshot
from wds_train.dataset import Dataset
from wds_train.devserver import home
from wds_train.engine import Trainer
from wds_train.errors import Interrupted
from wds_train.pipeline import Batch, EvalPlan, EvalTransform, Loader, TrainPlan, TrainTransform
from wds_train.recipe import Recipe
from wds_train.report import draw_curves
from wds_train.schedule import lr_share
from wds_train.state import RunManifest
from wds_train.store import open_store
from wds_train.tracker import Progress, Tracker, say

LOGS_PER_EPOCH = 4
LOG_STEPS = 50  # at most so many steps between two records; each makes the CPU wait for the GPU


@dataclass(frozen=True)
class TrainOptions:
    dataset: str
    run: str
    recipe: Recipe
    workers: int
    cache_dir: Path | None = None
    cache_bytes: int = 0


class StopRequest:
    """Set by SIGTERM or SIGINT, and read between steps. A second SIGINT stops at once."""

    def __init__(self) -> None:
        self.signal: str | None = None
        signal.signal(signal.SIGTERM, self._set)
        signal.signal(signal.SIGINT, self._set)

    def _set(self, number: int, _: FrameType | None) -> None:
        if self.signal == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        say(f"{self.signal}: committing the state after this step; Ctrl-C again stops at once")


def train(options: TrainOptions) -> dict[str, float]:
    """Train, or go on with, `options.run`; the final metrics. Raises `Interrupted` after a signal, state committed."""
    stop = StopRequest()
    dataset = Dataset.open(options.dataset)
    cache = None
    if options.cache_dir:
        cache = BlockCache(options.cache_dir, options.cache_bytes, dataset.split("train"), dataset.fingerprint)
    fresh = _fresh_run(options, dataset)
    run = Run.claim(open_store(options.run), fresh, say)
    if run.manifest.status == "done":
        say(f"run {options.run} is done already; to train again, choose another run: make train RUN=another")
        _close(run, run.manifest.result, options, None)
        return run.manifest.result
    session = _Session(options, dataset, run, stop, cache)
    return session.run_to_end()


def _fresh_run(options: TrainOptions, dataset: Dataset) -> RunManifest:
    return RunManifest(
        run=options.run.rstrip("/").rsplit("/", 1)[-1],
        recipe=options.recipe.to_dict(),
        dataset={
            "url": dataset.store.url,
            "fingerprint": dataset.fingerprint,
            "classes": len(dataset.manifest.classes),
        },
        wandb_id=secrets.token_hex(4),
    )


class _Session:
    """One process's work on a run, from its claim to its end or interruption."""

    def __init__(
        self, options: TrainOptions, dataset: Dataset, run: Run, stop: StopRequest, cache: BlockCache | None
    ) -> None:
        recipe = options.recipe
        self._options, self._run, self._stop = options, run, stop
        snapshot = run.restore(say)
        start = snapshot.progress.step if snapshot else 0
        train_split, val_split = dataset.split("train"), dataset.split("val")
        plan = TrainPlan(
            train_split.shard_samples,
            dataset.fingerprint,
            recipe.seed,
            recipe.batch,
            range(recipe.schedule.epochs),
            from_step=start,
        )
        data = recipe.data
        transform = TrainTransform(recipe.seed, data.size, data.scale, data.ratio, data.flip)
        self._total = recipe.schedule.epochs * plan.steps_per_epoch
        self._val_samples = len(val_split)
        self._loader = Loader(train_split, plan, transform, options.workers, cache)
        val_plan = EvalPlan(len(val_split), recipe.batch)
        self._val_loader = Loader(val_split, val_plan, EvalTransform(data.eval_size, data.eval_crop), options.workers)
        if start < self._total:
            self._loader.start()
        self._val_loader.start()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._trainer = Trainer(recipe, len(dataset.manifest.classes), plan.steps_per_epoch, device)
        _introduce(options, dataset, plan, device)
        if snapshot:
            self._trainer.restore(snapshot)
            say(f"resuming at step {start} of {self._total} (epoch {start / plan.steps_per_epoch:.2f})")

    def run_to_end(self) -> dict[str, float]:
        trainer, epoch_steps = self._trainer, self._trainer.steps_per_epoch
        with Tracker(self._run.manifest, home()) as self._tracker:
            self._progress = Progress(self._total, trainer.progress.step, self._options.recipe.batch)
            self._metrics: dict[str, float] = {}
            batches = self._timed(iter(self._loader))
            try:
                while trainer.progress.evaluated * epoch_steps < self._total:
                    if self._stop.signal:
                        self._interrupt()
                    if trainer.progress.step == (trainer.progress.evaluated + 1) * epoch_steps:
                        self._end_epoch()
                    else:
                        self._step(*next(batches))
            finally:
                self._progress.close()
            self._run.wait()
            where = self._tracker.where
        _close(self._run, self._run.manifest.result, self._options, where)
        return self._run.manifest.result

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
            self._tracker.log(record, timing)
        self._progress.step(done, shown)

    def _logs(self, step: int) -> bool:
        """A function of the step alone, so that a resumed run logs what the unbroken one does."""
        return step % min(LOG_STEPS, max(1, self._trainer.steps_per_epoch // LOGS_PER_EPOCH)) == 0

    def _lr(self, step: int) -> float:
        recipe = self._options.recipe
        return recipe.optimizer.lr * lr_share(recipe.schedule, step, self._trainer.steps_per_epoch)

    def _end_epoch(self) -> None:
        """Validate and commit."""
        trainer = self._trainer
        loss = trainer.epoch_loss()
        metrics = trainer.evaluate(self._val_loader, self._val_samples)
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

    def _commit(self, metrics: dict[str, float], **changes: Any) -> Snapshot:
        snapshot = self._trainer.snapshot()
        self._run.commit(snapshot, metrics, self._tracker.drain(), **changes)
        return snapshot

    def _interrupt(self) -> None:
        """Commit, unless the newest commit holds this very state, and leave."""
        self._run.wait()
        committed = self._run.manifest.checkpoints
        progress = self._trainer.progress
        newest = committed[-1].progress if committed else None
        if newest is None or (newest.step, newest.evaluated) != (progress.step, progress.evaluated):
            self._trainer.epoch_loss()
            self._commit({}, status="interrupted")
            self._run.wait()
        raise Interrupted(
            f"stopped by {self._stop.signal} at step {progress.step} of {self._total}, state committed to {self._run.store.url}; "
            "the same command goes on from there"
        )


def _introduce(options: TrainOptions, dataset: Dataset, plan: TrainPlan, device: torch.device) -> None:
    recipe, splits = options.recipe, dataset.manifest.splits
    say(
        f"dataset  {dataset.store.url}: {splits['train'].samples:,} train, {splits['val'].samples:,} val, "
        f"{len(dataset.manifest.classes)} classes"
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    say(
        f"run      {options.run}: recipe {recipe.name}, {recipe.model.name}, {recipe.schedule.epochs} epochs of "
        f"{plan.steps_per_epoch} steps of {recipe.batch}, on {name}"
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
