"""The read plan: what each worker requests when, and how that becomes the parts of a step.

`TrainPlan` reads the steps of a training, `EvalPlan` a split once. `pipeline.py` carries them out.
"""

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

SHARE_UNIT = 8  # samples: up to so many ranks can divide each dataset's share of a batch


class Request(NamedTuple):
    """Samples that are read together, for one lane.

    Attributes:
        step: The step that needs the first of them, counted over the whole training.
        lane: The lane that they belong to.
        epoch: Their epoch.
        ids: Their numbers in the split, int64 [n].
    """

    step: int
    lane: int
    epoch: int
    ids: Ids


class Fetched(NamedTuple):
    """A request and the bytes of its samples, in the request's order.

    Attributes:
        request: The request.
        records: The bytes of each sample, or the error that says why it is unreadable.
    """

    request: Request
    records: "list[memoryview | DataError]"


class Part(NamedTuple):
    """The samples of one step that one worker contributes.

    Attributes:
        step: The step, counted over the whole training.
        epoch: Its epoch.
        positions: The places of the samples in the epoch's order, int64 [n]. They are distinct
            within an epoch, even where samples are repeated.
        ids: Numbers of the samples in the split, int64 [n].
        records: The bytes of each sample, or the error that says why it is unreadable.
    """

    step: int
    epoch: int
    positions: Ids
    ids: Ids
    records: "list[memoryview | DataError]"


class Plan(Protocol):
    """Says what each worker of one rank reads, and how it is cut into parts."""

    def useful_workers(self, workers: int) -> int:
        """Return the number of workers that have something to read, at most `workers`."""

    def parts_per_batch(self, workers: int) -> int:
        """Return the number of parts of a batch, each of another worker."""

    def part_samples(self, workers: int) -> int:
        """Return the most samples that a part holds if there are `workers`."""

    def requests(self, worker: int, workers: int, small: int = 0) -> Iterator[Request]:
        """Yield what `worker` of `workers` reads, in the order of need.

        Requests that have at most `small` samples together become one.
        """

    def parts(self, fetched: Iterator[Fetched], worker: int, workers: int) -> Iterator[Part]:
        """Cut the samples that were `fetched` for `worker` of `workers` into parts."""


