"""Blocks on a local disk, so that a second epoch asks S3 for nothing.

One file a block, under the dataset's fingerprint, written beside its place and renamed into it: a kill leaves no torn
file, and two processes that write one block write the same bytes. Which blocks may be kept is arithmetic too: the first
of the split, as far as `max_bytes` reaches. Epochs use every block equally often, so any subset serves as well as any
other, eviction would gain nothing, and no process needs to know what the others keep. What comes out is checked by the
samples' CRCs like what comes from S3; a damaged file is dropped and its sample fetched again.
"""

import contextlib
import os
import sys
import threading
from pathlib import Path

import numpy as np

from wds_train.dataset.reader import Dataset, SplitReader
from wds_train.dataset.shared_index import SharedIndex
from wds_train.errors import StoreError
from wds_train.loader.order import BLOCK, blocks
from wds_train.rng import Ids


def make_cache_folder(folder: Path, dataset: Dataset, split: str) -> Path:
    """Make the folder below `folder` that keeps blocks of a split of `dataset`, and return it.

    Raises:
        StoreError: It cannot be made.
    """
    place = folder / dataset.fingerprint[:16] / split
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the cache folder {place} cannot be made: {error.strerror}; choose another") from error
    return place


class BlockCache:
    """The cache of one split. `max_bytes` bounds the files of the split, all processes together."""

    def __init__(self, folder: Path, max_bytes: int, split: SplitReader, dataset: Dataset) -> None:
        self._split = split
        self._folder = make_cache_folder(folder, dataset, split.name)
        self._samples = np.asarray(split.shard_samples, np.int64)
        self._first = np.cumsum(self._samples) - self._samples  # sample of every shard
        counts = -(-self._samples // BLOCK)
        self._first_block = np.cumsum(counts) - counts
        self._kept = self._fitting(max_bytes)
        # Taken for ever by the first who finds that the disk takes no more, or that it cannot be read.
        self._full, self._broken = threading.Lock(), threading.Lock()

    def block_of(self, samples: Ids) -> Ids:
        """The number of the block that holds each sample."""
        shard = self._split.index.shard[samples]
        return self._first_block[shard] + (samples - self._first[shard]) // BLOCK

    def keeps(self, sample: int) -> bool:
        """Whether the sample's block may be on the disk."""
        return self._block(sample) < self._kept

    def read(self, sample: int) -> tuple[int, bytes]:
        """Where the sample's block starts in its shard, and the block's bytes, from the disk or else from the store."""
        block, index, shard = self._block(sample), self._split.index, int(self._split.index.shard[sample])
        first = int(self._first[shard] + (block - self._first_block[shard]) * BLOCK)
        last = min(first + BLOCK, int(self._first[shard] + self._samples[shard])) - 1
        start, path = int(index.offset[first]), self._path(block)
        length = int(index.offset[last] + index.length[last]) - start
        if not self._broken.locked():
            try:
                data = path.read_bytes()
                if len(data) == length:
                    return start, data
            except FileNotFoundError:
                pass
            except OSError as error:  # a disk that fails may take seconds for each
                self._give_up(self._broken, error, "it is used no more")
        data = self._split.store.read(self._split.shard_names[shard], start, length)
        self._keep(path, data)
        return start, data

    def drop(self, sample: int) -> None:
        """Forget the sample's block, whose bytes turned out to be damaged."""
        with contextlib.suppress(OSError):  # of a disk that lets nothing be removed, the store is read all the same
            self._path(self._block(sample)).unlink(missing_ok=True)

    def _fitting(self, max_bytes: int) -> int:
        """How many of the first blocks `max_bytes` hold; of shards whose rows would all have to be read for it, those of whole
        ones.
        """
        index = self._split.index
        if isinstance(index, SharedIndex):
            shards = int(np.searchsorted(np.cumsum(self._split.shard_bytes), max_bytes, side="right"))
            return int((-(-self._samples[:shards] // BLOCK)).sum())
        first, length = blocks(self._split.shard_samples)
        last = first + length - 1
        sizes = index.offset[last] + index.length[last] - index.offset[first]
        return int(np.searchsorted(np.cumsum(sizes), max_bytes, side="right"))

    def _keep(self, path: Path, data: bytes) -> None:
        if self._full.locked() or self._broken.locked():
            return
        partial = path.with_name(
            f".{path.name}.{os.getpid()}-{threading.get_ident()}"
        )  # threads may read one block, too
        try:
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            # A full disk costs speed, never the run. No more is added: each try would write most of a block in vain.
            with contextlib.suppress(OSError):  # on a disk that became read-only
                partial.unlink(missing_ok=True)
            self._give_up(self._full, error, "nothing more is added to it")

    def _give_up(self, for_ever: threading.Lock, error: OSError, what: str) -> None:
        if for_ever.acquire(blocking=False):  # of several threads that fail at one moment, one says so
            print(f"cache: {self._folder}: {error.strerror}; {what}, and the store is read instead", file=sys.stderr)

    def _block(self, sample: int) -> int:
        return int(self.block_of(np.asarray(sample)))

    def _path(self, block: int) -> Path:
        return self._folder / f"{block:08d}"
