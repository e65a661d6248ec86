"""Decoding into shared memory."""

import math
import mmap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wds_train.data.batch import Unreadable
from wds_train.data.dataset import SplitReader
from wds_train.data.plan import Part
from wds_train.errors import DataError, UsageError
from wds_train.transforms.sample import Form, Place, Transform, square

PREFETCHED_PARTS = 4  # per worker, in shared memory: evens out steps whose images are slow to decode
SLOTS = PREFETCHED_PARTS + 1
NOTHING = square(0)


class Decoded(NamedTuple):
    """A part whose arrays of `form` lie in a slot of the `Slots`. `labels` int64 [n]. Where samples become objects, `items`
    has them with their keys.
    """

    part: Part
    labels: NDArray[np.int64]
    unreadable: list[Unreadable]
    form: Form
    worker: int
    slot: int
    items: list[tuple[str, Any]]


class Slots:
    """Shared memory for what samples become, pixels mostly: SLOTS of the largest part's size for every worker, used in turn.

    DataLoader could carry tensors itself, in a new piece of shared memory for each, whose pages both processes would
    have to fault in again and again. Slots need no lock: DataLoader lets a worker run PREFETCHED_PARTS ahead of the
    part that was last taken, which is copied before the next is asked for, so that one slot more is always free.
    """

    def __init__(self, workers: int, part_bytes: int) -> None:
        # Shared with the workers by fork, and not through /dev/shm, of which a container often has 64 MB.
        shape = (max(1, workers), SLOTS, part_bytes)
        try:
            memory = mmap.mmap(-1, max(1, math.prod(shape)))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"the loader cannot have the {math.prod(shape) / 1e9:,.1f} GB of memory that its batches take "
                f"({getattr(error, 'strerror', None) or error}); use smaller images or a smaller batch"
            ) from error
        self._bytes: NDArray[np.uint8] = np.ndarray(shape, np.uint8, memory)

    def __call__(self, worker: int, slot: int, samples: int, form: Form) -> NDArray[Any]:
        """The slot as [samples, *form.shape]."""
        return np.ndarray((samples, *form.shape), form.dtype, self._bytes[worker, slot])


class Decoder:
    """Decodes parts into slots. With no transform, they stay empty: the order alone is wanted."""

    def __init__(self, split: SplitReader, transform: Transform | None, slots: Slots) -> None:
        self._split = split
        self._transform = transform
        self._slots = slots

    def __call__(self, parts: Iterable[Part], worker: int) -> Iterator[Decoded]:
        for number, part in enumerate(parts):
            yield self._decode(part, worker, number % SLOTS)

    def _decode(self, part: Part, worker: int, slot: int) -> Decoded:
        form = self._transform.form(part.step) if self._transform else NOTHING
        objects = np.empty((len(part.ids), *form.shape), object) if form.holds_objects else None
        made, unreadable = self._slots(worker, slot, len(part.ids), form) if objects is None else objects, []
        for place, (sample, record) in enumerate(zip(part.ids.tolist(), part.records, strict=True)):
            try:
                self._fill(made[place, ...], part.epoch, int(part.positions[place]), sample, record)
            except DataError as error:
                made[place] = form.blank
                key = self._split.index.key_of(sample)
                unreadable.append(Unreadable(sample, self._split.shard_of(sample), key, str(error)))
        labels = self._split.index.label[part.ids].astype(np.int64)
        part = part._replace(records=[])
        if objects is None:
            return Decoded(part, labels, unreadable, form, worker, slot, [])
        keys = map(self._split.index.key_of, part.ids.tolist())
        return Decoded(part, labels, unreadable, NOTHING, worker, slot, [*zip(keys, objects[:, 0], strict=True)])

    def _fill(self, out: NDArray[Any], epoch: int, position: int, sample: int, record: memoryview | DataError) -> None:
        if isinstance(record, DataError):
            raise record
        if self._transform is not None:
            index = self._split.index
            size = int(index.width[sample]), int(index.height[sample])
            self._transform.decode(record, Place(sample, size, epoch, position), out)
