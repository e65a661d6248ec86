"""Ranged GETs of whole blocks, a bounded number of bytes ahead; every sample's CRC is checked."""

import contextlib
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from wds_train.dataset.index import Content, SampleIndex, contents
from wds_train.dataset.reader import SplitReader, readings
from wds_train.dataset.shared_index import AT_ONCE, SharedIndex
from wds_train.errors import DataError
from wds_train.loader.cache import BlockCache
from wds_train.loader.plan import Fetched, Request
from wds_train.rng import Ids

FETCH_THREADS = 8
AHEAD_BYTES = 32 << 20  # per worker: enough to cover the store's latency, little beside the windows themselves
SLAB_BYTES = 32 << 20
GAP_BYTES = 64 << 10  # fetching a hole this small costs less than another request
ROWS_AHEAD = 32  # requests whose rows are read ahead: the first of each lane
SMALL_BYTES = 512 << 10  # on which a request's own costs outweigh its bytes': the short first windows of small images


class Memory:
    """Memory to read into, cut from slabs. A slab is cut anew when nothing that was cut from it is in use any more; what is cut
    from one is read, and used up, at about the same time. Left to malloc, which scatters such pieces over an arena for every
    thread, the workers of docs/benchmarks.md take an eighth more memory; and given back in between, a slab would be cleared
    again by the kernel, page by page, which takes as long as receiving into it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = memoryview(b"")
        self._free: list[NDArray[np.uint8]] = []

    def take(self, size: int) -> memoryview:
        """A piece of `size` bytes of any content."""
        with self._lock:
            if size > len(self._left):
                self._left = memoryview(b"")  # of the old slab, before another is looked for
                self._left = self._slab(size)
            taken, self._left = self._left[:size], self._left[size:]
            return taken

    def _slab(self, size: int) -> memoryview:
        if size > SLAB_BYTES:
            return _pages(size).data
        slab = self._free.pop() if self._free else _pages(SLAB_BYTES)
        view = slab[:]  # which all that is cut from it holds, and which nothing else does
        weakref.finalize(view, self._free.append, slab).atexit = False
        return view.data


def _pages(size: int) -> NDArray[np.uint8]:
    """`size` bytes of the kernel's ordinary pages. NumPy asks for huge ones, which are cut from what has been free for long: in a
    virtual machine whose host took that back, they take 2 ms a MB to come, and an epoch of 3,000 photographs a tenth longer.
    """
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


class Fetcher:
    """Reads the image bytes of requests, a bounded number of bytes ahead, in order; with `whole`, all bytes of their
    samples, header to padding.
    """

    def __init__(self, split: SplitReader, cache: BlockCache | None = None, *, whole: bool = False) -> None:
        self._split = split
        self._cache = cache
        self._whole = whole
        # Samples that take SMALL_BYTES. A manifest may say that there are no bytes; what is wrong with it is told when it is read by.
        self.small = SMALL_BYTES * len(split) // max(1, sum(split.shard_bytes))

    def __call__(self, requests: Iterable[Request]) -> Iterator[Fetched]:
        pool, memory = ThreadPoolExecutor(FETCH_THREADS), Memory()
        pending: deque[tuple[Request, int, list[Future[dict[int, memoryview | DataError]]]]] = deque()
        # Little at first: server and network would take the cores from the decoding of the first images.
        ahead, bound = 0, AHEAD_BYTES // 8
        try:
            for request in read_rows_ahead(self._split.index, requests):
                size = int(self._split.index.length[request.ids].sum())
                runs = [pool.submit(self._read_run, run, memory) for run in self._runs(request.ids)]
                pending.append((request, size, runs))
                ahead += size
                while ahead > bound and len(pending) > 1:
                    ahead -= pending[0][1]
                    bound = min(AHEAD_BYTES, bound + pending[0][1])
                    yield _fetched(*pending.popleft())
            while pending:
                yield _fetched(*pending.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _runs(self, ids: Ids) -> list[Ids]:
        """The `ids`, sorted and cut where the shard changes or a hole is not worth fetching: one GET each. With a
        cache, cut at blocks, which are what it keeps.
        """
        ids, index = np.sort(ids), self._split.index
        hole = index.offset[ids[1:]] - (index.offset[ids[:-1]] + index.length[ids[:-1]])
        cut = (index.shard[ids[1:]] != index.shard[ids[:-1]]) | (hole > GAP_BYTES)
        if self._cache is not None:
            cut |= np.diff(self._cache.block_of(ids)) != 0
        return np.split(ids, np.flatnonzero(cut) + 1)

    def _read_run(self, ids: Ids, memory: Memory) -> dict[int, memoryview | DataError]:
        index = self._split.index
        if self._cache is not None and self._cache.keeps(ids[0]):
            first, block = self._cache.read(ids[0])
            data = memoryview(block)
        else:
            first = int(index.offset[ids[0]])
            data = memory.take(int(index.offset[ids[-1]] + index.length[ids[-1]]) - first)
            self._split.store.read_into(self._split.shard_of(ids[0]), first, data)
        starts, lengths = (index.offset[ids] - first).tolist(), index.length[ids].tolist()
        records = [data[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        found = zip(ids.tolist(), records, contents(index, ids), strict=True)
        return {sample: self._wanted(sample, record, content) for sample, record, content in found}

    def _wanted(self, sample: int, record: memoryview, content: Content) -> memoryview | DataError:
        """What is asked for of a sample."""
        with contextlib.suppress(DataError):
            return self._checked(record, content)
        # Again, from the store: a byte that flipped on the way or in the cache comes right, one in the store does not.
        if self._cache is not None:
            self._cache.drop(sample)
        times = readings(self._split.store)
        next(times)  # `record` was the first
        for _ in times:
            again = self._split.record(sample)
            try:
                return self._checked(again, content)
            except DataError as error:
                damage = error
        return damage

    def _checked(self, record: memoryview, content: Content) -> memoryview:
        """What is asked for of `record`; `DataError` when it is damaged."""
        image = content.image(record)
        return record if self._whole else image


def _fetched(request: Request, _: int, runs: list[Future[dict[int, memoryview | DataError]]]) -> Fetched:
    found: dict[int, memoryview | DataError] = {}
    for run in runs:
        found |= run.result()
    return Fetched(request, [found[sample] for sample in request.ids.tolist()])


def read_rows_ahead(index: SampleIndex, requests: Iterable[Request]) -> Iterator[Request]:
    """Yield the `requests` once the rows of their samples are there.

    The rows of a large split are read when they are first asked for; those of ROWS_AHEAD requests are read
    while earlier ones are used.
    """
    if not isinstance(index, SharedIndex):
        yield from requests
        return
    rows = index.rows
    pool = ThreadPoolExecutor(AT_ONCE)
    waiting: deque[tuple[Request, list[Future[None]]]] = deque()
    try:
        for request in requests:
            shards = rows.lacking(rows.shard_of(request.ids))
            waiting.append((request, [pool.submit(rows.fill, shard) for shard in shards]))
            if len(waiting) > ROWS_AHEAD:
                yield _with_rows(*waiting.popleft())
        while waiting:
            yield _with_rows(*waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _with_rows(request: Request, fills: list[Future[None]]) -> Request:
    for fill in fills:
        fill.result()
    return request
