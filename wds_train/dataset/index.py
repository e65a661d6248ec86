"""The index of a split, next to its shards: a Parquet table with a row per sample.

A row says where the sample's bytes are. A large split has an index of the same form for each shard.
The conversion writes it; `reader.Dataset` reads and checks it.
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

# No larger image is put into a shard or decoded from one, which bounds a loader worker's memory
# (3 bytes a pixel; a progressive JPEG, the dearest, takes 9). Checked on the header, before any
# pixel is made.
MAX_PIXELS = 2**26
# In one index, which every process holds: 150 MB for so many. ImageNet has 1.28 M.
WHOLE_INDEX_SAMPLES = 2_000_000
# Bytes, in tars that others wrote: as long as a path.
MAX_KEY = 4096

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
    """Return `rows`, dictionaries of SCHEMA's columns, as a table."""
    columns = []
    for name in SCHEMA.names:
        columns.append([row[name] for row in rows])
    return pa.Table.from_batches([to_batch(columns, SCHEMA)])


def write_index(rows: Sequence[dict[str, Any]] | pa.Table) -> bytes:
    """Return the Parquet file of an index.

    The same rows give the same bytes with the same version of pyarrow.

    Args:
        rows: The rows in dataset order, as dictionaries of SCHEMA's columns or as a table.
    """
    if isinstance(rows, pa.Table):
        table = rows
    else:
        table = index_table(rows)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    return sink.getvalue()


@dataclass(frozen=True)
class SampleIndex:
    """The index as columns, each [samples], in dataset order: sample i is row i.

    Attributes:
        shard: The number of the shard that holds the sample.
        offset: Where the sample's first tar header starts in the shard, bytes.
        length: The bytes of the sample, from there to its last padding.
        data_offset: Where its image starts in the shard, bytes.
        data_length: The bytes of its image.
        label: Its class, in [0, classes).
        key: Its key.
        width: The width of the upright image, pixels.
        height: The height of the upright image, pixels.
        crc32: The checksum of all bytes of the sample.
    """

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
        """The number of samples."""
        return len(self.offset)

    def key_of(self, sample: int) -> str:
        """Return the key of `sample`."""
        return self.key[sample].as_py()


def read_index(data: bytes, where: str) -> SampleIndex:
    """Read an index.

    Args:
        data: The Parquet file.
        where: Its address, for messages.

    Raises:
        DataError: It is not an index.
    """
    try:
        # Not with threads: with torch loaded, a process that ends soon after Arrow began some ends
        # in SIGABRT at times. Not with pq.read_table either: it imports pandas.
        file = pq.ParquetFile(pa.BufferReader(data))
        table = file.read(SCHEMA.names, use_threads=False).select(SCHEMA.names)
        # Otherwise, the first key that is not UTF-8 would end in a traceback when it is asked for.
        table.validate(full=True)
        # A cast that changes nothing still imports a module that takes 90 ms.
        if table.schema != SCHEMA:
            table = table.cast(SCHEMA)
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        KeyError,
        MemoryError,
        OverflowError,
    ) as error:
        raise DataError(f"{where} is not an index that can be read: {error}") from error

    columns: dict[str, Any] = {}
    for name in SCHEMA.names:
        column = table[name]
        if column.null_count:
            raise DataError(f"{where} is not an index that can be read: it has empty cells")
        # Keys stay as they are: a list of a million texts takes a second to make.
        if name == "key":
            columns[name] = column
        else:
            columns[name] = to_numpy(column)
    return SampleIndex(**columns)


def find_flaws(
    index: SampleIndex, shards: Sequence[tuple[int, int]], classes: int
) -> Iterator[str]:
    """Yield a sentence for each kind of flaw, with the first row that has it.

    The loader refuses an index with flaws, and `verify` names them.

    Args:
        index: The index.
        shards: The bytes and the samples of each shard that it should be of.
        classes: The number of classes; labels are in [0, classes).
    """
    # The shard of each row first: all else compares a row with its shard.
    rows = len(index)
    if rows and not 0 <= index.shard.min() <= index.shard.max() < len(shards):
        yield (
            f"it holds shard numbers {index.shard.min()}..{index.shard.max()}, "
            f"the manifest has {len(shards)} shards"
        )
        return
    counts = np.bincount(index.shard, minlength=len(shards))
    if not np.array_equal(counts, [samples for _, samples in shards]):
        yield "it and the manifest disagree on the samples per shard"
        return

    yield from _find_column_flaws(index, shards)

    # Messages and file names show keys; labels are places in the list of classes.
    odd = _find_odd_key(index.key)
    if odd is not None:
        yield f"row {odd}: key {index.key_of(odd)[:60]!r} is no name of a line"
    if rows and not (index.label.min() >= 0 and index.label.max() < classes):
        yield (
            f"it holds labels {index.label.min()}..{index.label.max()}, "
            f"the dataset has {classes} classes"
        )


