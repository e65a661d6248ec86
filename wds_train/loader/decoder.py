"""Decoding into shared memory."""

import math
import mmap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wds_train.dataset.reader import SplitReader
from wds_train.errors import DataError, UsageError
from wds_train.loader.batch import Unreadable
from wds_train.loader.plan import Part
from wds_train.loader.transform import Form, Place, Transform, square

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


class OrderAlone:
    """The `Transform` of who wants to know which samples come, and nothing of them."""

    largest = NOTHING

    def form(self, step: int) -> Form:
        return NOTHING

    def draw(self, place: Place) -> None:
        """Nothing."""

    def decode(self, data: memoryview, place: Place, drawn: None, out: NDArray[Any]) -> None:
        """Leave `out` empty."""


class Decoder:
    """Decodes parts into slots."""

    def __init__(self, split: SplitReader, transform: Transform, slots: Slots) -> None:
        self._split = split
        self._transform = transform
        self._slots = slots

    def __call__(self, parts: Iterable[Part], worker: int) -> Iterator[Decoded]:
        for number, part in enumerate(parts):
            yield self._decode(part, worker, number % SLOTS)

    def _decode(self, part: Part, worker: int, slot: int) -> Decoded:
        form = self._transform.form(part.step)
        objects = np.empty((len(part.ids), *form.shape), object) if form.holds_objects else None
        made, unreadable = self._slots(worker, slot, len(part.ids), form) if objects is None else objects, []
        for number, (record, (place, drawn)) in enumerate(zip(part.records, self._drawn(part), strict=True)):
            try:
                if isinstance(record, DataError):
                    raise record
                self._transform.decode(record, place, drawn, made[number, ...])
            except DataError as error:
                made[number] = form.blank
                key = self._split.index.key_of(place.sample)
                unreadable.append(Unreadable(place.sample, self._split.shard_of(place.sample), key, str(error)))
        labels = self._split.index.label[part.ids].astype(np.int64)
        part = part._replace(records=[])
        if objects is None:
            return Decoded(part, labels, unreadable, form, worker, slot, [])
        keys = map(self._split.index.key_of, part.ids.tolist())
        return Decoded(part, labels, unreadable, NOTHING, worker, slot, [*zip(keys, objects[:, 0], strict=True)])

    def _drawn(self, part: Part) -> list[tuple[Place, Any]]:
        """The samples' places, and what is drawn for them."""
        index, ids = self._split.index, part.ids
        sizes = zip(index.width[ids].tolist(), index.height[ids].tolist(), strict=True)
        placed = zip(ids.tolist(), sizes, part.positions.tolist(), strict=True)
        places = [Place(sample, size, part.epoch, position) for sample, size, position in placed]
        return [(place, self._transform.draw(place)) for place in places]
