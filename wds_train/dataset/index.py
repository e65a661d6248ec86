"""The index of a split, beside its shards: a Parquet table with a row per sample, which says where its bytes are. A large split
has one of the same form for each shard.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from wds_train.dataset.arrow import to_batch, to_numpy
from wds_train.errors import DataError

# No image of more is put into a shard or decoded from one, which bounds a loader worker's memory (3 bytes a pixel; a
# progressive JPEG, the dearest, takes 9). Checked on the header, before any pixel is made.
MAX_PIXELS = 2**26
WHOLE_INDEX_SAMPLES = 2_000_000  # in one index, which every process holds: 150 MB of them. ImageNet has 1.28 M
MAX_KEY = 4096  # bytes, in tars of others: what a path may have

SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("data_offset", pa.int64()),
        ("data_length", pa.int64()),
        ("label", pa.int32()),
        ("key", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("crc32", pa.uint32()),
    ]
)


def index_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_batches([to_batch(([row[name] for row in rows] for name in SCHEMA.names), SCHEMA)])


def write_index(rows: Sequence[dict[str, Any]] | pa.Table) -> bytes:
    """The Parquet file of `rows`, in dataset order; the same bytes for the same rows and pyarrow version."""
    table = rows if isinstance(rows, pa.Table) else index_table(rows)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    return sink.getvalue()


@dataclass(frozen=True)
class SampleIndex:
    """The index as columns, each [samples], in dataset order: sample i is row i."""

    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    data_offset: NDArray[np.int64]
    data_length: NDArray[np.int64]
    label: NDArray[np.int32]
    key: pa.ChunkedArray
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    crc32: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.offset)

    def key_of(self, sample: int) -> str:
        return self.key[sample].as_py()


def read_index(data: bytes, where: str) -> SampleIndex:
    """Read an index found at `where`; `DataError` when it is not one."""
    try:
        # Not with threads: with torch loaded, a process that ends soon after Arrow began some ends in SIGABRT at times.
        # Not pq.read_table either: it imports pandas.
        table = pq.ParquetFile(pa.BufferReader(data)).read(SCHEMA.names, use_threads=False).select(SCHEMA.names)
        table.validate(full=True)  # of texts that are no UTF-8, the first that is asked for would be a traceback
        if table.schema != SCHEMA:  # a cast that changes nothing still imports a module that takes 90 ms
            table = table.cast(SCHEMA)
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        raise DataError(f"{where} is not an index that can be read: {error}") from error
    if any(table[name].null_count for name in SCHEMA.names):
        raise DataError(f"{where} is not an index that can be read: it has empty cells")
    columns: dict[str, Any] = {name: to_numpy(table[name]) for name in SCHEMA.names if name != "key"}
    return SampleIndex(key=table["key"], **columns)


def flaws(index: SampleIndex, shards: Sequence[tuple[int, int]], classes: int) -> Iterator[str]:
    """What makes `index` useless for shards of (bytes, samples) and labels in [0, classes): a sentence for each kind of flaw,
    with the first row that has it. The loader refuses such an index, and `verify` names the flaws.
    """
    rows = len(index)
    if rows and not 0 <= index.shard.min() <= index.shard.max() < len(shards):
        yield f"it holds shard numbers {index.shard.min()}..{index.shard.max()}, the manifest has {len(shards)} shards"
        return
    counts = np.bincount(index.shard, minlength=len(shards))
    if not np.array_equal(counts, [samples for _, samples in shards]):
        yield "it and the manifest disagree on the samples per shard"
        return
    size = np.array([size for size, _ in shards], np.int64)[index.shard]
    end, image_end = index.offset + index.length, index.data_offset + index.data_length  # may overflow: looked at last
    same = index.shard[1:] == index.shard[:-1]
    ordered = np.ones(rows, bool)
    ordered[1:] = np.where(same, index.offset[1:] >= end[:-1], index.shard[1:] > index.shard[:-1])
    sound = {
        "offset": (index.offset >= 0, "is negative"),
        "length": ((index.length > 0) & (index.length <= size), "is not in the shard"),
        "offset ": ((index.offset <= size) & (end <= size), "lies beyond the shard's end with its length"),
        "data_offset": (
            (index.data_offset > index.offset) & (index.data_offset < end),
            "is not behind the sample's start, or not in it",
        ),
        "data_length": (
            (index.data_length > 0) & (index.data_length <= index.length) & (image_end <= end),
            "is not in the sample",
        ),
        "shard": (ordered, "and offset are not in ascending order"),
        "width": ((index.width > 0) & (index.width <= MAX_PIXELS), "is no number of pixels that can be read"),
        "height": ((index.height > 0) & (index.height <= MAX_PIXELS), "is no number of pixels that can be read"),
    }
    for name, (fine, what) in sound.items():
        if not fine.all():
            row = int(np.flatnonzero(~fine)[0])
            value = getattr(index, name.strip())[row]
            yield f"row {row}: {name.strip()} {value} {what}" + (
                f", and {(~fine).sum() - 1} rows more" if (~fine).sum() > 1 else ""
            )
    if (odd := _odd_key(index.key)) is not None:
        yield f"row {odd}: key {index.key_of(odd)[:60]!r} is no name of a line"
    if rows and not (index.label.min() >= 0 and index.label.max() < classes):
        yield f"it holds labels {index.label.min()}..{index.label.max()}, the dataset has {classes} classes"


def _odd_key(keys: pa.ChunkedArray) -> int | None:
    """The first row whose key is empty, longer than a path, or holds control characters. On the bytes, in no time: a list
    of a million texts takes a second.
    """
    before = 0
    for chunk in keys.chunks:
        if len(chunk):
            ends = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset :][: len(chunk) + 1]
            text = np.frombuffer(chunk.buffers()[2] or b"", np.uint8)[: ends[-1]]
            odd = np.flatnonzero((np.diff(ends) == 0) | (np.diff(ends) > MAX_KEY))
            control = np.searchsorted(ends, np.flatnonzero((text < 32) | (text == 127)), side="right") - 1
            rows = np.concatenate([odd, control[control >= 0]])
            if len(rows):
                return before + int(rows.min())
        before += len(chunk)
    return None


class Content(NamedTuple):
    """Where a sample's image is in its record (header to padding), and the record's checksum."""

    start: int
    length: int
    crc32: int

    def image(self, record: memoryview) -> memoryview:
        """The image's bytes within `record`; `DataError` when it is damaged."""
        # Python's zlib takes 18 times as long for it: .02 ms for a photograph, 2 % of its decoding.
        if crc32(record) != self.crc32:
            raise DataError("its bytes do not match the checksum in the index")
        return record[self.start : self.start + self.length]


def contents(index: SampleIndex, samples: NDArray[np.int64]) -> list[Content]:
    """The `Content` of each of `samples`; all at once, since a cell of an array takes as long to get as the whole column."""
    columns = index.data_offset[samples] - index.offset[samples], index.data_length[samples], index.crc32[samples]
    return [Content(*each) for each in zip(*(column.tolist() for column in columns), strict=True)]


def image_of(index: SampleIndex, sample: int, record: memoryview) -> memoryview:
    """The image's bytes within the sample's `record`; `DataError` when it is damaged."""
    return contents(index, np.array([sample]))[0].image(record)
