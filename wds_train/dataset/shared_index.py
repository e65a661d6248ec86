"""The index of a large split, whose rows are read when they are first asked for.

The rows go into one file that all processes of this machine map: the workers and ranks of every
training. The file has a place of fixed width for every sample, and a checksum for every shard. It
takes room on the disk as it fills, and memory while there is some to spare.

A shard's rows are there when their checksum agrees. What a kill, or the machine's crash, left
half-written is read again. Processes that read one shard at once write the same bytes.
"""

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from wds_train.dataset.index import SCHEMA, SampleIndex
from wds_train.errors import DataError, StoreError

# A sample's row is SampleIndex's without the shard, which follows from the sample's number, and
# without the key, which only messages need. data_start counts from the sample's own start.
ROW = np.dtype(
    [
        ("offset", "<i8"),
        ("label", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("crc32", "<u4"),
        ("length", "<u4"),
        ("data_start", "<u4"),
        ("data_length", "<u4"),
    ]
)
# Index objects that are read at a time: each is small, and takes the store's latency.
AT_ONCE = 16
# Shards whose keys are kept: more than the windows of all lanes touch at a time.
KEPT_KEYS = 1024


class SharedRows:
    """The rows of a split's shards, in a file that all processes of this machine map.

    Args:
        samples: The number of samples in each shard.
        read: Reads and checks the index of one shard.
        folder: The folder of the file, which is made if it is missing, and so is the file.
        content: The sha256 of each shard's index, in order: the file belongs to these.

    Raises:
        StoreError: The file cannot be made, or the disk is too full for it.
    """

    def __init__(
        self,
        samples: Sequence[int],
        read: Callable[[int], SampleIndex],
        folder: Path,
        content: Sequence[str],
    ) -> None:
        self._read = read
        # The sample after the last one of each shard.
        self._ends = np.cumsum(samples, dtype=np.int64)
        # This process knows that the rows of these shards are there.
        self._known = np.zeros(len(samples), bool)
        self._keys = lru_cache(KEPT_KEYS)(lambda shard: read(shard).key)

        # The file: the rows of all samples, and behind them a checksum for each shard.
        identity = json.dumps([ROW.descr, self._ends.tolist(), content])
        self._path = folder / hashlib.sha256(identity.encode()).hexdigest()[:32]
        room = len(self) * ROW.itemsize
        mapped = self._map(room, room + 4 * len(self._ends))
        self._table: NDArray[np.void] = np.ndarray(len(self), ROW, mapped)
        self._sums: NDArray[np.uint32] = np.ndarray(len(self._ends), np.uint32, mapped, room)

    def __len__(self) -> int:
        """The number of samples."""
        return int(self._ends[-1])

    def _map(self, room: int, size: int) -> mmap.mmap:
        """Map the file, of `size` bytes, `room` of which are for rows; make it if there is none."""
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch(0o600)
            # A full disk would be met in the middle of a training.
            lacks = room - self._path.stat().st_blocks * 512
            free = shutil.disk_usage(folder).free
            if lacks > free:
                raise StoreError(
                    f"{folder} has {free / 1e6:,.0f} MB free, the index of {len(self):,} samples "
                    f"takes {lacks / 1e6:,.0f}; free some, or set WDS_HOME to a folder on a larger "
                    "disk"
                )
            with self._path.open("r+b", buffering=0) as file:
                # Of zeros, which take no room.
                os.ftruncate(file.fileno(), size)
                return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        # The manifest may name any number of samples.
        except (OSError, ValueError, OverflowError) as error:
            raise self._unusable(error) from error

    def shard_of(self, samples: Any) -> Any:
        """Return the shard of each of `samples`, a number or an array of them."""
        return np.searchsorted(self._ends, samples, side="right")

    def column(self, name: str, samples: Any) -> Any:
        """Return the cells of `samples` in a column of ROW, and read their rows if needed.

        Args:
            name: The column.
            samples: A number, an array of numbers, or a slice, which reads all rows.
        """
        if isinstance(samples, slice):
            shards = np.arange(len(self._ends))
        else:
            shards = self.shard_of(samples)
        if not self._known[shards].all():
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(self.fill, self.lacking(shards)))
        return self._table[name][samples]

    def lacking(self, shards: Any) -> list[int]:
        """Return those of `shards` whose rows this process has not met yet."""
        wanted = np.unique(shards)
        return wanted[~self._known[wanted]].tolist()

    def fill(self, shard: int) -> None:
        """Read the rows of `shard` into the file, unless they are there."""
        start, end = self._range_of(shard)
        # A checksum of 0 is that of rows that were never written.
        stored = int(self._sums[shard])
        if not stored or crc32(self._table[start:end].tobytes()) != stored:
            rows = _pack_rows(self._read(shard))
            # Written, not stored into the map: on a full disk, that would end the process by a
            # signal.
            self._write(start * ROW.itemsize, rows)
            checksum = np.array(crc32(rows), np.uint32).tobytes()
            self._write(self._table.nbytes + 4 * shard, checksum)
        self._known[shard] = True

    def key(self, sample: int) -> pa.StringScalar:
        """Return the key of `sample`."""
        shard = int(self.shard_of(sample))
        start, _ = self._range_of(shard)
        return self._keys(shard)[int(sample) - start]

    def _range_of(self, shard: int) -> tuple[int, int]:
        """Return the first sample of `shard`, and the one after its last."""
        start = 0
        if shard:
            start = int(self._ends[shard - 1])
        return start, int(self._ends[shard])

    def _write(self, position: int, data: bytes) -> None:
        """Write all of `data` at `position` of the file."""
        try:
            with self._path.open("r+b", buffering=0) as file:
                while data:
                    written = os.pwrite(file.fileno(), data, position)
                    position += written
                    data = data[written:]
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> StoreError:
        cause = getattr(error, "strerror", None) or error
        return StoreError(
            f"{self._path}, which holds the dataset's index, cannot be written ({cause}); "
            "free some room, or set WDS_HOME to another folder"
        )