@dataclass(frozen=True)
class TrainPlan:
    """The steps of a training, as one rank reads them.

    They are the steps [from_step, epochs.stop * steps_per_epoch). An epoch is one pass over the
    samples, however the recipe counts its epochs.

    Args:
        shard_samples: The number of samples in each shard.
        fingerprint: The dataset's fingerprint, a part of the order's key.
        seed: The seed of the order.
        global_batch: Distinct samples of a step, over all ranks.
        epochs: The epochs to read.
        from_step: The first step to read, counted over the whole training.
        rank: The rank that reads.
        world: The number of ranks.
        repeats: How often each sample stands in its batch, one copy next to the other. A batch
            has `repeats` times as many images as samples.

    Raises:
        UsageError: The ranks cannot share the batch, or the dataset is smaller than a batch.
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
        # Ranks read whole lanes. So a batch is the same for every number of them.
        lanes = lane_count(self.global_batch)
        if lanes % self.world:
            raise UsageError(
                f"a global batch of {self._described_batch} is read in {lanes} lanes, which "
                f"{self.world} ranks cannot share equally; use a number of ranks that divides "
                f"{lanes}, or another batch"
            )
        # Without this, the recipe's epochs would have no step.
        if sum(self.shard_samples) < self.global_batch * self.repeats:
            raise UsageError(
                f"the dataset has {sum(self.shard_samples)} samples to train on, fewer than one "
                f"global batch of {self._described_batch}; set a smaller one, "
                f"--set batch={self._fitting_batch} say, or add images"
            )

    @property
    def _described_batch(self) -> str:
        images = self.global_batch * self.repeats
        if self.repeats > 1:
            return f"{images} ({self.global_batch} samples, {self.repeats} times each)"
        return str(images)

    @property
    def _fitting_batch(self) -> int:
        """A batch, in images, that fits into an epoch several times."""
        quarter = sum(self.shard_samples) // self.repeats // 4
        return self.repeats << max(1, quarter.bit_length() - 1)

    @cached_property
    def steps_per_epoch(self) -> int:
        """The full batches of a pass over the samples."""
        return sum(self.shard_samples) // self.global_batch

    def order(self, epoch: int) -> EpochOrder:
        """Return the order of `epoch`, over all ranks."""
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
        # The first worker has the most lanes: its parts decide the size of a slot.
        return len(self.lanes(0, workers)) * self._lane_samples * self.repeats

    @property
    def _lane_samples(self) -> int:
        """The samples that a step takes of one lane."""
        return self.global_batch // lane_count(self.global_batch)

    def lanes(self, worker: int, workers: int) -> list[int]:
        """Return the adjacent lanes that `worker` of this rank's `workers` reads."""
        lanes = lane_count(self.global_batch)
        of_rank = range(self.rank * lanes // self.world, (self.rank + 1) * lanes // self.world)
        return np.array_split(of_rank, workers)[worker].tolist()

    def requests(self, worker: int, workers: int, small: int = 0) -> Iterator[Request]:
        lanes = self.lanes(worker, workers)

        # All lanes share an order. Two are kept, because one lane may be an epoch ahead of the
        # others: to compute the order of 100 M samples takes a second.
        @lru_cache(2)
        def order(epoch: int) -> EpochOrder:
            return self.order(epoch).keep(lanes)

        # Each lane's requests are in the order of need; merged, those of all lanes are.
        by_lane = [_join_small(self._lane_requests(lane, order), small) for lane in lanes]
        return heapq.merge(*by_lane, key=lambda request: (request.step, request.lane))

    def parts(self, fetched: Iterator[Fetched], worker: int, workers: int) -> Iterator[Part]:
        # The places of this worker's samples in the batch.
        lanes = self.lanes(worker, workers)
        per_lane = self._lane_samples
        starts = np.array(lanes, dtype=np.int64) * per_lane
        places = (starts[:, None] + np.arange(per_lane)).ravel()

        # Samples that came, and whose step has not: a request holds those of several steps.
        waiting: dict[int, deque[tuple[int, memoryview | DataError]]] = {}
        for lane in lanes:
            waiting[lane] = deque()

        for step in range(self.from_step, self.epochs.stop * self.steps_per_epoch):
            taken: list[tuple[int, memoryview | DataError]] = []
            # In lane order, so that the batch is the same for every number of workers.
            for lane in lanes:
                # Requests come in the order of need, so the next ones fill this lane.
                while len(waiting[lane]) < per_lane:
                    request, records = next(fetched)
                    waiting[request.lane].extend(zip(request.ids.tolist(), records, strict=True))
                    # Otherwise the consumed window stays in memory while the next is read.
                    del records
                taken += [waiting[lane].popleft() for _ in range(per_lane)]

            ids = []
            records = []
            for sample, record in taken:
                ids.append(sample)
                records.append(record)
            epoch, epoch_step = divmod(step, self.steps_per_epoch)
            part = Part(
                step,
                epoch,
                positions=epoch_step * self.global_batch + places,
                ids=np.array(ids, dtype=np.int64),
                records=records,
            )
            yield _repeat_samples(part, self.repeats)

    def _lane_requests(self, lane: int, order_of: Callable[[int], EpochOrder]) -> Iterator[Request]:
        """Yield a request for every window of `lane` that is still to come."""
        for epoch in self.epochs:
            first_step = epoch * self.steps_per_epoch
            # No order is computed for epochs that are over.
            if self.from_step >= first_step + self.steps_per_epoch:
                continue
            order = order_of(epoch)
            for window in order.windows(lane, max(0, self.from_step - first_step)):
                step = first_step + window.start // order.per_lane
                yield Request(step, lane, epoch, window.ids)


def _join_small(requests: Iterator[Request], small: int) -> Iterator[Request]:
    """Join adjacent requests of one lane and epoch that have at most `small` samples together."""
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


def _repeat_samples(part: Part, repeats: int) -> Part:
    """Return `part` with every sample `repeats` times, each copy at its own position."""
    if repeats == 1:
        return part
    records = []
    for record in part.records:
        records += [record] * repeats
    copies = np.tile(np.arange(repeats), len(part.ids))
    return part._replace(
        positions=np.repeat(part.positions, repeats) * repeats + copies,
        ids=np.repeat(part.ids, repeats),
        records=records,
    )


def plan_training(
    dataset: Dataset,
    split: str,
    seed: int,
    images: int,
    steps: range,
    *,
    rank: int,
    world: int,
    repeats: int = 1,
) -> TrainPlan:
    """Build the read plan for one dataset's share of each batch.

    Args:
        dataset: The dataset.
        split: Its split to read.
        seed: The seed of the order.
        images: Images that the dataset gives to each batch, over all ranks.
        steps: The steps to read. The plan ends with the pass that has the last of them.
        rank: The rank that reads.
        world: The number of ranks.
        repeats: How often each sample stands in its batch.

    Raises:
        UsageError: As for `TrainPlan`.
    """
    # A repeated sample is read once, and a pass over the samples takes `repeats` times the steps of
    # an epoch.
    shard_samples = tuple([shard.samples for shard in dataset.manifest.split(split).shards])
    samples = images // repeats
    steps_per_pass = max(1, sum(shard_samples) // samples)  # TrainPlan refuses too small a split
    passes = range(-(-steps.stop // steps_per_pass))
    return TrainPlan(
        shard_samples,
        dataset.fingerprint,
        seed,
        samples,
        passes,
        steps.start,
        rank,
        world,
        repeats,
    )


@dataclass(frozen=True)
class EvalPlan:
    """Every sample of a split once over all ranks, in dataset order.

    Batch b goes to rank b % world. The batches are the same for every number of ranks and workers.

    Args:
        samples: The samples of the split.
        batch: The samples of a batch; the last one may have fewer.
        rank: The rank that reads.
        world: The number of ranks.
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
        """The numbers of this rank's batches."""
        return range(self.rank, -(-self.samples // self.batch), self.world)

    @property
    def own_samples(self) -> int:
        """The samples of this rank's batches, of which the split's last one may be smaller."""
        count = 0
        for number in self.batches:
            count += min(self.batch, self.samples - number * self.batch)
        return count

    def requests(self, worker: int, workers: int, small: int = 0) -> Iterator[Request]:
        for batch in self.batches[worker::workers]:
            first = batch * self.batch
            yield Request(batch, 0, 0, np.arange(first, min(first + self.batch, self.samples)))

    def parts(self, fetched: Iterator[Fetched], worker: int, workers: int) -> Iterator[Part]:
        for request, records in fetched:
            yield Part(request.step, 0, request.ids, request.ids, records)


def split_batch(global_batch: int, weights: list[float], repeats: int = 1) -> list[int]:
    """Return the number of images that each dataset of a mixture gives to a batch.

    Shares are multiples of 8 distinct samples, so that ranks can divide them. Where the batch is
    not, they are multiples of the largest power of two that divides it.

    Args:
        global_batch: Images of a batch, over all ranks.
        weights: The shares of all datasets but the first, which gives the rest.
        repeats: How often each sample stands in the batch.

    Raises:
        UsageError: Nothing is left for the first dataset.
    """
    # The unit of a share, in images.
    distinct = global_batch // repeats
    unit = min(SHARE_UNIT, distinct & -distinct) * repeats
    others = []
    for weight in weights:
        units = max(1, round(weight * global_batch / unit))
        others.append(units * unit)
    if sum(others) >= global_batch:
        raise UsageError(
            f"mixing {weights} into a batch of {global_batch} leaves none for the first dataset; "
            "lower them"
        )
    return [global_batch - sum(others), *others]
