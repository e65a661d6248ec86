"""Shards and their index: plain WebDataset tars, and beside them a Parquet table with a row per sample.

A sample is two adjacent members, `KEY.cls` (the label in ASCII) and `KEY.jpg|png|webp` (the image's bytes, untouched).
Headers carry no times, owners or modes of the machine: the same samples give the same bytes.
"""

import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from wds_train.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TAR_BLOCK = 512
# No image of more is put into a shard or decoded from one, which bounds a loader worker's memory (3 bytes a pixel; a
# progressive JPEG, the dearest, takes 9). Checked on the header, before any pixel is made.
MAX_PIXELS = 2**26
END_BYTES = 2 * TAR_BLOCK  # zeros
# A key is a tar member name before its extension: what webdataset groups by. No dots (webdataset cuts at the first),
# no odd characters (it must survive every tool), and short enough for a plain ustar header.
KEY = re.compile(r"[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*")
KEY_LENGTH = 90
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


@dataclass(frozen=True)
class Sample:
    """An image to be written: `key` as above, `label` in [0, classes), `image` as the source holds it."""

    key: str
    label: int
    image: bytes
    extension: str
    width: int
    height: int


class ShardWriter:
    """Builds one shard, and its index rows. `take` and `finish` hand over its bytes, piece by piece or all at once."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rows: list[dict[str, Any]] = []
        self._buffer = bytearray()
        self._taken = 0

    def add(self, sample: Sample) -> None:
        if not KEY.fullmatch(sample.key) or len(sample.key) > KEY_LENGTH:
            raise DataError(
                f"{sample.key!r} cannot be a sample's key; use letters, digits, '_', '-' and '/', at most {KEY_LENGTH}"
            )
        start = len(self._buffer)
        self._member(f"{sample.key}.cls", str(sample.label).encode())
        data_start = self._member(f"{sample.key}.{sample.extension}", sample.image)
        self.rows.append(
            {
                "shard": self.number,
                "offset": self._taken + start,
                "length": len(self._buffer) - start,
                "data_offset": self._taken + data_start,
                "data_length": len(sample.image),
                "label": sample.label,
                "key": sample.key,
                "width": sample.width,
                "height": sample.height,
                "crc32": zlib.crc32(memoryview(self._buffer)[start:]),
            }
        )

    @property
    def waiting(self) -> int:
        """Bytes that were not taken yet."""
        return len(self._buffer)

    def take(self) -> bytearray:
        """The shard's bytes since the last call, which end with a sample."""
        taken, self._buffer = self._buffer, bytearray()
        self._taken += len(taken)
        return taken

    def finish(self) -> bytearray:
        """The last of the shard's bytes, with the two zero blocks that end a tar; nothing can be added after."""
        self._buffer += bytes(END_BYTES)
        return self.take()

    def _member(self, name: str, data: bytes) -> int:
        self._buffer += _ustar_header(name.encode(), len(data))
        data_start = len(self._buffer)
        self._buffer += data
        self._buffer += bytes(-len(data) % TAR_BLOCK)
        return data_start


# tarfile's own header of a file of mode 644 with no time, owner or name of this machine: what is not filled in below.
TEMPLATE = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


def _ustar_header(name: bytes, size: int) -> bytes:
    """What tarfile would write, ten times as fast: name, size and checksum put into a template (POSIX.1-2001 ustar)."""
    assert len(name) <= 100 and size < 8 << 30, "the fields of a plain ustar header"
    header = bytearray(TEMPLATE)
    header[: len(name)] = name
    header[124:135] = b"%011o" % size
    header[148:156] = b" " * 8  # the checksum is taken with its own field as spaces
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def record_bytes(image_bytes: NDArray[np.int64]) -> NDArray[np.int64]:
    """What samples of images of these sizes take in a shard: two headers, a label's block, and the padded image."""
    return 3 * TAR_BLOCK + image_bytes + -image_bytes % TAR_BLOCK


def _padded(size: int) -> int:
    return size + -size % TAR_BLOCK


def to_array(values: Sequence[Any] | NDArray[Any], kind: pa.DataType) -> pa.Array:
    """Numbers, or text in UTF-8, as an Arrow array. By way of buffers: `pa.array`, and whatever else takes values from
    Python, imports pandas where there is one, for .4 s in every process.
    """
    if kind != pa.string():
        numbers = np.ascontiguousarray(values, kind.to_pandas_dtype())  # a NumPy type, whatever its name says
        return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])
    text = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, text)])
    assert ends[-1] < 1 << 31, "what an Arrow array of strings can hold"
    parts = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(text))]
    return pa.Array.from_buffers(kind, len(text), parts)


