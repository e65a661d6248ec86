"""SampleLoader: samples beyond images, as the members of tars or what a function makes of them.

What it shares with `TrainLoader` is in `step_loader.py`.
"""

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

    A sample is a dictionary of its members' bytes by extension, such as
    {"jpg": b"...", "txt": b"..."}, or what `transform` makes of it. A member's extension is the
    part of its name after the sample's key.

    Args:
        dataset: An open `Dataset`, or its address: `s3://BUCKET/PREFIX`, a path like `./data`, or a
            name below `$WDS_BUCKET/datasets`.
        batch: Samples of a step, over all ranks. Its largest power of two, up to 64, must be
            divisible by the number of ranks: 256 can be shared by 1, 2, 4, ... 64 ranks.
        epochs: Passes over the dataset.
        fields: The extensions of the members that are wanted. A sample that lacks one is
            unreadable. Default: all members that a sample has.
        transform: A function that makes the sample. `transform(fields, key, rng)` gets the
            dictionary, the sample's key, and a `numpy.random.Generator` that is the same whenever
            the sample is made. It returns anything that a worker can send: arrays of NumPy,
            numbers, texts, or lists and dictionaries of them. It must draw from `rng` alone, or
            within `with keyed(rng):`. If it raises `DataError`, the sample counts as unreadable.
        seed: Seed of the order, and of the `rng` that `transform` gets.
        from_step: The step to begin with, counted over all epochs.
        rank: This process's rank. Default: as torch.distributed says if it is initialised, or 0.
        world: The number of ranks. Give both `rank` and `world`, or neither.
        workers: Processes that read and transform for this rank; 0 does so in this process.
            Default: the cores that this rank may use less one, from 1 to 16.
        mix: Other datasets of the same classes with their shares of each batch:
            `[("s3://bucket/more", 0.25)]`. `dataset` gives the rest, and counts the epochs.
        cache: A folder on a local disk that keeps blocks of `dataset`, so that later epochs do not
            read them again. Default: no cache.
        cache_gb: The most that the cache may hold, in GB (1e9 bytes).
        split: The split to read.
        max_bad: The share of an epoch's samples, 0 to 1, that may be unreadable before `DataError`
            is raised. Each rank counts its own. None: the caller looks at `samples.unreadable`.
        per_epoch: End each iteration at the end of an epoch; the next one goes on with the next
            epoch. By default, one iteration has all epochs.

    Attributes:
        step: The number of batches that were handed out. Inside the loop it includes the current
            batch. Set it to go on elsewhere.
        steps: The steps of all epochs.
        steps_per_epoch: The steps of one epoch.

    Yields:
        `Samples` objects, of `batch / world` samples each.

    Raises:
        UsageError: An argument cannot work; the message says which, and what would.
        NotFound: There is no dataset at the address.
        DataError: While iterating: more samples than `max_bad` allows could not be read.
        WorkerDied: While iterating: a worker was killed, as a rule for want of memory.

    Example:
        >>> from wds_train import SampleLoader
        >>> def read_caption(fields, key, rng):
        ...     return fields["txt"].decode()
        >>> loader = SampleLoader(
        ...     "./captions-dataset", 8, epochs=1, fields=("png", "txt"), transform=read_caption
        ... )
        >>> captions = {}
        >>> for samples in loader:
        ...     for key, caption in zip(samples.keys, samples.fields):
        ...         captions[key] = caption
        >>> captions["0007"]
        'number 7'
    """

    def __init__(  # noqa: PLR0913
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
        # Extensions are kept as the index of a tar has them: in small letters, without a dot.
        self._fields: list[str] | None = None
        if fields is not None:
            self._fields = [name.removeprefix(".").lower() for name in fields]
        self._function = transform

    def _transform(self, split: SplitReader) -> ObjectTransform:
        return ObjectTransform(self._function, split, self.seed, self._fields)

    def _finish(self, batch: Batch) -> Samples:
        # A worker sends each sample with its key.
        keys = []
        fields = []
        for key, value in batch.items:
            keys.append(key)
            fields.append(value)
        return Samples(
            step=batch.step,
            epoch=batch.epoch,
            keys=keys,
            labels=batch.labels,
            ids=batch.ids,
            positions=batch.positions,
            fields=fields,
            unreadable=batch.unreadable,
        )
