"""The loader. What a batch goes through, all of it inside one loader worker:

    requests   (order.py)  for every lane of this worker, the windows that come next, in the order of the step that
                           first needs them: Request(step, epoch, lane, ids)
    fetch      (store.py)  ranged GETs of whole blocks by a few threads, a bounded number of bytes ahead; every
                           sample's CRC is checked, a damaged one is fetched again: Fetched(request, records)
    assemble               step by step, the next samples of each lane: Part(step, places, ids, records)
    decode     (decode.py) crop, resize and flip straight into the worker's slot of shared memory, then the policies of
                           the recipe (policies.py), in place: Decoded

and in the trainer's process:

    merge                  the parts of one step, of all workers, copied in lane order (into pinned memory, for a GPU): Batch

The stages are a `webdataset.DataPipeline` behind `webdataset.WebLoader`. Nothing is consumed that a state would have
to hold: a loader starts at any step, and its batches are the same for every number of ranks and workers.
"""

import contextlib
import heapq
import itertools
import math
import mmap
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray

from wds_train.augment import Box, center_crop, random_resized_crop
from wds_train.cache import BlockCache
from wds_train.dataset import Dataset, SplitReader, readings
from wds_train.decode import decode_crop
from wds_train.errors import DataError, RunError, UsageError, WdsTrainError
from wds_train.order import EpochOrder, Ids, lane_count, permutation, rekeyed
from wds_train.policies import apply, policies
from wds_train.recipe import Recipe
from wds_train.schedule import image_side
from wds_train.tario import image_of

FETCH_THREADS = 8
AHEAD_BYTES = 32 << 20  # per worker: enough to cover the store's latency, little beside the windows themselves
SLAB_BYTES = 32 << 20
GAP_BYTES = 64 << 10  # fetching a hole this small costs less than another request
PREFETCHED_PARTS = 4  # per worker, in shared memory: evens out steps whose images are slow to decode
SLOTS = PREFETCHED_PARTS + 1


class Request(NamedTuple):
    """Samples `ids` (int64) of `lane`, the first of which is needed at `step` (counted over the whole training)."""

    step: int
    lane: int
    epoch: int
    ids: Ids


class Lost(NamedTuple):
    """A sample that could not be used, and why."""

    sample: int
    shard: str
    key: str
    cause: str


class Part(NamedTuple):
    """Samples of one step that one worker contributes. `positions` are their places in the epoch's order, int64 [n],
    like `ids`; no two of an epoch are equal, also where samples are repeated.
    """

    step: int
    epoch: int
    positions: Ids
    ids: Ids
    records: "list[memoryview | DataError]"


@dataclass(frozen=True)
class Batch:
    """`images` uint8 [n, height, width, 3] RGB, `labels` int64 [n], in global-batch order; `lost` names the samples
    whose image could not be read, once for each image: their pixels are grey.
    """

    step: int
    positions: Ids
    ids: Ids
    images: torch.Tensor
    labels: torch.Tensor
    lost: list[Lost] = field(default_factory=list)