def to_batch(columns: Iterable[Sequence[Any]], schema: pa.Schema) -> pa.RecordBatch:
    """`columns` in the order of `schema`, without empty cells."""
    arrays = [to_array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def index_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_batches([to_batch(([row[name] for row in rows] for name in SCHEMA.names), SCHEMA)])


def to_numpy(numbers: pa.ChunkedArray) -> NDArray[Any]:
    """A column without empty cells, without pandas (see `to_array`)."""
    return np.from_dlpack(numbers.combine_chunks())


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


def image_of(index: SampleIndex, sample: int, record: memoryview) -> memoryview:
    """The image's bytes within the sample's `record` (header to padding); `DataError` when the record is damaged."""
    if zlib.crc32(record) != index.crc32[sample]:
        raise DataError("its bytes do not match the checksum in the index")
    start = int(index.data_offset[sample] - index.offset[sample])
    return record[start : start + int(index.data_length[sample])]


class Member(NamedTuple):
    """A member of a tar. `offset` is where its first header starts, `end` where its padding ends. `kind` is `file`,
    `directory`, or what else it is: no reader of ours acts on that.
    """

    name: str
    kind: str
    offset: int
    data_offset: int
    size: int

    @property
    def end(self) -> int:
        return self.data_offset + _padded(self.size)


KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.LNKTYPE: "hard link",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}
EXTENDED = {
    tarfile.XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
}
MAX_EXTENDED = 1 << 20


def members(read: Callable[[int, int], bytes], start: int, end: int) -> Iterator[Member]:
    """The members of the tar that lies at [start, end) of what `read(offset, length)` reads, from the headers alone.

    ustar, GNU and pax names and sizes (POSIX.1-2001 pax; GNU tar manual, "Basic Tar Format"). `DataError` for what is no
    tar or ends too early: a cut tar otherwise reads as a shorter one.
    """
    at = start
    while True:
        member, last = _member_at(read, at, end)
        if member is None:
            if any(read(last, min(end - last, 1 << 16))):
                raise DataError(f"more follows the end of the archive at byte {last}; is it two tars in one?")
            return
        yield member
        at = last


def _member_at(read: Callable[[int, int], bytes], offset: int, end: int) -> tuple[Member | None, int]:
    """The member whose headers start at `offset`, None at the archive's end; and where the next one starts."""
    at, given = offset, dict[str, str]()
    while True:
        info = _header(read, at, end)
        if info is None:
            return None, at + TAR_BLOCK
        data = at + TAR_BLOCK
        if info.type not in EXTENDED:
            break
        if not 0 <= info.size <= MAX_EXTENDED:  # a negative one would lead back, and round in circles for ever
            raise DataError(f"the extended header at byte {at} claims {info.size} bytes")
        given |= _extended(info.type, read(data, info.size))
        at = data + _padded(info.size)
    kind = (
        "sparse file" if any(name.startswith("GNU.sparse") for name in given) else KINDS.get(info.type, "special file")
    )
    size = info.size
    if (text := given.get("size")) is not None:
        if not re.fullmatch("[0-9]{1,18}", text):
            raise DataError(
                f"the extended header at byte {offset} gives the size {text[:40]!r}, which is no number of bytes"
            )
        size = int(text)
    size = size if kind in ("file", "sparse file") else 0
    member = Member(given.get("path", info.name), kind, offset, data, size)
    if size < 0 or member.end > end:
        raise DataError(f"it ends at byte {end}, in the middle of {member.name!r}")
    return member, member.end


def _header(read: Callable[[int, int], bytes], at: int, end: int) -> tarfile.TarInfo | None:
    if at + TAR_BLOCK > end:
        raise DataError(f"it ends at byte {end} without the blocks that end a tar: it was cut")
    block = read(at, TAR_BLOCK)
    if at == 0 and block[:2] == b"\x1f\x8b":
        raise DataError("it is compressed with gzip; unpack it to a plain tar first")
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None
    except tarfile.HeaderError as error:
        raise DataError(f"the tar header at byte {at} is damaged ({error})") from error


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if kind not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return {}
    records, at = {}, 0
    while at < len(data) and (length := re.match(rb"(\d{1,7}) ", data[at:])) and int(length[1]) > len(length[0]):
        name, _, value = data[at + len(length[0]) : at + int(length[1]) - 1].partition(b"=")
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += int(length[1])
    return records
