"""Ranged GETs of whole blocks, a bounded number of bytes ahead. Every sample's CRC is checked.

It is the first stage of a loader worker (`pipeline.py`).
"""

import contextlib
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wds_train.dataset.index import Content, SampleIndex, contents
from wds_train.dataset.reader import SplitReader, readings
from wds_train.dataset.shared_index import AT_ONCE, SharedIndex
from wds_train.errors import DataError
from wds_train.loader.cache import BlockCache
from wds_train.loader.plan import Fetched, Request
from wds_train.rng import Ids

FETCH_THREADS = 8  # GETs at a time, of one worker
# Per worker: enough to cover the store's latency, and little compared to the windows themselves.
AHEAD_BYTES = 32 << 20
# Pieces of a slab are freed one by one, and the whole only with the last of them.
SLAB_BYTES = 32 << 20
GAP_BYTES = 64 << 10  # to fetch a hole this small costs less than another request
ROWS_AHEAD = 32  # requests whose rows are read ahead: the first of each lane
# Up to here a request's fixed cost outweighs its bytes: the first windows of small images.
SMALL_BYTES = 512 << 10

Records = dict[int, memoryview | DataError]


class Memory:
    """Allocator for read buffers. A slab is reused once all its slices are freed.

    What is cut from one slab is read, and used up, at about the same time. malloc would scatter
    such pieces over an arena for every thread: the workers of docs/benchmarks.md take an eighth
    more memory with it. Nor is a slab given back to the kernel, which would clear it again page by
    page: that takes as long as receiving into it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = memoryview(b"")
        self._free: list[NDArray[np.uint8]] = []

    def take(self, size: int) -> memoryview:
        """Return a piece of `size` bytes, whose content is arbitrary."""
        with self._lock:
            if size > len(self._left):
                self._left = memoryview(b"")  # frees the old slab, so that it can be found again
                self._left = self._slab(size)
            taken = self._left[:size]
            self._left = self._left[size:]
            return taken

    def _slab(self, size: int) -> memoryview:
        if size > SLAB_BYTES:
            return _map_pages(size).data
        if self._free:
            slab = self._free.pop()
        else:
            slab = _map_pages(SLAB_BYTES)
        # Only the pieces cut from the slab hold this view: when it goes, the slab is free again.
        view = slab[:]
        weakref.finalize(view, self._free.append, slab).atexit = False
        return view.data


def _map_pages(size: int) -> NDArray[np.uint8]:
    """Return `size` bytes in ordinary pages, uint8 [size].

    NumPy would ask the kernel for huge pages, which come from memory that was free for long. In a
    virtual machine whose host has taken that back, they take 2 ms a MB to arrive, and an epoch of
    3,000 photographs takes a tenth longer.
    """
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8)


class _Pending(NamedTuple):
    """A request that is being read, by one future for each of its GETs."""

    request: Request
    bytes: int
    reads: list[Future[Records]]

    def wait(self) -> Fetched:
        """Wait for the bytes of all its samples, and put them into the request's order."""
        found: Records = {}
        for read in self.reads:
            found |= read.result()
        return Fetched(self.request, [found[sample] for sample in self.request.ids.tolist()])


