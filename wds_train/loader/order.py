"""The order of samples in an epoch, as arithmetic.

A dataset is a row of N samples, cut into shards. An epoch is built from it in four steps, each a
pure function of (dataset fingerprint, seed, epoch, global batch):

    blocks    runs of <= BLOCK consecutive samples of one shard: the unit of one ranged GET. All
              blocks are permuted.
    lanes     the permuted sample sequence, cut to steps * B samples (the dropped tail differs per
              epoch because the permutation does), is cut into L equal lanes.
    windows   inside a lane, samples are shuffled within windows of WINDOW samples; an epoch begins
              with smaller ones.
    steps     step s takes the next B / L samples of every lane, in lane order: B distinct samples.

Ranks and loader workers own whole lanes, so their numbers decide who reads what, never the order.
Nothing is consumed: any step of any epoch is computed in O(blocks + B), which is why the loader's
whole state is one integer. Once an epoch's blocks are permuted, a step of it takes O(B).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wds_train.rng import Ids, permutation

# All four decide the order: another value would change the samples of every run that is resumed.
BLOCK = 32  # samples of one ranged GET
WINDOW = 128  # samples that are shuffled with each other
RAMP = (4, 8, 16, 32, 64)  # sizes of an epoch's first windows
MAX_LANES = 64  # so many ranks can divide a batch

# Places in a sequence of samples, int32 or int64.
Places = NDArray[np.integer]


def lane_count(global_batch: int) -> int:
    """Return the largest power of two <= MAX_LANES that divides the global batch."""
    return min(MAX_LANES, global_batch & -global_batch)


def blocks(shard_samples: Sequence[int]) -> tuple[Places, NDArray[np.uint8]]:
    """Cut shards into blocks. No block spans two shards.

    Args:
        shard_samples: The number of samples in each shard.

    Returns:
        The first sample and the length of every block, in dataset order, [blocks] each: int32, or
        int64 for over 2,000 M samples; and uint8.
    """
    # Blocks of each shard, rounded up, and their numbers.
    samples = np.asarray(shard_samples, np.int64)
    counts = -(-samples // BLOCK)
    ends = np.cumsum(counts)
    count = int(ends[-1])
    kind: type[np.int32 | np.int64] = np.int64
    if count * BLOCK < 1 << 31:
        kind = np.int32  # it takes half the memory

    # A block starts BLOCK samples after the one before it, except for the gaps that the short last
    # blocks of earlier shards make.
    shard_starts = np.cumsum(samples) - samples
    first_blocks = ends - counts
    first = np.repeat((shard_starts - first_blocks * BLOCK).astype(kind), counts)
    first += np.arange(0, count * BLOCK, BLOCK, dtype=kind)

    # The last block of a shard may be shorter. A shard without samples has none.
    length = np.full(count, BLOCK, np.uint8)
    filled = counts > 0
    length[ends[filled] - 1] -= (counts * BLOCK - samples)[filled].astype(np.uint8)
    return first, length


@dataclass(frozen=True)
class Window:
    """A shuffled stretch of one lane.

    Attributes:
        lane: The lane.
        start: The place of ids[0] in the lane's sequence, counted in samples.
        ids: The samples that the lane's steps take next, by their numbers in the dataset,
            int64 [n].
    """

    lane: int
    start: int
    ids: Ids


class EpochOrder:
    """The order of one epoch: `steps` batches of `global_batch` distinct samples.

    The module's text says how it is built.

    Args:
        shard_samples: The number of samples in each shard.
        fingerprint: The dataset's fingerprint.
        seed: The seed of the order.
        epoch: The epoch.
        global_batch: Samples of a step, over all ranks.
    """

    def __init__(
        self,
        shard_samples: Sequence[int],
        *,
        fingerprint: str,
        seed: int,
        epoch: int,
        global_batch: int,
    ) -> None:
        self.global_batch = global_batch
        self.steps = sum(shard_samples) // global_batch
        self.lanes = lane_count(global_batch)
        self.per_lane = global_batch // self.lanes
        self._lane_samples = self.steps * self.per_lane
        self._key = (fingerprint, seed, epoch)

        # The blocks in the order of the epoch.
        first, length = blocks(shard_samples)
        shuffled = permutation(len(first), *self._key, "blocks")
        length = length[shuffled]
        # Where each block starts in the permuted sequence, and how far that is from the dataset's.
        self._starts: Places = np.cumsum(length, dtype=first.dtype)
        self._starts -= length
        self._shifts = first[shuffled] - self._starts

    def keep(self, lanes: Sequence[int]) -> "EpochOrder":
        """Forget what other lanes than the adjacent `lanes` need, and return this order.

        With it, all processes of a machine hold one order together.
        """
        first = lanes[0] * self._lane_samples
        last = (lanes[-1] + 1) * self._lane_samples - 1
        kept = slice(self._block(first), self._block(last) + 1)
        self._starts = self._starts[kept].copy()
        self._shifts = self._shifts[kept].copy()
        return self

    def window(self, lane: int, number: int) -> Window:
        """Return a window of a lane.

        The sizes begin with RAMP, so that a first batch needs a few samples of every lane and not a
        whole window. Then comes one of a size that differs from lane to lane, so that from there on
        the lanes do not all need the next window at the same step.

        Args:
            lane: The lane.
            number: The window's number in the lane, from 0.
        """
        stop = min(self._window_end(lane, number), self._lane_samples)
        start = min(self._window_end(lane, number - 1), stop)
        ids = self._unshuffled(lane, start, stop)
        return Window(lane, start, ids[permutation(len(ids), *self._key, "window", lane, number)])

    def windows(self, lane: int, from_step: int = 0) -> Iterator[Window]:
        """Yield the windows of a lane that are still to come.

        Args:
            lane: The lane.
            from_step: The first step that needs them, counted in the epoch. The first window lacks
                the samples of earlier steps.
        """
        # The window that holds the next sample.
        begin = from_step * self.per_lane
        number = 0
        # Behind the ramp all windows are equal, and need not be counted one by one.
        after_ramp = begin - self._window_end(lane, len(RAMP))
        if after_ramp > 0:
            number = len(RAMP) + after_ramp // WINDOW
        while self._window_end(lane, number) <= begin:
            number += 1

        while begin < self._lane_samples:
            window = self.window(lane, number)
            yield Window(lane, begin, window.ids[begin - window.start :])
            begin = window.start + len(window.ids)
            number += 1

    def _window_end(self, lane: int, number: int) -> int:
        """Return the end of a window in the sequence of an endless lane; 0 for number -1."""
        if number < len(RAMP):
            return sum(RAMP[: number + 1])
        first_full = sum(RAMP) + WINDOW * (lane + 1) // self.lanes
        return first_full + WINDOW * (number - len(RAMP))

    def batch(self, step: int) -> Ids:
        """Return the samples of a step in lane order, int64 [global_batch].

        The loader does not use it. It is for those who ask for single steps.

        Args:
            step: The step, counted in the epoch.
        """
        return np.concatenate([self._take(lane, step) for lane in range(self.lanes)])

    def _take(self, lane: int, step: int) -> Ids:
        """Return the samples that a step takes of a lane, int64 [per_lane]."""
        taken: list[Ids] = []
        missing = self.per_lane
        for window in self.windows(lane, step):
            ids = window.ids[:missing]
            taken.append(ids)
            missing -= len(ids)
            if missing == 0:
                break
        return np.concatenate(taken)

    def _unshuffled(self, lane: int, start: int, stop: int) -> Ids:
        """Return the samples at places [start, stop) of a lane, before windows shuffle them."""
        places = np.arange(start, stop, dtype=np.int64) + lane * self._lane_samples
        return places + self._shifts[self._block(places)]

    def _block(self, places: Ids | int) -> Any:
        """Return the blocks of the permuted sequence that hold `places`."""
        # NumPy would convert all starts if they were searched for places of another dtype.
        wanted = np.asarray(places, self._starts.dtype)
        return np.searchsorted(self._starts, wanted, side="right") - 1