class Decoded(NamedTuple):
    """A part whose pixels lie in a slot of the `Slots`. `labels` int64 [n]."""

    part: Part
    labels: NDArray[np.int64]
    lost: list[Lost]
    side: int
    worker: int
    slot: int


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

    def requests(self, worker: int, workers: int) -> Iterator[Request]:
        """What `worker` of `workers` reads, in the order of need."""

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
                f"the dataset has {sum(self.shard_samples)} samples, fewer than one global batch of {self._described}"
            )

    @property
    def _described(self) -> str:
        images = self.global_batch * self.repeats
        return f"{images} ({self.global_batch} samples, {self.repeats} times each)" if self.repeats > 1 else f"{images}"

    @property
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

    def requests(self, worker: int, workers: int) -> Iterator[Request]:
        lanes = self.lanes(worker, workers)
        return heapq.merge(*(self._lane_requests(lane) for lane in lanes), key=lambda request: request[:2])

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

    def _lane_requests(self, lane: int) -> Iterator[Request]:
        for epoch in self.epochs:
            order = self.order(epoch)
            before = epoch * self.steps_per_epoch
            from_step = max(0, self.from_step - before)
            for window in order.windows(lane, from_step) if from_step < order.steps else ():
                yield Request(before + window.start // order.per_lane, lane, epoch, window.ids)


def _repeated(part: Part, repeats: int) -> Part:
    """Every sample `repeats` times, next to one another, each time at a position of its own."""
    copies = np.tile(np.arange(repeats), len(part.ids))
    return part._replace(
        positions=np.repeat(part.positions, repeats) * repeats + copies,
        ids=np.repeat(part.ids, repeats),
        records=[record for record in part.records for _ in range(repeats)],
    )


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

    def requests(self, worker: int, workers: int) -> Iterator[Request]:
        for b in range(self.rank, -(-self.samples // self.batch), self.world)[worker::workers]:
            yield Request(b, 0, 0, np.arange(b * self.batch, min((b + 1) * self.batch, self.samples)))

    def parts(self, fetched: Iterator[Fetched], worker: int, workers: int) -> Iterator[Part]:
        for request, records in fetched:
            yield Part(request.step, 0, request.ids, request.ids, records)


class _Memory:
    """Memory to read into, cut from slabs. A slab is given back when nothing that was cut from it is in use any more;
    what is cut from one is read, and used up, at about the same time. Left to malloc, which scatters such pieces over an
    arena for every thread, the workers of docs/benchmarks.md take an eighth more memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = memoryview(b"")

    def take(self, size: int) -> memoryview:
        """`size` bytes of any content."""
        with self._lock:
            if size > len(self._left):
                self._left = np.empty(max(size, SLAB_BYTES), np.uint8).data
            taken, self._left = self._left[:size], self._left[size:]
            return taken


class Fetcher:
    """Reads the image bytes of requests, a bounded number of bytes ahead, in order."""

    def __init__(self, split: SplitReader, cache: BlockCache | None = None) -> None:
        self._split = split
        self._cache = cache

    def __call__(self, requests: Iterable[Request]) -> Iterator[Fetched]:
        pool, memory = ThreadPoolExecutor(FETCH_THREADS), _Memory()
        pending: deque[tuple[Request, int, list[Future[dict[int, memoryview | DataError]]]]] = deque()
        ahead = 0
        try:
            for request in requests:
                size = int(self._split.index.length[request.ids].sum())
                runs = [pool.submit(self._read_run, run, memory) for run in self._runs(request.ids)]
                pending.append((request, size, runs))
                ahead += size
                while ahead > AHEAD_BYTES and len(pending) > 1:
                    ahead -= pending[0][1]
                    yield _fetched(*pending.popleft())
            while pending:
                yield _fetched(*pending.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _runs(self, ids: Ids) -> list[Ids]:
        """`ids` sorted and cut where the shard changes or a hole is not worth fetching: one GET each. With a cache,
        cut at blocks, which are what it keeps.
        """
        ids, index = np.sort(ids), self._split.index
        hole = index.offset[ids[1:]] - (index.offset[ids[:-1]] + index.length[ids[:-1]])
        cut = (index.shard[ids[1:]] != index.shard[ids[:-1]]) | (hole > GAP_BYTES)
        if self._cache is not None:
            cut |= np.diff(self._cache.block_of(ids)) != 0
        return np.split(ids, np.flatnonzero(cut) + 1)

    def _read_run(self, ids: Ids, memory: _Memory) -> dict[int, memoryview | DataError]:
        index, shard = self._split.index, self._split.shard_names[self._split.index.shard[ids[0]]]
        if self._cache is not None and self._cache.keeps(ids[0]):
            first, found = self._cache.read(ids[0])
            data = memoryview(found)
        else:
            first = int(index.offset[ids[0]])
            data = memory.take(int(index.offset[ids[-1]] + index.length[ids[-1]]) - first)
            self._split.store.read_into(shard, first, data)
        return {
            i: self._image(i, shard, data[int(index.offset[i]) - first :][: int(index.length[i])]) for i in ids.tolist()
        }

    def _image(self, sample: int, shard: str, record: memoryview) -> memoryview | DataError:
        index = self._split.index
        with contextlib.suppress(DataError):
            return image_of(index, sample, record)
        # Again, from the store: a byte that flipped on the way or in the cache comes right, one in the store does not.
        if self._cache is not None:
            self._cache.drop(sample)
        times = readings(self._split.store)
        next(times)  # `record` was the first
        for _ in times:
            again = memoryview(self._split.store.read(shard, int(index.offset[sample]), int(index.length[sample])))
            try:
                return image_of(index, sample, again)
            except DataError as error:
                damage = error
        return damage


def _fetched(request: Request, _: int, runs: list[Future[dict[int, memoryview | DataError]]]) -> Fetched:
    found: dict[int, memoryview | DataError] = {}
    for run in runs:
        found |= run.result()
    return Fetched(request, [found[sample] for sample in request.ids.tolist()])


class Transform(Protocol):
    @property
    def side(self) -> int:
        """The largest side of any step's images, in pixels."""

    def size(self, step: int) -> int:
        """The side of the square images of `step`, in pixels."""

    def crop(self, epoch: int, position: int, width: int, height: int) -> tuple[Box, bool]:
        """The box to cut from the image at `position` of the epoch, and whether to mirror it."""

    def augment(self, epoch: int, position: int, pixels: NDArray[np.uint8]) -> None:
        """Change what was cut, uint8 [side, side, 3], in place."""


@dataclass(frozen=True)
class TrainTransform:
    """What `recipe.data` asks for up to uint8 pixels. The images' side follows the recipe's epochs, of `steps_per_epoch`;
    the draws are keyed by (seed, epoch, position): the same whoever decodes it, whenever.
    """

    recipe: Recipe
    steps_per_epoch: int

    def __post_init__(self) -> None:
        # Before loader workers fork: they would each import timm and torchvision, and report a bad policy too late.
        policies(self.recipe.data, self.side)

    @property
    def side(self) -> int:
        return self.recipe.data.size

    def size(self, step: int) -> int:
        return image_side(self.recipe.data, step // self.steps_per_epoch, self.recipe.schedule.epochs)

    def crop(self, epoch: int, position: int, width: int, height: int) -> tuple[Box, bool]:
        data, rng = self.recipe.data, rekeyed(self.recipe.seed, "augment", epoch, position)
        flip = bool(rng.random() < data.flip)
        return random_resized_crop(rng, width, height, data.scale, data.ratio), flip

    def augment(self, epoch: int, position: int, pixels: NDArray[np.uint8]) -> None:
        apply(policies(self.recipe.data, len(pixels)), pixels, self.recipe.seed, "policy", epoch, position)


@dataclass(frozen=True)
class EvalTransform:
    """The central square, `crop_ratio` of the shorter side."""

    side: int
    crop_ratio: float

    def size(self, step: int) -> int:
        return self.side

    def crop(self, epoch: int, position: int, width: int, height: int) -> tuple[Box, bool]:
        return center_crop(width, height, self.crop_ratio), False

    def augment(self, epoch: int, position: int, pixels: NDArray[np.uint8]) -> None:
        pass


class Slots:
    """Shared memory for decoded pixels: SLOTS of the largest part's size for every worker, used in turn.

    DataLoader could carry tensors itself, in a new piece of shared memory for each, whose pages both processes would
    have to fault in again and again. Slots need no lock: DataLoader lets a worker run PREFETCHED_PARTS ahead of the
    part that was last taken, which is copied before the next is asked for, so that one slot more is always free.
    """

    def __init__(self, workers: int, samples: int, side: int) -> None:
        # Shared with the workers by fork, and not through /dev/shm, of which a container often has 64 MB.
        shape = (max(1, workers), SLOTS, samples * side * side * 3)
        self._pixels: NDArray[np.uint8] = np.ndarray(shape, np.uint8, mmap.mmap(-1, max(1, math.prod(shape))))

    def __call__(self, worker: int, slot: int, samples: int, side: int) -> NDArray[np.uint8]:
        """The slot as uint8 [samples, side, side, 3]."""
        return self._pixels[worker, slot, : samples * side * side * 3].reshape(samples, side, side, 3)


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
        side = self._transform.size(part.step) if self._transform else 0
        pixels, lost = self._slots(worker, slot, len(part.ids), side), []
        for place, (sample, record) in enumerate(zip(part.ids.tolist(), part.records, strict=True)):
            try:
                self._fill(pixels[place], part.epoch, int(part.positions[place]), sample, record)
            except DataError as error:
                pixels[place] = 128
                shard = self._split.shard_names[self._split.index.shard[sample]]
                lost.append(Lost(sample, shard, self._split.index.key_of(sample), str(error)))
        labels = self._split.index.label[part.ids].astype(np.int64)
        return Decoded(part._replace(records=[]), labels, lost, side, worker, slot)

    def _fill(
        self, out: NDArray[np.uint8], epoch: int, position: int, sample: int, record: memoryview | DataError
    ) -> None:
        if isinstance(record, DataError):
            raise record
        if self._transform is not None:
            index = self._split.index
            box, flip = self._transform.crop(epoch, position, int(index.width[sample]), int(index.height[sample]))
            decode_crop(record, box, out, flip=flip)
            self._transform.augment(epoch, position, out)


class _Stages:
    """Requests, fetch, assemble and decode, of this very worker."""

    def __init__(self, plan: Plan, fetch: Fetcher, decode: Decoder) -> None:
        self._plan, self._fetch, self._decode = plan, fetch, decode

    def __call__(self) -> Iterator[Decoded]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        requests = self._plan.requests(worker, workers)
        fetched = self._fetch(requests)
        parts = self._plan.parts(fetched, worker, workers)
        return self._decode(parts, worker)


def _init_worker(_: int) -> None:
    """A worker lives and dies with its trainer: Ctrl-C, which the terminal sends to both, is the trainer's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Python's exit terminates workers that are left. Were that their end by a signal, PyTorch would take it for a crash of
    # theirs, and raise in the midst of the exit.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def _errors_as_values(batches: Iterable[Decoded]) -> Iterator[Decoded | WdsTrainError]:
    """What DataLoader makes of a worker's exception is a traceback, not a message for people."""
    try:
        yield from batches
    except WdsTrainError as error:
        yield error


def _as_it_is(decoded: Decoded | WdsTrainError) -> Decoded | WdsTrainError:
    """DataLoader's own would make tensors of the arrays, each of which travels as a file and a connection of its own."""
    return decoded


def _empty(shape: tuple[int, ...], *, pinned: bool) -> torch.Tensor:
    """Memory for uint8 images: pinned, for a GPU, from PyTorch's pool, which hands a freed piece out again once the copies
    from it are done; else NumPy's, which asks for huge pages: small ones, faulted in one by one, make the copy of a batch
    take 4 times as long.
    """
    if pinned:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    return torch.from_numpy(np.empty(shape, np.uint8))


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, with images and labels on `device`. On a GPU each is copied by a stream of its own, one ahead of the
    batch that is worked on. The batches' memory should be pinned: the copies would wait for the GPU otherwise.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream, ahead = torch.cuda.Stream(device), deque[tuple[Batch, torch.cuda.Event]]()
    for batch in batches:
        with torch.cuda.stream(stream):
            images, labels = (each.to(device, non_blocking=True) for each in (batch.images, batch.labels))
        ahead.append((replace(batch, images=images, labels=labels), stream.record_event()))
        if len(ahead) > 1:
            yield _arrived(*ahead.popleft())
    while ahead:
        yield _arrived(*ahead.popleft())


def _arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """`batch`, for the current stream to use after the copy; its memory is not used anew before that stream is done."""
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(copied)
    for each in (batch.images, batch.labels):
        each.record_stream(current)
    return batch


class Loader:
    """Batches of `plan`. With `workers` > 0 they are decoded in that many processes, kept for every iteration. A batch
    of a `TrainPlan` is merged from all workers' parts of the step; with `pinned`, in memory that a GPU copies from.
    """

    def __init__(
        self,
        split: SplitReader,
        plan: Plan,
        transform: Transform | None,
        workers: int,
        cache: BlockCache | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        workers = plan.useful_workers(workers)
        self._parts_per_batch = plan.parts_per_batch(workers)
        self._slots = Slots(workers, plan.part_samples(max(1, workers)), transform.side if transform else 0)
        stages = _Stages(plan, Fetcher(split, cache), Decoder(split, transform, self._slots))
        self._pipeline = wds.WebLoader(
            wds.DataPipeline(stages, _errors_as_values),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCHED_PARTS if workers else None,
            # Fork: the index is shared copy-on-write, and a worker is ready in milliseconds, not after importing torch.
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_init_worker,
        )
        self._pinned = pinned
        self._begun: Iterator[Decoded | WdsTrainError] | None = None
        self._store = split.store

    @property
    def fallbacks(self) -> int:
        """How many ranges took a second request, of this process and its workers (`Store.fallbacks`)."""
        return self._store.fallbacks

    def start(self) -> None:
        """Fork the workers and begin reading. To be called before this process has threads or uses a GPU, neither of
        which a forked child survives.
        """
        items = iter(self._pipeline)
        self._begun = itertools.chain(list(itertools.islice(items, 1)), items)  # a rank may have no batch at all

    def __iter__(self) -> Iterator[Batch]:
        parts: list[Decoded] = []
        for part in self._received():
            parts.append(part)
            if len(parts) == self._parts_per_batch:
                yield self._merge(parts)
                parts = []

    def _received(self) -> Iterator[Decoded]:
        items, self._begun = self._begun or self._pipeline, None
        try:
            for item in items:
                if isinstance(item, WdsTrainError):
                    raise item
                yield item
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunError(
                f"a loader worker died ({error}); if the machine ran out of memory, use fewer --workers, then run again"
            ) from error

    def _merge(self, decoded: list[Decoded]) -> Batch:
        """The workers' parts of one step as one batch; they hold ascending lanes, so their order is the lanes'."""
        assert len({each.part.step for each in decoded}) == 1, f"workers out of step: {[d.part.step for d in decoded]}"
        ids, side = np.concatenate([each.part.ids for each in decoded]), decoded[0].side
        images = _empty((len(ids), side, side, 3), pinned=self._pinned)
        slots = [self._slots(each.worker, each.slot, len(each.part.ids), side) for each in decoded]
        # torch.cat would wake a pool of threads, which take the workers' cores.
        np.concatenate(slots, out=images.numpy())
        labels = torch.from_numpy(np.concatenate([each.labels for each in decoded]))
        return Batch(
            decoded[0].part.step,
            np.concatenate([each.part.positions for each in decoded]),
            ids,
            images,
            labels.pin_memory() if self._pinned else labels,
            [lost for each in decoded for lost in each.lost],
        )


class Mixture:
    """Batches that take fixed shares of several loaders, one of each dataset, whose plans have the shares as batches.

    Every dataset keeps its own exact order and its own epochs, and step s takes step s of each: the state is still one
    integer. `seed` decides how a batch is interleaved, because mixup pairs samples by their place.
    """

    def __init__(self, loaders: "list[Loader]", seed: int, *, pinned: bool = False) -> None:
        self._loaders, self._seed, self._pinned = loaders, seed, pinned

    @property
    def fallbacks(self) -> int:
        return sum(loader.fallbacks for loader in self._loaders)

    def start(self) -> None:
        for loader in self._loaders:
            loader.start()

    def __iter__(self) -> Iterator[Batch]:
        for parts in zip(
            *self._loaders, strict=False
        ):  # it ends with the first dataset's plan, which counts the epochs
            yield self._interleave(parts)

    def _interleave(self, parts: tuple[Batch, ...]) -> Batch:
        step, sizes = parts[0].step, [len(part.ids) for part in parts]
        places = np.split(permutation(sum(sizes), self._seed, "mixture", step), np.cumsum(sizes)[:-1])
        images = _empty((sum(sizes), *parts[0].images.shape[1:]), pinned=self._pinned)
        labels = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=self._pinned)
        positions, ids = np.empty(sum(sizes), np.int64), np.empty(sum(sizes), np.int64)
        for part, place in zip(parts, places, strict=True):
            images[place], labels[place] = part.images, part.labels
            positions[place], ids[place] = part.positions, part.ids
        return Batch(step, positions, ids, images, labels, [lost for part in parts for lost in part.lost])


def shares(global_batch: int, weights: list[float], repeats: int = 1) -> list[int]:
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


def stream_order(
    dataset: Dataset,
    *,
    seed: int,
    epoch: int,
    global_batch: int,
    world: int,
    workers: int,
    from_step: int,
    steps: int | None,
) -> Iterator[tuple[int, int, str, int]]:
    """(step, position, key, label) of every sample of an epoch from `from_step` on, read through the real loader as
    `world` ranks with `workers` each would, but not decoded.
    """
    split = dataset.split("train")
    plans = [
        TrainPlan(
            split.shard_samples,
            dataset.fingerprint,
            seed,
            global_batch,
            range(epoch, epoch + 1),
            rank=rank,
            world=world,
        )
        for rank in range(world)
    ]
    first = epoch * plans[0].steps_per_epoch
    if from_step > plans[0].steps_per_epoch:
        raise UsageError(f"--from-step {from_step} is beyond the epoch, which has {plans[0].steps_per_epoch} steps")
    loaders = [Loader(split, replace(plan, from_step=first + from_step), None, workers) for plan in plans]
    for ranks in itertools.islice(zip(*loaders, strict=True), steps):
        for batch in ranks:
            if batch.lost:
                raise DataError(f"{batch.lost[0].shard}, key {batch.lost[0].key}: {batch.lost[0].cause}")
            for position, sample in zip(batch.positions.tolist(), batch.ids.tolist(), strict=True):
                yield batch.step - first, position, split.index.key_of(sample), int(split.index.label[sample])
