"""Blocks on a local disk, so that a second epoch asks S3 for nothing.

Each block is a file below the dataset's fingerprint. It is written under another name and renamed:
a kill leaves no torn file, and two processes that write one block write the same bytes.

Which blocks may be kept is arithmetic, too: the first of the split, as far as `max_bytes` reaches.
Epochs use every block equally often. So any subset serves as well as any other, eviction would gain
nothing, and no process needs to know what the others keep.

What comes out is checked by the samples' CRCs, like what comes from S3. A damaged file is dropped,
and its sample fetched again.
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
    """Make the folder that keeps the blocks of a split.

    Args:
        folder: Where all caches are.
        dataset: The dataset.
        split: The split's name.

    Returns:
        A folder below `folder`, which other versions of the dataset do not share.

    Raises:
        StoreError: It cannot be made.
    """
    place = folder / dataset.fingerprint[:16] / split
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"the cache folder {place} cannot be made: {error.strerror}; choose another"
        ) from error
    return place


class BlockCache:
    """The cache of one split.

    Args:
        folder: Where all caches are. The split has a folder below it.
        max_bytes: The most bytes that the split's files take, of all processes together.
        split: The split.
        dataset: The dataset that it belongs to.

    Raises:
        StoreError: The folder cannot be made.
    """

    def __init__(self, folder: Path, max_bytes: int, split: SplitReader, dataset: Dataset) -> None:
        # Blocks are numbered through the split, as the order numbers them.
        self._split = split
        self._folder = make_cache_folder(folder, dataset, split.name)
        self._samples = np.asarray(split.shard_samples, np.int64)
        self._first = np.cumsum(self._samples) - self._samples  # sample of every shard
        counts = -(-self._samples // BLOCK)
        self._first_block = np.cumsum(counts) - counts
        self._kept = self._count_fitting(max_bytes)
        # Each is taken for good by the first thread that finds that the disk takes no more, or
        # that it cannot be read.
        self._full = threading.Lock()
        self._broken = threading.Lock()

    def block_of(self, samples: Ids) -> Ids:
        """Return the number of the block that holds each of `samples`, int64 [n]."""
        shard = self._split.index.shard[samples]
        return self._first_block[shard] + (samples - self._first[shard]) // BLOCK

    def keeps(self, sample: int) -> bool:
        """Return True if the block of a sample may be on the disk."""
        return self._block(sample) < self._kept

    def read(self, sample: int) -> tuple[int, bytes]:
        """Read the block of `sample` from the disk, or else from the store.

        Returns:
            The byte of the shard where the block starts, and the block's bytes.
        """
        block = self._block(sample)
        index = self._split.index
        shard = int(index.shard[sample])

        # Where the block lies in its shard. The shard's last block may be shorter.
        first = int(self._first[shard] + (block - self._first_block[shard]) * BLOCK)
        shard_end = int(self._first[shard] + self._samples[shard])
        last = min(first + BLOCK, shard_end) - 1
        start = int(index.offset[first])
        length = int(index.offset[last] + index.length[last]) - start

        # The disk, or else the store, whose bytes are kept.
        path = self._path(block)
        if not self._broken.locked():
            try:
                data = path.read_bytes()
                if len(data) == length:
                    return start, data
            except FileNotFoundError:
                pass
            except OSError as error:  # a disk that fails may take seconds for each try
                self._give_up(self._broken, error, "it is used no more")
        data = self._split.store.read(self._split.shard_names[shard], start, length)
        self._keep(path, data)
        return start, data

    def drop(self, sample: int) -> None:
        """Remove the block of a sample whose bytes turned out to be damaged."""
        # If the disk does not let it be removed, the sample still comes from the store.
        with contextlib.suppress(OSError):
            self._path(self._block(sample)).unlink(missing_ok=True)

    def _count_fitting(self, max_bytes: int) -> int:
        """Return the number of the split's first blocks that fit into `max_bytes`.

        For a large split this would read the rows of all shards. There only the blocks of shards
        that fit as a whole count.
        """
        index = self._split.index
        if isinstance(index, SharedIndex):
            sizes = np.cumsum(self._split.shard_bytes)
            shards = int(np.searchsorted(sizes, max_bytes, side="right"))
            return int((-(-self._samples[:shards] // BLOCK)).sum())

        # Else the size of every block is known.
        first, length = blocks(self._split.shard_samples)
        last = first + length - 1
        sizes = np.cumsum(index.offset[last] + index.length[last] - index.offset[first])
        return int(np.searchsorted(sizes, max_bytes, side="right"))

    def _keep(self, path: Path, data: bytes) -> None:
        if self._full.locked() or self._broken.locked():
            return
        # Several threads may read one block, too.
        partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            # A full disk costs speed, never the run. Nothing more is added: each try would write
            # most of a block in vain.
            with contextlib.suppress(OSError):  # on a disk that became read-only
                partial.unlink(missing_ok=True)
            self._give_up(self._full, error, "nothing more is added to it")

    def _give_up(self, reason: threading.Lock, error: OSError, consequence: str) -> None:
        """Take the lock `reason` for good, and print why.

        Of several threads that fail at the same moment, only the first one prints.
        """
        if reason.acquire(blocking=False):
            print(
                f"cache: {self._folder}: {error.strerror}; {consequence}, "
                "and the store is read instead",
                file=sys.stderr,
            )

    def _block(self, sample: int) -> int:
        return int(self.block_of(np.asarray(sample)))

    def _path(self, block: int) -> Path:
        return self._folder / f"{block:08d}"
