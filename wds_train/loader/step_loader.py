"""The steps of a training: what TrainLoader and SampleLoader have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from wds_train.dataset.reader import Dataset, SplitReader
from wds_train.errors import UsageError
from wds_train.loader.arguments import Address, Mix, open_mixture, step_of, whole
from wds_train.loader.batch import Batch
from wds_train.loader.cache import BlockCache, make_cache_folder
from wds_train.loader.mixture import Mixture
from wds_train.loader.pipeline import Pipeline, copy_to_device
from wds_train.loader.plan import TrainPlan, plan_training, split_batch
from wds_train.loader.transform import Transform
from wds_train.loader.unreadable import UnreadableCounter, UnreadableLimit
from wds_train.loader.workers import default_workers

Item = TypeVar("Item")


class StepLoader(ABC, Generic[Item]):
    """The steps of `epochs` epochs, of `batch` samples over all ranks each.

    `step`, the number of batches that were handed out, is the whole state. Workers read ahead of
    it, and go on where a loop was left.
    """

    def __init__(
        self,
        dataset: Dataset | Address,
        batch: int,
        epochs: int,
        *,
        seed: int,
        from_step: int,
        ranks: tuple[int, int],
        workers: int | None,
        device: torch.device,
        mix: Mix,
        cache: Address | None,
        cache_gb: float,
        split: str,
        max_bad: float | None,
        per_epoch: bool,
        repeats: int = 1,
    ) -> None:
        self.batch = whole("batch", batch, 1)
        self.seed = whole("seed", seed, 0)
        self.epochs = whole("epochs", epochs, 1)
        self.repeats = whole("repeats", repeats, 1)
        self.split = split
        self.device = device
        self.rank, self.world = ranks
        self.workers = default_workers() if workers is None else whole("workers", workers, 0)
        self.datasets, weights = open_mixture(dataset, mix)
        self.shares = split_batch(self.batch, weights, self.repeats)
        self._cache = Path(cache) if cache else None
        self._cache_bytes = int(cache_gb * 1e9)
        self._per_epoch = per_epoch

        # Plans refuse what cannot work, such as a batch that the ranks cannot share.
        for each, share in zip(self.datasets, self.shares, strict=True):
            self._plan(each, share, range(1))

        if self._cache:
            make_cache_folder(self._cache, self.datasets[0], split)
        samples = self.datasets[0].manifest.split(split).samples
        self.steps_per_epoch = samples // self.shares[0]
        self.steps = self.epochs * self.steps_per_epoch
        self.step = step_of("from_step", from_step, self.steps)

        self._unreadable = None
        if max_bad is not None:
            limit = UnreadableLimit(max_bad, self.steps_per_epoch * self.batch)
            self._unreadable = UnreadableCounter(limit)
        self._pipeline: Pipeline | Mixture | None = None
        self._batches: Iterator[Batch] | None = None
        self._next = self.step

    @abstractmethod
    def _transform(self, split: SplitReader) -> Transform:
        """Return what the workers make of the samples of `split`."""

    @abstractmethod
    def _finish(self, batch: Batch) -> Item:
        """Return what is handed out for `batch`."""

    @property
    def step(self) -> int:
        """The number of batches that were handed out. Set it to continue elsewhere."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step_of("step", step, self.steps)

    @property
    def fallbacks(self) -> int:
        """The ranges that took a second request, of this process and its workers."""
        return self._pipeline.fallbacks if self._pipeline else 0

    def __len__(self) -> int:
        """The steps still to come: of all, or with `per_epoch` of this epoch."""
        return self._end() - self.step

    def __iter__(self) -> Iterator[Item]:
        end = self._end()
        while self.step < end:
            self.start()
            # An error ends the workers: they are put back only after a batch has come.
            batches, self._batches = self._batches, None
            assert batches is not None
            batch = next(batches)
            self._batches = batches
            self._next = batch.step + 1
            if self._unreadable:
                self._unreadable.add(batch.epoch, batch.unreadable)
            self.step = self._next
            yield self._finish(batch)
        if self.step >= self.steps:
            self._batches = None  # which ends the workers

    def start(self) -> None:
        """Begin to read now, rather than with the first batch.

        Call it before the model is made, and before this process has threads or uses a GPU: workers
        are forked, and a forked child survives neither.
        """
        if self.step >= self.steps:
            return
        if self._batches is None or self._next != self.step:
            self._batches = None  # the old workers make room for the new ones
            self._next = self.step
            self._batches = self._begin()

    def check_workers(self) -> None:
        """Raise `WorkerDied` if a worker has died."""
        if self._pipeline:
            self._pipeline.check_workers()

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return the state after `step` steps, by default those handed out, as plain values."""
        after = self.step if step is None else step_of("step", step, self.steps)
        return {"step": after, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with any number of ranks and workers.

        Raises:
            UsageError: The state belongs to another dataset, batch, seed or mixture.
        """
        _check_state(state, self._identity())
        self.step = step_of("the state's step", state.get("step"), self.steps)

    def _identity(self) -> dict[str, Any]:
        """Return what decides the order of samples."""
        others = [
            [other.fingerprint, share]
            for other, share in zip(self.datasets[1:], self.shares[1:], strict=True)
        ]
        identity = {
            "dataset": self.datasets[0].fingerprint,
            "split": self.split,
            "batch": self.batch,
            "seed": self.seed,
            "mix": others,
        }
        # States of older versions have no word of repeats, and none of them had any.
        return identity | ({"repeats": self.repeats} if self.repeats > 1 else {})

    def _end(self) -> int:
        if not self._per_epoch:
            return self.steps
        epoch_end = (self.step // self.steps_per_epoch + 1) * self.steps_per_epoch
        return min(self.steps, epoch_end)

    def _begin(self) -> Iterator[Batch]:
        """Fork workers that read from `step` on, and return the batches on the device."""
        if self._unreadable:
            self._unreadable.reset()
        pinned = self.device.type == "cuda"
        mixed = len(self.datasets) > 1
        pipelines = []
        for number, (dataset, share) in enumerate(zip(self.datasets, self.shares, strict=True)):
            split = dataset.split(self.split)
            cache = None
            if self._cache and number == 0:
                cache = BlockCache(self._cache, self._cache_bytes, split, dataset)
            pipelines.append(
                Pipeline(
                    split,
                    self._plan(dataset, share, range(self.step, self.steps)),
                    self._transform(split),
                    # Each dataset has its share of the workers, and at least one if there are any.
                    self.workers and max(1, round(self.workers * share / self.batch)),
                    cache,
                    pinned=pinned and not mixed,  # a mixture copies into pinned memory itself
                )
            )
        self._pipeline = Mixture(pipelines, self.seed, pinned=pinned) if mixed else pipelines[0]
        self._pipeline.start()
        return copy_to_device(self._pipeline, self.device)

    def _plan(self, dataset: Dataset, share: int, steps: range) -> TrainPlan:
        return plan_training(
            dataset,
            self.split,
            self.seed,
            share,
            steps,
            rank=self.rank,
            world=self.world,
            repeats=self.repeats,
        )


def _check_state(state: Any, identity: dict[str, Any]) -> None:
    """Raise `UsageError` if `state` is not of a loader with this `identity`."""
    if not isinstance(state, dict):
        raise UsageError(
            f"the state is {state!r:.60}, nothing that state_dict() gave; "
            "without one, make a new loader"
        )
    for name, ours in identity.items():
        if name not in state:
            raise UsageError(
                f"the state has no {name!r}, so that it is none of this loader's; "
                "give from_step= alone"
            )
        if state[name] != ours:
            raise UsageError(
                f"the state is of {name} {state[name]!r}, this loader is of {ours!r}: the samples "
                f"would be others; make the loader with that {name}"
            )
