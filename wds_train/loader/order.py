"""The order of samples in an epoch, as arithmetic.

A dataset is a row of N samples, cut into shards. An epoch is built from it in four steps, each a pure function of
(dataset fingerprint, seed, epoch, global batch):

    blocks    runs of <= BLOCK consecutive samples of one shard: the unit of one ranged GET. All blocks are permuted.
    lanes     the permuted sample sequence, cut to steps * B samples (the dropped tail differs per epoch because the
              permutation does), is cut into L equal lanes.
    windows   inside a lane, samples are shuffled within windows of WINDOW samples; an epoch begins with smaller ones.
    steps     step s takes the next B / L samples of every lane, in lane order: B distinct samples.

Ranks and loader workers own whole lanes, so how many there are decides who reads what, never the order. Nothing is
consumed: any step of any epoch is computed in O(blocks + B), which is why the loader's whole state is one integer.
Once an epoch's blocks are permuted, a step of it takes O(B).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wds_train.rng import Ids, permutation

BLOCK = 32
WINDOW = 128
RAMP = (4, 8, 16, 32, 64)
MAX_LANES = 64

Places = NDArray[np.integer]


def lane_count(global_batch: int) -> int:
    """The largest power of two <= MAX_LANES that divides the global batch."""
    return min(MAX_LANES, global_batch & -global_batch)


def blocks(shard_samples: Sequence[int]) -> tuple[Places, NDArray[np.uint8]]:
    """First sample and length of every block, [blocks] each, in dataset order; no block spans two shards."""
    samples = np.asarray(shard_samples, np.int64)
    counts = -(-samples // BLOCK)
    ends = np.cumsum(counts)
    count = int(ends[-1])
    kind = np.int32 if count * BLOCK < 1 << 31 else np.int64  # half the memory, for up to 2,000 M samples
    first = np.repeat((np.cumsum(samples) - samples - (ends - counts) * BLOCK).astype(kind), counts)
    first += np.arange(0, count * BLOCK, BLOCK, dtype=kind)
    length = np.full(count, BLOCK, np.uint8)
    length[ends[counts > 0] - 1] -= (counts * BLOCK - samples)[counts > 0].astype(np.uint8)
    return first, length


@dataclass(frozen=True)
class Window:
    """A shuffled stretch of one lane: `ids` (int64, sample numbers in the dataset) are what the lane's steps take next.

    `start` is the place of ids[0] in the lane's sequence, counted in samples.
    """

    lane: int
    start: int
    ids: Ids


class EpochOrder:
    """The order of one epoch. `steps` batches of `global_batch` distinct samples; see the module's text."""

    def __init__(
        self, shard_samples: Sequence[int], *, fingerprint: str, seed: int, epoch: int, global_batch: int
    ) -> None:
        self.global_batch = global_batch
        self.steps = sum(shard_samples) // global_batch
        self.lanes = lane_count(global_batch)
        self.per_lane = global_batch // self.lanes
        self._lane_samples = self.steps * self.per_lane
        self._key = (fingerprint, seed, epoch)
        first, length = blocks(shard_samples)
        shuffled = permutation(len(first), *self._key, "blocks")
        length = length[shuffled]
        self._starts: Places = np.cumsum(length, dtype=first.dtype)  # of the blocks in the permuted sequence
        self._starts -= length
        self._shifts = first[shuffled] - self._starts  # from there to the dataset

    def keep(self, lanes: Sequence[int]) -> "EpochOrder":
        """This order for the adjacent `lanes` alone: what the others need is forgotten, so that all processes of a machine hold
        one order together.
        """
        first, last = lanes[0] * self._lane_samples, (lanes[-1] + 1) * self._lane_samples - 1
        kept = slice(self._block(first), self._block(last) + 1)
        self._starts, self._shifts = self._starts[kept].copy(), self._shifts[kept].copy()
        return self

    def window(self, lane: int, number: int) -> Window:
        """Window `number` of `lane`.

        The sizes begin with RAMP, so that a first batch needs a few samples of every lane and not a whole window; then
        comes one of a size that differs from lane to lane, so that from there on the lanes do not all need the next
        window at the same step.
        """
        stop = min(self._window_end(lane, number), self._lane_samples)
        start = min(self._window_end(lane, number - 1), stop)
        ids = self._unshuffled(lane, start, stop)
        return Window(lane, start, ids[permutation(len(ids), *self._key, "window", lane, number)])

    def windows(self, lane: int, from_step: int = 0) -> Iterator[Window]:
        """The windows of `lane` from the one that `from_step` first needs, which is cut to what is still to come."""
        begin, number = from_step * self.per_lane, 0
        behind = begin - self._window_end(lane, len(RAMP))
        if behind > 0:  # the windows from there on are equal, and need not be counted
            number = len(RAMP) + behind // WINDOW
        while self._window_end(lane, number) <= begin:
            number += 1
        while begin < self._lane_samples:
            window = self.window(lane, number)
            yield Window(lane, begin, window.ids[begin - window.start :])
            begin, number = window.start + len(window.ids), number + 1

    def _window_end(self, lane: int, number: int) -> int:
        """The place in the lane's sequence where window `number` ends, were the lane endless; 0 for number -1."""
        if number < len(RAMP):
            return sum(RAMP[: number + 1])
        return sum(RAMP) + WINDOW * (lane + 1) // self.lanes + WINDOW * (number - len(RAMP))

    def batch(self, step: int) -> Ids:
        """The samples of `step`, int64 [global_batch], in lane order."""
        return np.concatenate([self._take(lane, step) for lane in range(self.lanes)])

    def _take(self, lane: int, step: int) -> Ids:
        taken: list[Ids] = []
        for window in self.windows(lane, step):
            taken.append(window.ids[: self.per_lane - sum(map(len, taken))])
            if sum(map(len, taken)) == self.per_lane:
                break
        return np.concatenate(taken)

    def _unshuffled(self, lane: int, start: int, stop: int) -> Ids:
        places = np.arange(start, stop, dtype=np.int64) + lane * self._lane_samples
        return places + self._shifts[self._block(places)]

    def _block(self, places: Ids | int) -> Any:
        """Which blocks of the permuted sequence hold `places`. Asked for in another type than theirs, all would be converted."""
        return np.searchsorted(self._starts, np.asarray(places, self._starts.dtype), side="right") - 1
