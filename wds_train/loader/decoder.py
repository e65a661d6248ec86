"""Decoding into shared memory: the last stage of a loader worker (`pipeline.py`)."""

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

# Parts that a worker decodes ahead: they even out steps whose images are slow to decode.
PREFETCHED_PARTS = 4
# Parts per worker in shared memory: those, and the one that is being copied into a batch.
SLOTS = PREFETCHED_PARTS + 1
# The form of a part without pixels.
NOTHING = square(0)


class Decoded(NamedTuple):
    """A part whose samples were decoded into a slot of the `Slots`.

    Attributes:
        part: The part, without its encoded records.
        labels: Classes, int64 [n].
        unreadable: The samples that could not be used.
        form: The form of each sample's array.
        worker: The worker whose slot it is.
        slot: The slot's number.
        items: Samples that became objects rather than arrays, with their keys.
    """

    part: Part
    labels: NDArray[np.int64]
    unreadable: list[Unreadable]
    form: Form
    worker: int
    slot: int
    items: list[tuple[str, Any]]


class Slots:
    """Shared memory for decoded samples: SLOTS slots for every worker, used in turn.

    DataLoader could carry tensors itself. It would use a new piece of shared memory for each, whose
    pages both processes have to fault in again and again.

    Slots need no lock. DataLoader lets a worker run PREFETCHED_PARTS ahead of the part that was
    last taken, and that part is copied before the next is asked for. So one slot more is always
    free.

    Args:
        workers: The workers; 0 decodes in this process, and has slots, too.
        part_bytes: The bytes of the largest part.

    Raises:
        UsageError: There is not so much memory.
    """

    def __init__(self, workers: int, part_bytes: int) -> None:
        shape = (max(1, workers), SLOTS, part_bytes)
        size = math.prod(shape)
        # Workers inherit it by fork. /dev/shm would not do: in a container it often has 64 MB.
        try:
            memory = mmap.mmap(-1, max(1, size))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"the loader cannot have the {size / 1e9:,.1f} GB of memory that its batches take "
                f"({getattr(error, 'strerror', None) or error}); "
                "use smaller images or a smaller batch"
            ) from error
        self._bytes: NDArray[np.uint8] = np.ndarray(shape, np.uint8, memory)

    def __call__(self, worker: int, slot: int, samples: int, form: Form) -> NDArray[Any]:
        """Return a slot as an array [samples, *form.shape] of the form's dtype."""
        return np.ndarray((samples, *form.shape), form.dtype, self._bytes[worker, slot])


class OrderAlone:
    """A `Transform` that decodes nothing: its loader yields the order of samples alone."""

    largest = NOTHING

    def form(self, step: int) -> Form:
        """Return the form of an image without pixels."""
        return NOTHING

    def draw(self, place: Place) -> None:
        """Draw nothing."""

    def decode(self, data: memoryview, place: Place, drawn: None, out: NDArray[Any]) -> None:
        """Leave `out`, which is empty, as it is."""


class Decoder:
    """Decodes parts into slots.

    Args:
        split: The split that the samples are of.
        transform: Makes an array of each sample.
        slots: The memory for these arrays.
    """

    def __init__(self, split: SplitReader, transform: Transform, slots: Slots) -> None:
        self._split = split
        self._transform = transform
        self._slots = slots

    def __call__(self, parts: Iterable[Part], worker: int) -> Iterator[Decoded]:
        """Yield `parts`, decoded into the slots of `worker`."""
        for number, part in enumerate(parts):
            yield self._decode(part, worker, number % SLOTS)

    def _decode(self, part: Part, worker: int, slot: int) -> Decoded:
        # The array of the part's samples: in shared memory, unless they are objects.
        index = self._split.index
        form = self._transform.form(part.step)
        if form.holds_objects:
            made = np.empty((len(part.ids), *form.shape), object)
        else:
            made = self._slots(worker, slot, len(part.ids), form)

        # Each sample is decoded into its row. An unreadable one is blank, and named.
        unreadable = []
        samples = zip(part.records, self._draw(part), strict=True)
        for number, (record, (place, drawn)) in enumerate(samples):
            try:
                if isinstance(record, DataError):
                    raise record
                self._transform.decode(record, place, drawn, made[number, ...])
            except DataError as error:
                made[number] = form.blank
                shard = self._split.shard_of(place.sample)
                key = index.key_of(place.sample)
                unreadable.append(Unreadable(place.sample, shard, key, str(error)))

        # Objects travel to the training process by themselves, and leave the slot empty.
        items = []
        if form.holds_objects:
            for sample, value in zip(part.ids.tolist(), made[:, 0], strict=True):
                items.append((index.key_of(sample), value))
            form = NOTHING
        labels = index.label[part.ids].astype(np.int64)
        return Decoded(part._replace(records=[]), labels, unreadable, form, worker, slot, items)

    def _draw(self, part: Part) -> list[tuple[Place, Any]]:
        """Return the places of the samples, and what the transform draws for each."""
        # Columns at once: a cell of an array takes as long to get as the whole of it.
        index = self._split.index
        ids = part.ids
        sizes = zip(index.width[ids].tolist(), index.height[ids].tolist(), strict=True)
        drawn = []
        for sample, size, position in zip(
            ids.tolist(), sizes, part.positions.tolist(), strict=True
        ):
            place = Place(sample, size, part.epoch, position)
            drawn.append((place, self._transform.draw(place)))
        return drawn
