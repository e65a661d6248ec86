"""Samples beyond images: the members of tars, or what a function makes of them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from wds_train.dataset.reader import Dataset, SplitReader
from wds_train.errors import UsageError
from wds_train.loader.arguments import Address, Mix
from wds_train.loader.batch import Batch, Unreadable
from wds_train.loader.custom_transform import Function, OwnObjects
from wds_train.loader.step_loader import StepLoader
from wds_train.rng import Ids


@dataclass(frozen=True)
class Samples:
    """A step's samples, in global-batch order. `fields` is what the transform returned for each, or its members' bytes by
    extension, and None for one that could not be used, which `unreadable` names. `labels` int64 [n].
    """

    step: int
    epoch: int
    keys: list[str]
    labels: torch.Tensor
    ids: Ids
    positions: Ids
    fields: list[Any]
    unreadable: list[Unreadable]


class SampleLoader(StepLoader[Samples]):
    """Samples of a training, as dictionaries of their members' bytes by extension, or as `transform` makes them: in the order
    of `TrainLoader`, with its state.
    """

    def __init__(
        self,
        dataset: Dataset | Address,
        batch: int,
        *,
        epochs: int,
        fields: Collection[str] | None = None,
        transform: Function | None = None,
        seed: int = 0,
        from_step: int = 0,
        rank: int | None = None,
        world: int | None = None,
        workers: int | None = None,
        mix: Mix = (),
        cache: Address | None = None,
        cache_gb: float = 200,
        split: str = "train",
        max_bad: float | None = 0.001,
        per_epoch: bool = False,
    ) -> None:
        super().__init__(
            dataset,
            batch,
            epochs,
            seed=seed,
            from_step=from_step,
            rank=rank,
            world=world,
            workers=workers,
            device=torch.device("cpu"),
            mix=mix,
            cache=cache,
            cache_gb=cache_gb,
            split=split,
            max_bad=max_bad,
            per_epoch=per_epoch,
        )
        if isinstance(fields, str):
            raise UsageError(f"fields = {fields!r} is one text; write fields=({fields!r},)")
        self._fields = None if fields is None else [name.removeprefix(".").lower() for name in fields]
        self._function = transform

    def _transform(self, split: SplitReader) -> OwnObjects:
        return OwnObjects(self._function, split, self.seed, self._fields)

    def _finish(self, batch: Batch) -> Samples:
        keys, fields = [key for key, _ in batch.items], [value for _, value in batch.items]
        return Samples(
            batch.step, batch.epoch, keys, batch.labels, batch.ids, batch.positions, fields, batch.unreadable
        )
