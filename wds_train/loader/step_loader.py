"""The steps of a training, for a loop of one's own: what TrainLoader and SampleLoader have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from wds_train.dataset.reader import Dataset, SplitReader
from wds_train.errors import UsageError
from wds_train.loader.arguments import Address, Mix, opened_all, place, step_of, whole
from wds_train.loader.batch import Batch
from wds_train.loader.cache import BlockCache
from wds_train.loader.mixture import Mixture
from wds_train.loader.pipeline import Loader, on_device
from wds_train.loader.plan import TrainPlan, plan_of, shares
from wds_train.loader.transform import Transform
from wds_train.loader.unreadable import Bound
from wds_train.loader.workers import default_workers

Made = TypeVar("Made")


class Steps(ABC, Generic[Made]):
    """The steps of `epochs` epochs, of `batch` samples over all ranks each. `step`, how many of them were handed out, is the
    whole state; workers read ahead of it, and go on where a loop was left.
    """

    def __init__(
        self,
        dataset: Dataset | Address,
        batch: int,
        epochs: int,
        *,
        seed: int,
        from_step: int,
        rank: int | None,
        world: int | None,
        workers: int | None,
        device: torch.device,
        mix: Mix,
        cache: Address | None,
        cache_gb: float,
        split: str,
        max_bad: float,
        per_epoch: bool,
    ) -> None:
        self.batch, self.seed = whole("batch", batch, 1), whole("seed", seed, 0)
        self.split, self.device = split, device
        self.rank, self.world = place(rank, world)
        self.workers = default_workers() if workers is None else whole("workers", workers, 0)
        self.datasets, weights = opened_all(dataset, mix)
        self.shares = shares(self.batch, weights)
        self._cache, self._cache_bytes, self._per_epoch = cache, int(cache_gb * 1e9), per_epoch
        plans = [self._plan(each, share, range(1)) for each, share in zip(self.datasets, self.shares, strict=True)]
        self.steps_per_epoch = plans[0].steps_per_epoch
        self.steps = whole("epochs", epochs, 1) * self.steps_per_epoch
        self.step = step_of("from_step", from_step, self.steps)
        self._bound = Bound(max_bad, self.steps_per_epoch * self.batch)
        self._source: Iterator[Batch] | None = None
        self._next = self.step

    @abstractmethod
    def _transform(self, split: SplitReader) -> Transform:
        """What the samples of `split` become."""

    @abstractmethod
    def _finished(self, batch: Batch) -> Made:
        """What is handed out of `batch`."""

    @property
    def step(self) -> int:
        """How many batches were handed out. Where it is set, the next iteration begins."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step_of("step", step, self.steps)

    def __len__(self) -> int:
        """The steps still to come: of all, or with `per_epoch` of this epoch."""
        return self._end() - self.step

    def __iter__(self) -> Iterator[Made]:
        end = self._end()
        while self.step < end:
            self.start()
            source, self._source = self._source, None  # an error ends it
            assert source is not None
            batch = next(source)
            self._source, self._next = source, batch.step + 1
            self._bound(batch.epoch, batch.unreadable)
            self.step = self._next
            yield self._finished(batch)
        if self.step >= self.steps:
            self._source = None  # and its workers end

    def start(self) -> None:
        """Begin to read now, rather than with the first batch: while the model is made, and before this process has threads
        or uses a GPU, which forked workers are best without.
        """
        if self.step < self.steps and (self._source is None or self._next != self.step):
            self._source, self._next = None, self.step  # whose workers make room for the new ones
            self._source = self._begun()

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """The state after `step` steps, by default those handed out, and what it is a state of; plain values all."""
        return {"step": self.step if step is None else step_of("step", step, self.steps), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, by any number of ranks and workers; `UsageError` where it is of something else."""
        if not isinstance(state, dict):
            raise UsageError(
                f"the state is {state!r:.60}, nothing that state_dict() gave; without one, make a new loader"
            )
        for name, ours in self._identity().items():
            if name not in state:
                raise UsageError(
                    f"the state has no {name!r}, so that it is none of this loader's; give from_step= alone"
                )
            if state[name] != ours:
                raise UsageError(
                    f"the state is of {name} {state[name]!r}, this loader is of {ours!r}: the samples would be others; make "
                    f"the loader with that {name}"
                )
        self.step = step_of("the state's step", state.get("step"), self.steps)

    def _identity(self) -> dict[str, Any]:
        """What decides the order of samples."""
        others = [[other.fingerprint, share] for other, share in zip(self.datasets[1:], self.shares[1:], strict=True)]
        dataset = self.datasets[0].fingerprint
        return {"dataset": dataset, "split": self.split, "batch": self.batch, "seed": self.seed, "mix": others}

    def _end(self) -> int:
        epoch_end = (self.step // self.steps_per_epoch + 1) * self.steps_per_epoch
        return min(self.steps, epoch_end) if self._per_epoch else self.steps

    def _begun(self) -> Iterator[Batch]:
        self._bound.reset()
        pinned, loaders = self.device.type == "cuda", []
        for number, (dataset, share) in enumerate(zip(self.datasets, self.shares, strict=True)):
            split, plan = dataset.split(self.split), self._plan(dataset, share, range(self.step, self.steps))
            workers = self.workers and max(1, round(self.workers * share / self.batch))
            cache = self._cache_of(split, dataset) if number == 0 else None
            alone = pinned and len(self.datasets) == 1
            loaders.append(Loader(split, plan, self._transform(split), workers, cache, pinned=alone))
        joined = Mixture(loaders, self.seed, pinned=pinned) if len(loaders) > 1 else loaders[0]
        joined.start()
        return on_device(joined, self.device)

    def _plan(self, dataset: Dataset, share: int, steps: range) -> TrainPlan:
        return plan_of(dataset, self.split, self.seed, share, steps, rank=self.rank, world=self.world)

    def _cache_of(self, split: SplitReader, dataset: Dataset) -> BlockCache | None:
        return BlockCache(Path(self._cache), self._cache_bytes, split, dataset.fingerprint) if self._cache else None
