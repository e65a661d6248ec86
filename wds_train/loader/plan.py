"""What is read when: the requests of every lane, and the parts of every step."""

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from wds_train.dataset.reader import Dataset
from wds_train.errors import DataError, UsageError
from wds_train.loader.order import EpochOrder, lane_count
from wds_train.rng import Ids


class Request(NamedTuple):
    """Samples `ids` (int64) of `lane`, the first of which is needed at `step` (counted over the whole training)."""

    step: int
    lane: int
    epoch: int
    ids: Ids


class Part(NamedTuple):
    """Samples of one step that one worker contributes. `positions` are their places in the epoch's order, int64 [n],
    like `ids`; no two of an epoch are equal, also where samples are repeated.
    """

    step: int
    epoch: int
    positions: Ids
    ids: Ids
    records: "list[memoryview | DataError]"


class Fetched(NamedTuple):
    """A request and its samples' image bytes, in the request's order."""

    request: Request
    records: "list[memoryview | DataError]"


class Plan(Protocol):
    """What each of a rank's workers reads, and how it is cut into parts."""

    def useful_workers(self, workers: int) -> int:
        """How many of `workers` have something to read."""

    def parts_per_batch(self, workers: int) -> int:
        """How many parts, of as many workers, a batch is merged from."""

    def part_samples(self, workers: int) -> int:
        """The most samples that a part of one of `workers` holds."""

    def requests(self, worker: int, workers: int, small: int = 0) -> Iterator[Request]:
        """What `worker` of `workers` reads, in the order of need; what is `small` together, in samples, is one request."""

    def parts(self, fetched: Iterator[Fetched], worker: int, workers: int) -> Iterator[Part]:
        """What its requests brought, cut into parts."""


