"""The steps of a training, which TrainLoader and SampleLoader have in common.

A loader is one integer, the step, and a `Pipeline` (`pipeline.py`) that reads ahead of it, or a
`Mixture` (`mixture.py`) of several.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from wds_train.dataset.reader import Dataset, SplitReader
from wds_train.errors import UsageError
from wds_train.loader.arguments import Address, Mix, count_workers, open_mixture, step_of, whole
from wds_train.loader.batch import Batch
from wds_train.loader.cache import BlockCache, make_cache_folder
from wds_train.loader.mixture import Mixture
from wds_train.loader.pipeline import Pipeline, copy_to_device
from wds_train.loader.plan import TrainPlan, plan_training, split_batch
from wds_train.loader.transform import Transform
from wds_train.loader.unreadable import UnreadableCounter, UnreadableLimit

Item = TypeVar("Item")


class StepLoader(ABC, Generic[Item]):
    """The steps of some epochs, each with a batch.

    `step`, the number of batches that were handed out, is the whole state. Workers read ahead of
    it, and go on where a loop was left.

    The arguments are those of `TrainLoader`. `ranks` is this process's rank, and their number.
    """

    def __init__(  # noqa: PLR0913
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
        self.workers = count_workers(workers)
        self.datasets, weights = open_mixture(dataset, mix)
        self.shares = split_batch(self.batch, weights, self.repeats)
        self._cache_bytes = int(cache_gb * 1e9)
        self._per_epoch = per_epoch

        # Plans refuse what cannot work, such as a batch that the ranks cannot share.
        for each, share in zip(self.datasets, self.shares, strict=True):
            _plan(self, each, share, range(1))
        self._cache: Path | None = None
        if cache:
            self._cache = Path(cache)
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
        """Return the transform that the workers apply to the samples of a split."""

    @abstractmethod
    def _finish(self, batch: Batch) -> Item:
        """Return the object that the loader yields for a batch."""

    @property
    def step(self) -> int:
        """The number of batches that were handed out, the current one included.

        Set it to go on elsewhere: no step is read only to be thrown away.
        """
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step_of("step", step, self.steps)

    @property
    def fallbacks(self) -> int:
        """The ranges that took a second request, of this process and its workers."""
        if self._pipeline is None:
            return 0
        return self._pipeline.fallbacks

    def __len__(self) -> int:
        """Return the steps still to come: of all, or with `per_epoch` of this epoch."""
        return self._end() - self.step

    def __iter__(self) -> Iterator[Item]:
        end = self._end()
        while self.step < end:
            self.start()
            # An error ends the workers: they are put back only after a batch has come.
            batches = self._batches
            self._batches = None
            assert batches is not None
            batch = next(batches)
            self._batches = batches
            self._next = batch.step + 1
            if self._unreadable:
                self._unreadable.add(batch.epoch, batch.unreadable)
            # Before the batch is handed out: the state of a loop that ends in it includes it.
            self.step = self._next
            yield self._finish(batch)
        if self.step >= self.steps:
            self._batches = None  # which ends the workers

    def start(self) -> None:
        """Begin to read now, rather than with the first batch. It may be called again.

        Call it before the model is made, and before this process has threads or uses a GPU: workers
        are forked, and a forked child may survive neither.
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
        """Return the state of the loader, as plain values that JSON can hold.

        Save it with the weights, after the optimizer's step: a loop that is killed then goes on
        with the next batch, and sees none twice. Every rank has the same state.

        Args:
            step: The steps that were trained. Default: the batches that were handed out. If a
                wrapper reads ahead, as Accelerate's `prepare` does, give `batch.step + 1`.

        Returns:
            `step`, and what it is a step of: the dataset's fingerprint, split, batch, seed and
            mixture.

        Raises:
            UsageError: There is no such step.
        """
        after = self.step
        if step is not None:
            after = step_of("step", step, self.steps)
        return {"step": after, **_identify(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken.

        The number of ranks and workers, `epochs`, and transforms may differ.

        Args:
            state: What `state_dict` returned.

        Raises:
            UsageError: The state belongs to another dataset, batch, seed or mixture.
        """
        _check_state(state, _identify(self))
        self.step = step_of("the state's step", state.get("step"), self.steps)

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
            # Each dataset has its share of the workers, and at least one if there are any.
            workers = self.workers and max(1, round(self.workers * share / self.batch))
            pipeline = Pipeline(
                split,
                _plan(self, dataset, share, range(self.step, self.steps)),
                self._transform(split),
                workers,
                cache,
                pinned=pinned and not mixed,  # a mixture copies into pinned memory itself
            )
            pipelines.append(pipeline)

        self._pipeline = pipelines[0]
        if mixed:
            self._pipeline = Mixture(pipelines, self.seed, pinned=pinned)
        self._pipeline.start()
        return copy_to_device(self._pipeline, self.device)


def _plan(loader: StepLoader[Any], dataset: Dataset, share: int, steps: range) -> TrainPlan:
    """Return the read plan for one dataset of a loader.

    Args:
        loader: The loader.
        dataset: One of its datasets.
        share: Images that the dataset gives to each batch.
        steps: The steps to read.
    """
    return plan_training(
        dataset,
        loader.split,
        loader.seed,
        share,
        steps,
        rank=loader.rank,
        world=loader.world,
        repeats=loader.repeats,
    )


def _identify(loader: StepLoader[Any]) -> dict[str, Any]:
    """Return all that decides a loader's order of samples, as plain values."""
    others = []
    for other, share in zip(loader.datasets[1:], loader.shares[1:], strict=True):
        others.append([other.fingerprint, share])
    identity = {
        "dataset": loader.datasets[0].fingerprint,
        "split": loader.split,
        "batch": loader.batch,
        "seed": loader.seed,
        "mix": others,
    }
    # States of older versions do not have it, and all of them were without repeats.
    if loader.repeats > 1:
        identity["repeats"] = loader.repeats
    return identity


def _check_state(state: Any, identity: dict[str, Any]) -> None:
    """Raise `UsageError` if `state` is not of a loader with this `identity`."""
    if not isinstance(state, dict):
        raise UsageError(
            f"the state is {state!r:.60}, nothing that state_dict() gave; "
            "without one, make a new loader"
        )
    # A state may name more: `step`, and what newer versions add.
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