def _pack_rows(index: SampleIndex) -> bytes:
    """Return the rows of an index as the file has them.

    Raises:
        DataError: A sample is too long for the column of lengths, 32 bits.
    """
    if (index.length >= 1 << 32).any():
        raise DataError(
            f"a sample of {index.length.max():,} bytes cannot be streamed; leave it out"
        )
    rows = np.empty(len(index), ROW)
    for name in ROW.names or ():
        if name == "data_start":
            rows[name] = index.data_offset - index.offset
        else:
            rows[name] = getattr(index, name)
    return rows.tobytes()


class Column:
    """A column of a `SharedIndex`, which is indexed like an array. `[:]` is all of it.

    Args:
        cells: Returns the cells of samples, and reads them first if needed.
    """

    def __init__(self, cells: Callable[[Any], Any]) -> None:
        self._cells = cells

    def __getitem__(self, samples: Any) -> Any:
        return self._cells(samples)

    # No silent False where [:] was forgotten.
    __eq__ = __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class SharedIndex(SampleIndex):
    """A `SampleIndex` whose columns are read from `rows`."""

    rows: SharedRows

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.rows)


def make_shared_index(rows: SharedRows) -> SharedIndex:
    """Return `rows` as an index, whose columns have the same names and dtypes as a whole one's.

    Args:
        rows: The rows, which are read when they are first asked for.
    """

    def typed(name: str, samples: Any) -> Any:
        dtype = SCHEMA.field(name).type.to_pandas_dtype()
        return rows.column(name, samples).astype(dtype, copy=False)

    def shard(samples: Any) -> Any:
        return rows.shard_of(samples).astype(np.int32)

    def data_offset(samples: Any) -> Any:
        return rows.column("offset", samples) + rows.column("data_start", samples)

    columns: dict[str, Any] = {}
    for name in SCHEMA.names:
        columns[name] = Column(partial(typed, name))
    # The columns that the file does not have.
    columns["shard"] = Column(shard)
    columns["key"] = Column(rows.key)
    columns["data_offset"] = Column(data_offset)
    return SharedIndex(**columns, rows=rows)