def _find_column_flaws(index: SampleIndex, shards: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Yield a sentence for each column with numbers that cannot be right."""
    size = np.array([size for size, _ in shards], np.int64)[index.shard]
    # These sums may overflow. They matter only where the checks before them hold.
    end = index.offset + index.length
    image_end = index.data_offset + index.data_length

    # Each row against the one before it.
    same_shard = index.shard[1:] == index.shard[:-1]
    ordered = np.ones(len(index), bool)
    ordered[1:] = np.where(
        same_shard, index.offset[1:] >= end[:-1], index.shard[1:] > index.shard[:-1]
    )

    # The column that is named, the rows that are sound, and the flaw of the others.
    in_pixels = "is no number of pixels that can be read"
    checks = [
        ("offset", index.offset >= 0, "is negative"),
        ("length", (index.length > 0) & (index.length <= size), "is not in the shard"),
        (
            "offset",
            (index.offset <= size) & (end <= size),
            "lies beyond the shard's end with its length",
        ),
        (
            "data_offset",
            (index.data_offset > index.offset) & (index.data_offset < end),
            "is not behind the sample's start, or not in it",
        ),
        (
            "data_length",
            (index.data_length > 0) & (index.data_length <= index.length) & (image_end <= end),
            "is not in the sample",
        ),
        ("shard", ordered, "and offset are not in ascending order"),
        ("width", (index.width > 0) & (index.width <= MAX_PIXELS), in_pixels),
        ("height", (index.height > 0) & (index.height <= MAX_PIXELS), in_pixels),
    ]
    for name, sound, flaw in checks:
        wrong = np.flatnonzero(~sound)
        if len(wrong):
            row = int(wrong[0])
            others = ""
            if len(wrong) > 1:
                others = f", and {len(wrong) - 1} rows more"
            yield f"row {row}: {name} {getattr(index, name)[row]} {flaw}{others}"


def _find_odd_key(keys: pa.ChunkedArray) -> int | None:
    """Return the first row whose key is empty, longer than a path, or has control characters.

    It looks at the bytes, in no time: a list of a million texts takes a second.
    """
    before = 0
    for chunk in keys.chunks:
        if len(chunk):
            rows = _find_odd_keys(chunk)
            if len(rows):
                return before + int(rows.min())
        before += len(chunk)
    return None


def _find_odd_keys(chunk: pa.StringArray) -> NDArray[np.int64]:
    """Return the rows of `chunk`, in no order, whose keys are odd."""
    # Arrow keeps the texts one after the other, and where each ends.
    ends = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset :][: len(chunk) + 1]
    text = np.frombuffer(chunk.buffers()[2] or b"", np.uint8)[: ends[-1]]
    lengths = np.diff(ends)
    odd = np.flatnonzero((lengths == 0) | (lengths > MAX_KEY))

    # The rows that the control characters are in. Texts before the chunk's own give -1.
    control = np.flatnonzero((text < 32) | (text == 127))
    rows_of_control = np.searchsorted(ends, control, side="right") - 1
    return np.concatenate([odd, rows_of_control[rows_of_control >= 0]])


class Content(NamedTuple):
    """The place of a sample's image in its record, and the record's checksum.

    A record is all bytes of a sample, from its first tar header to the last padding.

    Attributes:
        start: Where the image starts in the record.
        length: The image's bytes.
        crc32: The record's checksum.
    """

    start: int
    length: int
    crc32: int

    def image(self, record: memoryview) -> memoryview:
        """Return the bytes of the image in `record`; raise `DataError` if its CRC is another."""
        # Python's zlib takes 18 times as long: .02 ms for a photograph, 2 % of its decoding.
        if crc32(record) != self.crc32:
            raise DataError("its bytes do not match the checksum in the index")
        return record[self.start : self.start + self.length]


def contents(index: SampleIndex, samples: NDArray[np.int64]) -> list[Content]:
    """Return the `Content` of each of `samples`.

    Ask for all at once: a cell of an array takes as long to get as the whole column.

    Args:
        index: The index.
        samples: The numbers of the samples, int64 [n].
    """
    starts = (index.data_offset[samples] - index.offset[samples]).tolist()
    lengths = index.data_length[samples].tolist()
    checksums = index.crc32[samples].tolist()
    return [Content(*each) for each in zip(starts, lengths, checksums, strict=True)]


def image_of(index: SampleIndex, sample: int, record: memoryview) -> memoryview:
    """Return the bytes of the image of a sample.

    Args:
        index: The index.
        sample: The number of the sample.
        record: All bytes of the sample, as `SplitReader.record` reads them.

    Raises:
        DataError: The record's CRC is not the index's.
    """
    return contents(index, np.array([sample]))[0].image(record)