class Fetcher:
    """Reads the bytes of requests in order, a bounded number of bytes ahead.

    Args:
        split: The split to read.
        cache: Keeps blocks of the split on a local disk.
        whole: Return all bytes of a sample, from its first tar header to the last padding.
            By default only its image's.

    Attributes:
        small: The number of samples that take about SMALL_BYTES.
    """

    def __init__(
        self, split: SplitReader, cache: BlockCache | None = None, *, whole: bool = False
    ) -> None:
        self._split = split
        self._cache = cache
        self._whole = whole
        # A manifest may claim that there are no bytes. Reading the samples tells what is wrong.
        self.small = SMALL_BYTES * len(split) // max(1, sum(split.shard_bytes))

    def __call__(self, requests: Iterable[Request]) -> Iterator[Fetched]:
        """Yield the bytes of `requests` in their order; an unreadable sample is a `DataError`."""
        pool = ThreadPoolExecutor(FETCH_THREADS)
        memory = Memory()
        pending: deque[_Pending] = deque()
        ahead = 0  # bytes of all that is pending
        # Little at first: reading would take the cores from the decoding of the first images.
        bound = AHEAD_BYTES // 8
        try:
            for request in read_rows_ahead(self._split.index, requests):
                # One GET for each run of neighbours.
                size = int(self._split.index.length[request.ids].sum())
                runs = self._split_runs(request.ids)
                reads = [pool.submit(self._read_run, run, memory) for run in runs]
                pending.append(_Pending(request, size, reads))
                ahead += size
                # Wait only when enough is on its way.
                while ahead > bound and len(pending) > 1:
                    done = pending[0].bytes
                    ahead -= done
                    bound = min(AHEAD_BYTES, bound + done)
                    yield pending.popleft().wait()
            while pending:
                yield pending.popleft().wait()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _split_runs(self, ids: Ids) -> list[Ids]:
        """Return `ids` sorted, and cut into runs that one GET each reads.

        They are cut where the shard changes, or a hole is not worth fetching. With a cache they
        are cut at blocks, too: those are what it keeps.
        """
        ids = np.sort(ids)
        before = ids[:-1]
        after = ids[1:]
        index = self._split.index
        hole = index.offset[after] - (index.offset[before] + index.length[before])
        cut = (index.shard[after] != index.shard[before]) | (hole > GAP_BYTES)
        if self._cache is not None:
            cut |= np.diff(self._cache.block_of(ids)) != 0
        return np.split(ids, np.flatnonzero(cut) + 1)

    def _read_run(self, ids: Ids, memory: Memory) -> Records:
        """Read the samples `ids` of one run, which are sorted."""
        # All bytes of the run.
        index = self._split.index
        if self._cache is not None and self._cache.keeps(ids[0]):
            first, block = self._cache.read(ids[0])
            data = memoryview(block)
        else:
            first = int(index.offset[ids[0]])
            end = int(index.offset[ids[-1]] + index.length[ids[-1]])
            data = memory.take(end - first)
            self._split.store.read_into(self._split.shard_of(ids[0]), first, data)

        # Columns at once: a cell of an array takes as long to get as the whole of it.
        starts = (index.offset[ids] - first).tolist()
        lengths = index.length[ids].tolist()
        samples = zip(ids.tolist(), starts, lengths, contents(index, ids), strict=True)
        found: Records = {}
        for sample, start, length, content in samples:
            found[sample] = self._check_or_reread(sample, data[start : start + length], content)
        return found

    def _check_or_reread(
        self, sample: int, record: memoryview, content: Content
    ) -> memoryview | DataError:
        """Return the wanted bytes of a sample, or why it is unreadable."""
        with contextlib.suppress(DataError):
            return self._check(record, content)
        # Read it again from the store: that mends a byte that flipped on the way or in the cache.
        if self._cache is not None:
            self._cache.drop(sample)
        times = readings(self._split.store)
        next(times)  # `record` was the first
        for _ in times:
            again = self._split.record(sample)
            try:
                return self._check(again, content)
            except DataError as error:
                damage = error
        return damage

    def _check(self, record: memoryview, content: Content) -> memoryview:
        """Return the wanted bytes of `record`; raise `DataError` if its CRC is another."""
        image = content.image(record)
        if self._whole:
            return record
        return image


def read_rows_ahead(index: SampleIndex, requests: Iterable[Request]) -> Iterator[Request]:
    """Yield requests once the index rows of their samples are in memory.

    The rows of a large split are read when they are first needed. Those of the next ROWS_AHEAD
    requests are read while earlier ones are used.

    Args:
        index: The index of the split. One that is in memory as a whole needs no reading.
        requests: The requests, in the order of need.
    """
    if not isinstance(index, SharedIndex):
        yield from requests
        return
    # Each request waits here, with the shards whose rows are being read for it.
    rows = index.rows
    pool = ThreadPoolExecutor(AT_ONCE)
    waiting: deque[tuple[Request, list[Future[None]]]] = deque()
    try:
        for request in requests:
            shards = rows.lacking(rows.shard_of(request.ids))
            waiting.append((request, [pool.submit(rows.fill, shard) for shard in shards]))
            if len(waiting) > ROWS_AHEAD:
                yield _wait_for_rows(*waiting.popleft())
        while waiting:
            yield _wait_for_rows(*waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _wait_for_rows(request: Request, fills: list[Future[None]]) -> Request:
    for fill in fills:
        fill.result()
    return request
