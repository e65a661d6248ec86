"""Make one shard: read, check, pack and upload its images, confirm it, and record it."""

import base64
import hashlib
import io
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from wds_train.conversion.conversion_report import Note
from wds_train.conversion.image_policy import ImagePolicy, check
from wds_train.conversion.repeats import NO_IMAGE, image_digest
from wds_train.conversion.shard_plan import shard_index_name, shard_name
from wds_train.conversion.sources.scan import read_bytes
from wds_train.dataset.index import SCHEMA, index_table, write_index
from wds_train.dataset.manifest import Index, Shard
from wds_train.dataset.shard import Sample, ShardWriter
from wds_train.errors import DataError, NotFound, StoreError
from wds_train.storage.base import PART_BYTES, Store

WIP = ".wip/"  # below the dataset; no manifest names what is there
RECORDED = np.dtype("<u8")  # of digests, on every machine that reads the record
COUNT_SECONDS = 0.2  # between two additions to the counts, for which processes wait for each other


@dataclass(frozen=True)
class Counts:
    """Counts of the source's bytes and images that are packed, by all processes together.

    Attributes:
        lock: Held for each addition.
        values: Bytes, images.
    """

    lock: Any
    values: Any

    def add(self, size: int, images: int) -> None:
        """Add `size` bytes and so many images."""
        with self.lock:
            self.values[0] += size
            self.values[1] += images


process_counts: Counts | None = None
"""The counts that this process adds to; None if nobody shows any."""


@dataclass(frozen=True)
class ShardTask:
    """All that it takes to make one shard.

    Attributes:
        store: The destination.
        plan: The plan's digest.
        split: The shard's split.
        number: The shard's number in its split.
        rows: The rows of its samples, in order.
        policy: How its images are checked.
        mark: Part of the names of objects that replace others.
        own_index: The shard's index is an object of its own.
    """

    store: Store
    plan: str
    split: str
    number: int
    rows: pa.Table
    policy: ImagePolicy
    mark: str = ""
    own_index: bool = False

    @property
    def name(self) -> str:
        """The object of the shard."""
        return shard_name(self.split, self.number, self.mark)

    @property
    def record(self) -> str:
        """The object that says that the shard is finished."""
        return f"{WIP}{self.split}/shard-{self.number:06d}.parquet"


@dataclass(frozen=True)
class ShardDone:
    """A finished shard, as its record in `.wip/` holds it.

    Attributes:
        shard: The manifest's entry.
        split: The shard's split.
        number: The shard's number in its split.
        tag: The object's version in the store.
        notes: Its samples that are not as they were in the source.
        altered: How many images were encoded again.
        digests: For each of the task's rows, in order, the `image_digest` of the packed image, or
            `NO_IMAGE` where none was packed.
        rows: The index rows of its samples; None where they are in the object `index`.
        index: The object with the index rows.
    """

    shard: Shard
    split: str
    number: int
    tag: str
    notes: list[Note]
    altered: int
    digests: NDArray[np.uint64]
    rows: pa.Table | None
    index: Index | None = None


class Packing:
    """The images of one shard: read, checked and packed while its first bytes are already uploaded.

    Args:
        task: The shard to make.
    """

    def __init__(self, task: ShardTask) -> None:
        self.task = task
        self.notes: list[Note] = []
        self.digests: list[int] = []
        self.altered = 0
        self.bytes = 0
        self.digest = hashlib.sha256()
        self.writer = ShardWriter(task.number)
        # Since the last addition to the counts:
        self._counted_at = 0.0
        self._size = 0
        self._images = 0

    def pieces(self) -> Iterator[bytearray]:
        """Yield the shard's bytes, in pieces of at least `PART_BYTES` except the last."""
        # Pillow warns of odd EXIF, of which the orientation is all that is used.
        warnings.filterwarnings("ignore", module="PIL")
        for row in self.task.rows.to_pylist():
            self._add(row)

            # The source's bytes are counted, since nobody knows the shard's before it is made.
            self._size += row["length"]
            self._images += 1
            if time.monotonic() - self._counted_at > COUNT_SECONDS:
                self._count()

            # S3 takes no smaller parts of an upload, except the last.
            if self.writer.waiting >= PART_BYTES:
                yield self._hashed(self.writer.take())
        self._count()
        yield self._hashed(self.writer.finish())

    def _count(self) -> None:
        if process_counts is not None:
            process_counts.add(self._size, self._images)
        self._counted_at = time.monotonic()
        self._size = 0
        self._images = 0

    def _hashed(self, piece: bytearray) -> bytearray:
        self.digest.update(piece)
        self.bytes += len(piece)
        return piece

    def _add(self, row: dict[str, Any]) -> None:
        """Pack the image of `row`, or note why it cannot be used."""
        split = self.task.split
        # A file of its own is named by its path, an image in a larger file by its key.
        origin = row["key"] if row["offset"] else row["path"]
        data = read_bytes(row["path"], row["offset"], row["length"])
        try:
            image = check(data, self.task.policy)
        except DataError as error:
            self.notes.append(Note(split, origin, "left out", str(error)))
            self.digests.append(NO_IMAGE)
            return

        # Note how it differs from others, or from what it was.
        if image.oddity:
            what = "altered" if image.altered else "kept"
            self.notes.append(Note(split, origin, what, image.oddity))
        self.altered += image.altered
        self.digests.append(image_digest(image.data))
        sample = Sample(
            row["key"], row["label"], image.data, image.extension, image.width, image.height
        )
        self.writer.add(sample)


