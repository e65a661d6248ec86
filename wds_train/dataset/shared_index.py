"""The rows of a split that has an index for each shard: read when they are first asked for, into one file that all processes of
this machine map, the workers and ranks of every training.

The file has a place of fixed width for every sample, and a checksum for every shard. It takes room on the disk as it fills,
and memory while there is some to spare. A shard's rows are there when their checksum agrees: what a kill, or the machine's
crash, left half-written is read again. Processes that read one shard at once write the same bytes.
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

# A sample's row: SampleIndex's, but for the shard, which follows from the place, and the key, which only messages need.
ROW = np.dtype(
    [("offset", "<i8"), ("label", "<i4"), ("width", "<i4"), ("height", "<i4"), ("crc32", "<u4")]
    + [(name, "<u4") for name in ("length", "data_start", "data_length")]  # data_start: from the sample's own start
)
AT_ONCE = 16  # index objects: each is small, and takes the store's latency
KEPT_KEYS = 1024  # shards: more than the windows of all lanes touch at a time


class SharedRows:
    """The rows of shards with these numbers of `samples`; `read` brings a shard's own index, checked. To be opened first."""

    def __init__(self, samples: Sequence[int], read: Callable[[int], SampleIndex]) -> None:
        self._read = read
        self._ends = np.cumsum(samples, dtype=np.int64)
        self._known = np.zeros(len(samples), bool)  # to be there, by this process
        self._keys = lru_cache(KEPT_KEYS)(lambda shard: read(shard).key)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def open(self, folder: Path, *content: str) -> "SharedRows":
        """Map the file in `folder` of the rows whose index objects have the sha256s `content`, and make it if there is none."""
        key = hashlib.sha256(json.dumps([ROW.descr, self._ends.tolist(), content]).encode()).hexdigest()
        self._path, room = folder / key[:32], len(self) * ROW.itemsize
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch(0o600)
            lacks, free = room - self._path.stat().st_blocks * 512, shutil.disk_usage(folder).free
            if lacks > free:
                raise StoreError(
                    f"{folder} has {free / 1e6:,.0f} MB free, the index of {len(self):,} samples takes {lacks / 1e6:,.0f}; "
                    "free some, or set WDS_HOME to a folder on a larger disk"
                )
            with self._path.open("r+b", buffering=0) as file:
                os.ftruncate(file.fileno(), room + 4 * len(self._ends))  # of zeros, which take no room
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except (OSError, ValueError, OverflowError) as error:  # the manifest may name any number of samples
            raise self._unusable(error) from error
        self._table: NDArray[np.void] = np.ndarray(len(self), ROW, mapped)
        self._sums: NDArray[np.uint32] = np.ndarray(len(self._ends), np.uint32, mapped, room)
        return self

    def shard_of(self, samples: Any) -> Any:
        """The shard of each of `samples`: a number, or an array of them."""
        return np.searchsorted(self._ends, samples, side="right")

    def column(self, name: str, samples: Any) -> Any:
        """The cells of `samples`: a number, an array of them, or a slice."""
        shards = np.arange(len(self._ends)) if isinstance(samples, slice) else self.shard_of(samples)
        if not self._known[shards].all():
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(self.fill, self.lacking(shards)))
        return self._table[name][samples]

    def lacking(self, shards: Any) -> list[int]:
        """Those of `shards` that this process has not met yet."""
        wanted = np.unique(shards)
        return wanted[~self._known[wanted]].tolist()

    def fill(self, shard: int) -> None:
        """See that the rows of `shard` are there."""
        start, end = self._place(shard)
        stored = int(self._sums[shard])
        if not stored or crc32(self._table[start:end].tobytes()) != stored:
            rows = _packed(self._read(shard))
            # Written, not stored into the map: on a full disk, that would end the process by a signal.
            self._write(start * ROW.itemsize, rows)
            self._write(self._table.nbytes + 4 * shard, np.array(crc32(rows), np.uint32).tobytes())
        self._known[shard] = True

    def key(self, sample: int) -> pa.StringScalar:
        shard = int(self.shard_of(sample))
        return self._keys(shard)[int(sample) - self._place(shard)[0]]

    def _place(self, shard: int) -> tuple[int, int]:
        """The first sample of `shard`, and that after its last."""
        return int(self._ends[shard - 1]) if shard else 0, int(self._ends[shard])

    def _write(self, place: int, data: bytes) -> None:
        try:
            with self._path.open("r+b", buffering=0) as file:
                while data:
                    written = os.pwrite(file.fileno(), data, place)
                    place, data = place + written, data[written:]
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> StoreError:
        cause = getattr(error, "strerror", None) or error
        return StoreError(
            f"{self._path}, which holds the dataset's index, cannot be written ({cause}); free some room, or set WDS_HOME to "
            "another folder"
        )


def _packed(index: SampleIndex) -> bytes:
    """The rows of an index, as the file has them."""
    if (index.length >= 1 << 32).any():
        raise DataError(f"a sample of {index.length.max():,} bytes cannot be streamed; leave it out")
    rows = np.empty(len(index), ROW)
    for name in ROW.names or ():
        rows[name] = index.data_offset - index.offset if name == "data_start" else getattr(index, name)
    return rows.tobytes()


class Column:
    """A column of a `SharedIndex`. What it is asked for as one would ask an array is read first where it has to be; `[:]` is all
    of it.
    """

    def __init__(self, of: Callable[[Any], Any]) -> None:
        self._of = of

    def __getitem__(self, samples: Any) -> Any:
        return self._of(samples)

    __eq__ = __hash__ = None  # type: ignore[assignment]  # no silent False where [:] was forgotten


@dataclass(frozen=True)
class SharedIndex(SampleIndex):
    """A `SampleIndex` whose columns are read from `rows`."""

    rows: SharedRows

    def __len__(self) -> int:
        return len(self.rows)


def shared_index(rows: SharedRows) -> SharedIndex:
    def typed(name: str, samples: Any) -> Any:
        return rows.column(name, samples).astype(SCHEMA.field(name).type.to_pandas_dtype(), copy=False)

    def data_offset(samples: Any) -> Any:
        return rows.column("offset", samples) + rows.column("data_start", samples)

    columns: dict[str, Any] = {name: Column(partial(typed, name)) for name in SCHEMA.names}
    columns |= {
        "shard": Column(lambda samples: rows.shard_of(samples).astype(np.int32)),
        "key": Column(rows.key),
        "data_offset": Column(data_offset),
    }
    return SharedIndex(**columns, rows=rows)
