"""One shard: its images read, checked, packed and uploaded, confirmed and recorded."""

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

WIP = ".wip/"
RECORDED = np.dtype("<u8")  # of digests, whichever machine reads the record
COUNT_SECONDS = 0.2  # between two additions of a process to the counts, which all of them wait for


@dataclass(frozen=True)
class Counts:
    """The source's bytes and images that are packed, in `values`, by all processes together that hold the `lock`."""

    lock: Any
    values: Any

    def add(self, size: int, images: int) -> None:
        with self.lock:
            self.values[0] += size
            self.values[1] += images


made: Counts | None = None
"""What this process adds to what it has packed, if anybody wants to know."""


@dataclass(frozen=True)
class ShardTask:
    """All that makes shard `number` of `split`: the rows of its samples, in order. `plan` is the plan's digest, `mark`
    what is put into the names of objects that replace others; `own_index`: the shard's index is an object of its own.
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
        return shard_name(self.split, self.number, self.mark)

    @property
    def record(self) -> str:
        return f"{WIP}{self.split}/shard-{self.number:06d}.parquet"


@dataclass(frozen=True)
class ShardDone:
    """A finished shard, as its record in `.wip/` holds it. `tag` is the object's version in the store. Its samples' rows are in
    `rows`, or else in the object `index`.

    `digests`: of each of the task's rows, in order, the `image_digest` of what was packed, or
    `NO_IMAGE` where nothing was.
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
    """The images of one shard, read, checked and packed while the shard's first bytes are already on their way."""

    def __init__(self, task: ShardTask) -> None:
        self.task = task
        self.notes: list[Note] = []
        self.digests: list[int] = []
        self.altered = self.bytes = 0
        self.digest = hashlib.sha256()
        self.writer = ShardWriter(task.number)
        self._told, self._size, self._images = 0.0, 0, 0

    def pieces(self) -> Iterator[bytearray]:
        warnings.filterwarnings("ignore", module="PIL")  # about odd EXIF, of which the orientation is all that is used
        for row in self.task.rows.to_pylist():
            self._add(row)
            self._size, self._images = self._size + row["length"], self._images + 1
            if time.monotonic() - self._told > COUNT_SECONDS:
                self._tell()
            if self.writer.waiting >= PART_BYTES:
                yield self._hashed(self.writer.take())
        self._tell()
        yield self._hashed(self.writer.finish())

    def _tell(self) -> None:
        if made is not None:
            made.add(self._size, self._images)
        self._told, self._size, self._images = time.monotonic(), 0, 0

    def _hashed(self, piece: bytearray) -> bytearray:
        self.digest.update(piece)
        self.bytes += len(piece)
        return piece

    def _add(self, row: dict[str, Any]) -> None:
        split, origin = self.task.split, row["key"] if row["offset"] else row["path"]
        data = read_bytes(row["path"], row["offset"], row["length"])
        try:
            image = check(data, self.task.policy)
        except DataError as error:
            self.notes.append(Note(split, origin, "left out", str(error)))
            self.digests.append(NO_IMAGE)
            return
        if image.oddity:
            self.notes.append(Note(split, origin, "altered" if image.altered else "kept", image.oddity))
        self.altered += image.altered
        self.digests.append(image_digest(image.data))
        self.writer.add(Sample(row["key"], row["label"], image.data, image.extension, image.width, image.height))


def make_shard(task: ShardTask) -> ShardDone:
    """Read, check, pack and upload the images of one shard, confirm it, and record it."""
    try:
        done = _make(task)
    except NotFound:  # an answer was lost on the way; made again, it is the same
        done = _make(task)
    task.store.write(task.record, _to_record(done, task.plan))
    return done


def _make(task: ShardTask) -> ShardDone:
    packing = Packing(task)
    tag = task.store.write_pieces(task.name, packing.pieces())
    confirm(task.store, task.name, packing.bytes, tag)
    rows, index = index_table(packing.writer.rows), None
    shard = Shard(task.name, packing.bytes, rows.num_rows, packing.digest.hexdigest())
    if task.own_index:
        index = put(task.store, shard_index_name(task.split, task.number, task.mark), write_index(rows))
        rows = None
    return ShardDone(
        shard=shard,
        split=task.split,
        number=task.number,
        tag=tag,
        notes=packing.notes,
        altered=packing.altered,
        digests=np.array(packing.digests, np.uint64),
        rows=rows,
        index=index,
    )


def put(store: Store, name: str, body: bytes) -> Index:
    """Write an object beside the shards, and see that it is there."""
    confirm(store, name, len(body), store.write(name, body))
    return Index(name, len(body), hashlib.sha256(body).hexdigest())


def confirm(store: Store, name: str, size: int, tag: str) -> None:
    """See that the store has the object as it was written."""
    if store.head(name) != (size, tag):
        raise StoreError(f"{store.url}/{name} is not what was uploaded; does something else write there? run again")


def _to_record(done: ShardDone, plan: str) -> bytes:
    facts = {
        "plan": plan,
        "shard": asdict(done.shard),
        "split": done.split,
        "number": done.number,
        "tag": done.tag,
        "notes": [asdict(note) for note in done.notes],
        "altered": done.altered,
        "digests": base64.b64encode(done.digests.astype(RECORDED).tobytes()).decode(),
        "index": asdict(done.index) if done.index else None,
    }
    sink = io.BytesIO()
    rows = SCHEMA.empty_table() if done.rows is None else done.rows
    table = rows.replace_schema_metadata({"wds-train": json.dumps(facts)})
    pq.write_table(table, sink)
    return sink.getvalue()


def from_record(data: bytes, plan: str) -> ShardDone | None:
    """The finished shard, or None when the record belongs to another plan or is damaged."""
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
        facts = json.loads(table.schema.metadata[b"wds-train"])
        if facts.pop("plan") != plan:
            return None
        facts["shard"] = Shard(**facts["shard"])
        facts["notes"] = [Note(**note) for note in facts["notes"]]
        facts["digests"] = np.frombuffer(base64.b64decode(facts["digests"]), RECORDED)
        if facts["index"]:
            facts["index"] = Index(**facts["index"])
            return ShardDone(rows=None, **facts)
        return ShardDone(rows=table.replace_schema_metadata(None), **facts)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None