def make_shard(task: ShardTask) -> ShardDone:
    """Read, check, pack and upload the images of one shard, confirm it, and record it.

    Raises:
        StoreError: The store does not have what was uploaded.
        DataError: An image's file is not what it was when the source was scanned.
    """
    try:
        done = _make(task)
    except NotFound:  # an answer was lost on the way; made again, the shard is the same
        done = _make(task)
    task.store.write(task.record, _to_record(done, task.plan))
    return done


def _make(task: ShardTask) -> ShardDone:
    # The shard is uploaded while it is packed.
    packing = Packing(task)
    tag = task.store.write_pieces(task.name, packing.pieces())
    confirm(task.store, task.name, packing.bytes, tag)

    # Its index is an object, or goes into the record.
    rows = index_table(packing.writer.rows)
    shard = Shard(task.name, packing.bytes, rows.num_rows, packing.digest.hexdigest())
    index = None
    if task.own_index:
        name = shard_index_name(task.split, task.number, task.mark)
        index = put(task.store, name, write_index(rows))
    return ShardDone(
        shard=shard,
        split=task.split,
        number=task.number,
        tag=tag,
        notes=packing.notes,
        altered=packing.altered,
        digests=np.array(packing.digests, np.uint64),
        rows=None if index else rows,
        index=index,
    )


def put(store: Store, name: str, body: bytes) -> Index:
    """Write a small object of a dataset, confirm it, and return the manifest's entry for it."""
    confirm(store, name, len(body), store.write(name, body))
    return Index(name, len(body), hashlib.sha256(body).hexdigest())


def confirm(store: Store, name: str, size: int, tag: str) -> None:
    """Raise `StoreError` unless the store has the object as it was written.

    Args:
        store: The destination.
        name: The object.
        size: Its bytes.
        tag: The version that the write returned.
    """
    if store.head(name) != (size, tag):
        raise StoreError(
            f"{store.url}/{name} is not what was uploaded; does something else write there? "
            "run again"
        )


def _to_record(done: ShardDone, plan: str) -> bytes:
    """Return the content of the record: the index rows as Parquet, all else as its metadata."""
    # The metadata is text: digests go in as base64.
    index = None
    if done.index is not None:
        index = asdict(done.index)
    facts = {
        "plan": plan,
        "shard": asdict(done.shard),
        "split": done.split,
        "number": done.number,
        "tag": done.tag,
        "notes": [asdict(note) for note in done.notes],
        "altered": done.altered,
        "digests": base64.b64encode(done.digests.astype(RECORDED).tobytes()).decode(),
        "index": index,
    }
    sink = io.BytesIO()
    rows = done.rows
    if rows is None:
        rows = SCHEMA.empty_table()
    table = rows.replace_schema_metadata({"wds-train": json.dumps(facts)})
    pq.write_table(table, sink)
    return sink.getvalue()


def from_record(data: bytes, plan: str) -> ShardDone | None:
    """Return the finished shard; None when the record belongs to another plan or is damaged.

    Args:
        data: The record's bytes.
        plan: The digest of our plan.
    """
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
        facts = json.loads(table.schema.metadata[b"wds-train"])
        if facts.pop("plan") != plan:
            return None

        # What remains are the fields of ShardDone, some of them as plain dicts.
        facts["shard"] = Shard(**facts["shard"])
        facts["notes"] = [Note(**note) for note in facts["notes"]]
        facts["digests"] = np.frombuffer(base64.b64decode(facts["digests"]), RECORDED)
        if facts["index"]:
            facts["index"] = Index(**facts["index"])
            return ShardDone(rows=None, **facts)
        return ShardDone(rows=table.replace_schema_metadata(None), **facts)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None