@dataclass(frozen=True)
class TrainPlan:
    """The steps [from_step, epochs * steps per epoch) of a training, for one rank of `world`.

    A step takes `global_batch` distinct samples, each of which stands `repeats` times in the batch, next to one another:
    as images the batch is so many times as large. An epoch is one pass over the samples, whatever the recipe counts by.
    """

    shard_samples: tuple[int, ...]
    fingerprint: str
    seed: int
    global_batch: int
    epochs: range
    from_step: int = 0
    rank: int = 0
    world: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        lanes = lane_count(self.global_batch)
        if lanes % self.world:
            raise UsageError(
                f"a global batch of {self._described} is read in {lanes} lanes, which {self.world} ranks cannot share "
                f"equally; use a number of ranks that divides {lanes}, or another batch"
            )
        if sum(self.shard_samples) < self.global_batch * self.repeats:  # the recipe's epochs would have no step
            raise UsageError(
                f"the dataset has {sum(self.shard_samples)} samples to train on, fewer than one global batch of "
                f"{self._described}; set a smaller one, --set batch={self._fitting} say, or add images"
            )

    @property
    def _described(self) -> str:
        images = self.global_batch * self.repeats
        return f"{images} ({self.global_batch} samples, {self.repeats} times each)" if self.repeats > 1 else f"{images}"

    @property
    def _fitting(self) -> int:
        """A batch, in images, of which an epoch has several."""
        return self.repeats << max(1, (sum(self.shard_samples) // self.repeats // 4).bit_length() - 1)

    @cached_property
    def steps_per_epoch(self) -> int:
        return sum(self.shard_samples) // self.global_batch

    def order(self, epoch: int) -> EpochOrder:
        return EpochOrder(
            self.shard_samples,
            fingerprint=self.fingerprint,
            seed=self.seed,
            epoch=epoch,
            global_batch=self.global_batch,
        )

    def useful_workers(self, workers: int) -> int:
        return min(workers, len(self.lanes(0, 1)))

    def parts_per_batch(self, workers: int) -> int:
        return max(1, workers)

    def part_samples(self, workers: int) -> int:
        return len(self.lanes(0, workers)) * (self.global_batch // lane_count(self.global_batch)) * self.repeats

    def lanes(self, worker: int, workers: int) -> list[int]:
        lanes = lane_count(self.global_batch)
        own = range(self.rank * lanes // self.world, (self.rank + 1) * lanes // self.world)
        return [int(lane) for lane in np.array_split(own, workers)[worker]]

    def requests(self, worker: int, workers: int, small: int = 0) -> Iterator[Request]:
        lanes = self.lanes(worker, workers)
        # One for all lanes, of which one may be an epoch ahead: of 100 M samples, each takes a second.
        orders = lru_cache(2)(lambda epoch: self.order(epoch).keep(lanes))
        each = (_joined(self._lane_requests(lane, orders), small) for lane in lanes)
        return heapq.merge(*each, key=lambda request: request[:2])

    def parts(self, fetched: Iterator[Fetched], worker: int, workers: int) -> Iterator[Part]:
        lanes = self.lanes(worker, workers)
        per_lane = self.global_batch // lane_count(self.global_batch)
        places = np.concatenate([np.arange(lane * per_lane, (lane + 1) * per_lane) for lane in lanes])
        waiting: dict[int, deque[tuple[int, memoryview | DataError]]] = {lane: deque() for lane in lanes}
        for step in range(self.from_step, self.epochs.stop * self.steps_per_epoch):
            taken: list[tuple[int, memoryview | DataError]] = []
            for lane in lanes:
                while len(waiting[lane]) < per_lane:  # requests come in the order of need, so the next one fills a lane
                    request, records = next(fetched)
                    waiting[request.lane].extend(zip(request.ids.tolist(), records, strict=True))
                    del records  # or the window stays in memory, all consumed, while the one after the next is read
                taken += [waiting[lane].popleft() for _ in range(per_lane)]
            epoch, epoch_step = divmod(step, self.steps_per_epoch)
            ids = np.array([sample for sample, _ in taken], dtype=np.int64)
            part = Part(step, epoch, epoch_step * self.global_batch + places, ids, [record for _, record in taken])
            yield _repeated(part, self.repeats)

    def _lane_requests(self, lane: int, orders: Callable[[int], EpochOrder]) -> Iterator[Request]:
        for epoch in self.epochs:
            before = epoch * self.steps_per_epoch
            if self.from_step >= before + self.steps_per_epoch:
                continue
            order = orders(epoch)
            for window in order.windows(lane, max(0, self.from_step - before)):
                yield Request(before + window.start // order.per_lane, lane, epoch, window.ids)


def _joined(requests: Iterator[Request], small: int) -> Iterator[Request]:
    """The `requests` of a lane; those of one epoch that follow one another, and have at most `small` samples together, as one."""
    waiting: Request | None = None
    for request in requests:
        if waiting is None:
            waiting = request
        elif waiting.epoch == request.epoch and len(waiting.ids) + len(request.ids) <= small:
            waiting = waiting._replace(ids=np.concatenate([waiting.ids, request.ids]))
        else:
            yield waiting
            waiting = request
    if waiting is not None:
        yield waiting


def _repeated(part: Part, repeats: int) -> Part:
    """Every sample `repeats` times, next to one another, each time at a position of its own."""
    copies = np.tile(np.arange(repeats), len(part.ids))
    return part._replace(
        positions=np.repeat(part.positions, repeats) * repeats + copies,
        ids=np.repeat(part.ids, repeats),
        records=[record for record in part.records for _ in range(repeats)],
    )


def plan_training(
    dataset: Dataset, split: str, seed: int, images: int, steps: range, *, rank: int, world: int, repeats: int = 1
) -> TrainPlan:
    """What `images` of every batch are read from `dataset` by, for `steps` at least."""
    shard_samples = tuple(shard.samples for shard in dataset.manifest.split(split).shards)
    samples = images // repeats
    per_pass = max(1, sum(shard_samples) // samples)  # a split of less than a batch is TrainPlan's to refuse
    passes = range(-(-steps.stop // per_pass))
    return TrainPlan(shard_samples, dataset.fingerprint, seed, samples, passes, steps.start, rank, world, repeats)


@dataclass(frozen=True)
class EvalPlan:
    """Every sample of a split once over all ranks, in dataset order, in batches that no rank or worker count changes:
    batch b goes to rank b % world.
    """

    samples: int
    batch: int
    rank: int = 0
    world: int = 1

    def useful_workers(self, workers: int) -> int:
        return workers

    def parts_per_batch(self, workers: int) -> int:
        return 1

    def part_samples(self, workers: int) -> int:
        return self.batch

    @property
    def batches(self) -> range:
        """The rank's own."""
        return range(self.rank, -(-self.samples // self.batch), self.world)

    @property
    def own_samples(self) -> int:
        return sum(min(self.batch, self.samples - b * self.batch) for b in self.batches)

    def requests(self, worker: int, workers: int, small: int = 0) -> Iterator[Request]:
        for b in self.batches[worker::workers]:
            yield Request(b, 0, 0, np.arange(b * self.batch, min((b + 1) * self.batch, self.samples)))

    def parts(self, fetched: Iterator[Fetched], worker: int, workers: int) -> Iterator[Part]:
        for request, records in fetched:
            yield Part(request.step, 0, request.ids, request.ids, records)


def split_batch(global_batch: int, weights: list[float], repeats: int = 1) -> list[int]:
    """How many images of a batch each dataset gives: `weights` of the others, the rest of the first; int each.

    Rounded to multiples of 8 distinct samples (of the batch's own power of two, if that is less), so that ranks can share
    them, each of which is `repeats` images.
    """
    distinct = global_batch // repeats
    unit = min(8, distinct & -distinct) * repeats
    others = [max(1, round(weight * global_batch / unit)) * unit for weight in weights]
    if sum(others) >= global_batch:
        raise UsageError(
            f"mixing {weights} into a batch of {global_batch} leaves none for the first dataset; lower them"
        )
    return [global_batch - sum(others), *others]
