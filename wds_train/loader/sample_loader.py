"""SampleLoader: samples beyond images, as the members of tars or what a function makes of them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from wds_train.dataset.reader import Dataset, SplitReader
from wds_train.errors import UsageError
from wds_train.loader.arguments import Address, Mix, place
from wds_train.loader.batch import Batch, Unreadable
from wds_train.loader.custom_transform import Function, ObjectTransform
from wds_train.loader.step_loader import StepLoader
from wds_train.rng import Ids


@dataclass(frozen=True)
class Samples:
    """The samples of a step, in the order of the global batch.

    Attributes:
        step: The step, counted over the whole training.
        epoch: Its epoch.
        keys: The samples' keys.
        labels: Classes, int64 [n].
        ids: Numbers of the samples in the split, int64 [n].
        positions: The places of the samples in the epoch's order, int64 [n].
        fields: What the transform returned for each sample. Without one, the bytes of its members
            by extension. None for an unreadable sample.
        unreadable: The samples that could not be used.
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
    """Samples beyond images for a training, in the order and with the state of `TrainLoader`.

    A sample is a dictionary of its members' bytes by extension, as {"jpg": b"...", "txt": b"..."},
    or what `transform` makes of it.

    Args:
        dataset: An open `Dataset`, or its address, as for `TrainLoader`.
        batch: Samples of a step, over all ranks.
        epochs: Passes over the dataset.
        fields: The extensions of the members that are wanted. A sample that lacks one is
            unreadable. Default: all members that a sample has.
        transform: A function of yours: `transform(fields, key, rng)` gets the dictionary, and
            returns anything that a worker can send: arrays, numbers, texts, or lists and
            dictionaries of them.
        seed: Seed of the order, and of the `rng` that `transform` gets.
        from_step: The step to begin with.
        rank: This process's rank. Default: as torch.distributed says.
        world: The number of ranks. Give both `rank` and `world`, or neither.
        workers: Processes that read and transform; 0 does so in this one. Default: the cores less
            one.
        mix: Other datasets with their shares of each batch: `[("s3://bucket/more", 0.25)]`.
        cache: A local folder that keeps blocks of the dataset for later epochs.
        cache_gb: The most that the cache may hold, GB.
        split: The split to read.
        max_bad: The share of an epoch's samples that may be unreadable before `DataError` is
            raised. None: the caller looks at `samples.unreadable` itself.
        per_epoch: End each iteration at the end of an epoch.

    Raises:
        UsageError: An argument cannot work; the message says which, and what would.
        DataError: While iterating: more samples than `max_bad` allows could not be read.

    Example:
        >>> def caption(fields, key, rng):
        ...     return fields["txt"].decode()
        >>> loader = SampleLoader(  # doctest: +SKIP
        ...     "captions", 256, epochs=10, fields=("jpg", "txt"), transform=caption
        ... )
        >>> for samples in loader:  # doctest: +SKIP
        ...     print(samples.step, samples.keys[0], samples.fields[0])
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
            ranks=place(rank, world),
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
        self._fields: list[str] | None = None
        if fields is not None:
            self._fields = [name.removeprefix(".").lower() for name in fields]
        self._function = transform

    def _transform(self, split: SplitReader) -> ObjectTransform:
        return ObjectTransform(self._function, split, self.seed, self._fields)

    def _finish(self, batch: Batch) -> Samples:
        return Samples(
            step=batch.step,
            epoch=batch.epoch,
            keys=[key for key, _ in batch.items],
            labels=batch.labels,
            ids=batch.ids,
            positions=batch.positions,
            fields=[value for _, value in batch.items],
            unreadable=batch.unreadable,
        )
