"""A source becomes a dataset: shards, index and report, then the manifest.

Kill it at any moment and run it again. What is finished is kept in the store under `.wip/`, which no manifest names:
`plan.json` says what is being made, under which names, and what it replaces; `SPLIT/shard-NNNNNN.parquet`, written when
that shard's upload was confirmed, holds the shard's index rows, digest and tag. A shard whose record and object agree is
not made again; every shard is a pure function of the plan, so the result is the same bytes.

A conversion that replaces another one writes under names of its own, so that the other stays whole until one
compare-and-swap puts the new manifest in the place of the old. Only then is removed what the old one named.
"""

import contextlib
import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed, wait
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.images import ImagePolicy, check
from shards.source import Note, Source, hold_out, read_bytes, report_json, take
from wds_train import manifest as manifests
from wds_train.errors import Conflict, DataError, NotFound, StoreError, UsageError
from wds_train.manifest import DatasetManifest, Index, Shard, Split
from wds_train.order import permutation
from wds_train.store import PART_BYTES, Store
from wds_train.tario import (
    END_BYTES,
    SCHEMA,
    Sample,
    ShardWriter,
    index_table,
    record_bytes,
    to_numpy,
    write_index,
)

WIP = ".wip/"
PLAN = f"{WIP}plan.json"
RECORD = re.compile(r"\.wip/[a-z]+/shard-\d{6}\.parquet")


@dataclass(frozen=True)
class Options:
    """What decides the dataset's bytes besides its source. `shard_bytes`: a shard's size is at most this. `hold_out`: the
    share of a source without `val` that becomes it.
    """

    seed: int = 0
    shard_bytes: int = 128 << 20
    policy: ImagePolicy = field(default_factory=ImagePolicy)
    hold_out: float = 0.0


@dataclass(frozen=True)
class ShardTask:
    """All that makes shard `number` of `split`: the rows of its samples, in order. `plan` is the plan's digest, `mark`
    what is put into the names of objects that replace others.
    """

    store: Store
    plan: str
    split: str
    number: int
    rows: pa.Table
    policy: ImagePolicy
    mark: str = ""

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number, self.mark)

    @property
    def record(self) -> str:
        return f"{WIP}{self.split}/shard-{self.number:06d}.parquet"


@dataclass(frozen=True)
class ShardDone:
    """A finished shard, as its record in `.wip/` holds it. `tag` is the object's version in the store."""

    shard: Shard
    split: str
    number: int
    tag: str
    notes: list[Note]
    altered: int
    index: pa.Table


def shard_name(split: str, number: int, mark: str) -> str:
    return f"{split}/shard-{number:06d}{mark}.tar"


@dataclass(frozen=True)
class Begun:
    """`.wip/plan.json`: a conversion that is under way, by whoever. `plan` as `Plan.settings`; `mark` as in `ShardTask`;
    `names` are the objects that it writes, `stale` those of others that it replaces.
    """

    plan: dict[str, Any]
    mark: str
    names: list[str]
    stale: list[str]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Begun":
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise DataError(f"{where} is damaged, or of another version; remove it and convert again") from error


class Packing:
    """The images of one shard, read, checked and packed while the shard's first bytes are already on their way."""

    def __init__(self, task: ShardTask) -> None:
        self.task = task
        self.notes: list[Note] = []
        self.altered = self.bytes = 0
        self.digest = hashlib.sha256()
        self.writer = ShardWriter(task.number)

    def pieces(self) -> Iterator[bytearray]:
        warnings.filterwarnings("ignore", module="PIL")  # about odd EXIF, of which the orientation is all that is used
        for row in self.task.rows.to_pylist():
            self._add(row)
            if self.writer.waiting >= PART_BYTES:
                yield self._hashed(self.writer.take())
        yield self._hashed(self.writer.finish())

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
            return
        if image.oddity:
            self.notes.append(Note(split, origin, "kept", image.oddity))
        self.altered += image.altered
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
    rows = packing.writer.rows
    shard = Shard(task.name, packing.bytes, len(rows), packing.digest.hexdigest())
    return ShardDone(shard, task.split, task.number, tag, packing.notes, packing.altered, index_table(rows))


def confirm(store: Store, name: str, size: int, tag: str) -> None:
    """See that the store has the object as it was written."""
    if store.head(name) != (size, tag):
        raise StoreError(f"{store.url}/{name} is not what was uploaded; does something else write there? run again")


def _to_record(done: ShardDone, plan: str) -> bytes:
    facts = {"plan": plan} | {name: value for name, value in vars(done).items() if name != "index"}
    facts |= {"shard": asdict(done.shard), "notes": [vars(note) for note in done.notes]}
    sink = io.BytesIO()
    pq.write_table(done.index.replace_schema_metadata({"wds-train": json.dumps(facts)}), sink)
    return sink.getvalue()


def _from_record(data: bytes, plan: str) -> ShardDone | None:
    """The finished shard, or None when the record belongs to another plan or is damaged."""
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
        facts = json.loads(table.schema.metadata[b"wds-train"])
        if facts.pop("plan") != plan:
            return None
        facts |= {"shard": Shard(**facts["shard"]), "notes": [Note(**note) for note in facts["notes"]]}
        return ShardDone(index=table.replace_schema_metadata(None), **facts)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None


class Plan:
    """What a source becomes: `parts` are the rows of every shard, by split. Two conversions whose `settings` are equal are
    the same, and make the same bytes; `digest` is their sha256.
    """

    def __init__(self, source: Source, options: Options) -> None:
        if options.hold_out:
            if "train" not in source.splits or "val" in source.splits:
                there = ", ".join(source.splits)
                raise UsageError(f"{source.description} has {there}: nothing can be held out; leave --hold-out away")
            source = hold_out(source, options.hold_out)
        self.source, self.options = source, options
        self.parts = {split: _cut(rows, split, options) for split, rows in source.splits.items()}
        self.settings: dict[str, Any] = {
            "source": source.description,
            "seed": options.seed,
            "image_policy": options.policy.to_json(),
            "conversion": {"source_sha256": source.digest(), "shard_bytes": options.shard_bytes}
            | ({"hold_out": options.hold_out} if options.hold_out else {}),
        }
        self.digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def names(self, mark: str) -> list[str]:
        """Every object of the dataset but the manifest. `mark` as in `Begun`."""
        shards = [shard_name(split, n, mark) for split, parts in self.parts.items() for n in range(len(parts))]
        return [*shards, *(f"{split}/index{mark}.parquet" for split in self.parts), f"report{mark}.json"]

    def windows(self, finished: set[tuple[str, int]]) -> Iterator[Iterable[tuple[str, int, pa.Table]]]:
        """(split, number, rows) of the shards that are not `finished`, in groups: each must be done before the next is
        asked for, since a stream's spool holds the images of one group at a time.
        """
        missing = [
            (split, number, ids)
            for split, parts in self.parts.items()
            for number, ids in enumerate(parts)
            if (split, number) not in finished
        ]
        stream = self.source.stream
        if stream is None:
            yield ((split, number, self._rows(split, ids)) for split, number, ids in missing)
            return
        for split, group in _groups(missing, self._size, stream.spool.limit):
            stream.spool.clear()
            rows = stream.fetch(pa.concat_tables([self._rows(split, ids) for _, ids in group]), split)
            starts = np.cumsum([0] + [len(ids) for _, ids in group]).tolist()
            yield [  # take, not slice: a pickled slice carries the whole table
                (split, number, take(rows, range(start, start + len(ids))))
                for (number, ids), start in zip(group, starts[:-1], strict=True)
            ]

    def _rows(self, split: str, ids: np.ndarray) -> pa.Table:
        return take(self.source.splits[split], ids)

    def _size(self, split: str, ids: np.ndarray) -> int:
        return int(to_numpy(self.source.splits[split]["length"])[ids].sum())


class Conversion:
    """A plan on its way into a store."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.mark = ""
        self._replaces: str | None = None  # the tag of the manifest that ours takes the place of

    def tasks(self, finished: set[tuple[str, int]]) -> Iterator[Iterator[ShardTask]]:
        """The shards that are not `finished`, in the plan's windows."""
        policy = self.plan.options.policy
        for window in self.plan.windows(finished):
            yield (
                ShardTask(self.store, self.plan.digest, split, number, rows, policy, self.mark)
                for split, number, rows in window
            )

    def begin(self, *, overwrite: bool) -> list[ShardDone] | None:
        """What earlier runs finished; None when the dataset is complete. Refused when another one is there, or files of
        somebody else's under the names that would be written.
        """
        made = self._read_manifest()
        if made is not None and self._settings(made) == self.plan.settings:
            return None
        if made is not None and not overwrite:
            raise self._other_settings(manifests.NAME, self._settings(made))
        while True:
            begun, tag = self._read_begun()
            if begun is not None and begun.plan == self.plan.settings:
                self.mark = begun.mark
                return self._finished()
            if begun is not None and not overwrite:
                raise self._other_settings(PLAN, begun.plan)
            replaced = (made.objects() if made else set()) | ({*begun.names, *begun.stale} if begun else set())
            self.mark = f".{self.plan.digest[:8]}" if replaced else ""
            mine = self.plan.names(self.mark)
            if not replaced:
                self._refuse_foreign(mine)
            plan = Begun(self.plan.settings, self.mark, mine, sorted(replaced - {*mine}))
            with contextlib.suppress(Conflict):  # another one began at this moment: look again
                self.store.write(PLAN, plan.to_json(), **({"if_match": tag} if tag else {"if_absent": True}))

    def complete(self) -> DatasetManifest:
        """The manifest that is there already; what a kill left to remove is removed."""
        made = self._read_manifest()
        assert made is not None, "begin() found it"
        self.sweep(made)
        return made

    def finish(self, done: list[ShardDone]) -> DatasetManifest:
        """Write index, report and, when all of them are there, the manifest; then remove what it does not name."""
        splits = {}
        for split in self.plan.parts:
            mine = sorted((part for part in done if part.split == split), key=lambda part: part.number)
            table = pa.Table.from_batches([batch for part in mine for batch in part.index.to_batches()], SCHEMA)
            index = self._put(f"{split}/index{self.mark}.parquet", write_index(table))
            splits[split] = Split(tuple(part.shard for part in mine), index)
        notes = self.plan.source.notes + [note for part in done for note in part.notes]
        report = self._put(f"report{self.mark}.json", report_json(notes, sum(part.altered for part in done)))
        made = DatasetManifest(self.plan.source.classes, splits, report=report, **self.plan.settings)
        condition: dict[str, Any] = {"if_match": self._replaces} if self._replaces else {"if_absent": True}
        try:
            self.store.write(manifests.NAME, made.to_json(), **condition)
        except Conflict as error:
            if self.store.read(manifests.NAME) != made.to_json():
                raise Conflict(
                    f"{self.store.url}: another conversion has finished there meanwhile; its dataset stands, this one's does not"
                ) from error
        self.sweep(made)
        return made

    def sweep(self, made: DatasetManifest) -> None:
        """Remove what the plan names, its own or what it replaced, and `made` does not; then the plan and its records.
        Nothing else is ours.
        """
        for split in self.plan.parts:
            self.store.abort_uploads(f"{split}/shard-")
        begun, _ = self._read_begun()
        if begun is None or begun.plan != self.plan.settings:  # another conversion's by now
            return
        stale = {*begun.names, *begun.stale} - made.objects()
        records = {entry.key for entry in self.store.list(WIP) if RECORD.fullmatch(entry.key)}
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(self.store.delete, stale | records))
        self.store.delete(PLAN)  # last: it names what there is to remove

    def _refuse_foreign(self, names: list[str]) -> None:
        folders = sorted({name.rpartition("/")[0] for name in names})
        there = {
            entry.key for folder in folders for entry in self.store.list(f"{folder}/" if folder else "report.json")
        }
        if foreign := sorted(there & {*names}):
            raise UsageError(
                f"{self.store.url} holds {foreign[0]}"
                + (f" and {len(foreign) - 1} more" if foreign[1:] else "")
                + ", which no manifest of ours names, under names that this conversion would write; choose another destination"
            )

    def _read_manifest(self) -> DatasetManifest | None:
        with contextlib.suppress(NotFound):
            data, self._replaces = self.store.read_tagged(manifests.NAME)
            return DatasetManifest.from_json(data, f"{self.store.url}/{manifests.NAME}")
        return None

    def _read_begun(self) -> tuple[Begun | None, str]:
        with contextlib.suppress(NotFound):
            data, tag = self.store.read_tagged(PLAN)
            return Begun.from_json(data, f"{self.store.url}/{PLAN}"), tag
        return None, ""

    def _settings(self, made: DatasetManifest) -> dict[str, Any]:
        found = asdict(made)
        return {name: found[name] for name in self.plan.settings}

    def _other_settings(self, where: str, there: dict[str, Any]) -> UsageError:
        return UsageError(
            f"{self.store.url}/{where} was begun with other settings: {_differences(there, self.plan.settings)}; "
            "use the same ones, another destination, or --overwrite to replace it"
        )

    def _finished(self) -> list[ShardDone]:
        records = [entry.key for entry in self.store.list(WIP) if entry.key.endswith(".parquet")]
        with ThreadPoolExecutor(16) as pool:
            return [done for done in pool.map(self._confirmed, records) if done]

    def _confirmed(self, record: str) -> ShardDone | None:
        done = _from_record(self.store.read(record), self.plan.digest)
        if done is None or done.shard.name != shard_name(done.split, done.number, self.mark):
            return None
        try:
            return done if self.store.head(done.shard.name) == (done.shard.bytes, done.tag) else None
        except NotFound:
            return None

    def _put(self, name: str, body: bytes) -> Index:
        confirm(self.store, name, len(body), self.store.write(name, body))
        return Index(name, len(body), hashlib.sha256(body).hexdigest())


def _cut(rows: pa.Table, split: str, options: Options) -> list[np.ndarray]:
    """The rows of every shard: all of the split's, shuffled by the seed, in as few shards as can be, of equal size, so
    that no process is left with a whole shard when the others are done. Samples of more than half a shard make it larger.
    """
    if not rows.num_rows:
        return []
    order = permutation(rows.num_rows, "shards", options.seed, split)
    records = record_bytes(to_numpy(rows["length"])[order])
    ends, limit = np.cumsum(records), max(options.shard_bytes - END_BYTES, 2 * int(records.max()))
    count = -(-int(ends[-1]) // limit)
    while True:
        cuts = np.unique(np.searchsorted(ends, ends[-1] * np.arange(1, count) / count))
        cuts = cuts[cuts > 0]
        if np.add.reduceat(records, np.concatenate([[0], cuts])).max() <= limit:
            return np.split(order, cuts)
        count += 1


def _groups(
    missing: list[tuple[str, int, np.ndarray]], size: Callable[[str, np.ndarray], int], limit: int
) -> Iterator[tuple[str, list[tuple[int, np.ndarray]]]]:
    """`missing` (split, shard number, rows) in runs of one split whose images take at most `limit` bytes."""
    group: list[tuple[int, np.ndarray]] = []
    total, current = 0, ""
    for split, number, ids in missing:
        more = size(split, ids)
        if more > limit:
            raise UsageError(f"one shard takes {more} bytes, the spool holds {limit}; raise --spool-gb")
        if group and (split != current or total + more > limit):
            yield current, group
            group, total = [], 0
        group, total, current = [*group, (number, ids)], total + more, split
    if group:
        yield current, group


def _differences(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    flat = [{**plan, **plan.get("image_policy", {}), **plan.get("conversion", {})} for plan in (there, wanted)]
    names = [n for n in flat[0] | flat[1] if n not in ("image_policy", "conversion")]
    changes = [(name, *(plan.get(name) for plan in flat)) for name in names]
    return ", ".join(f"{name} was {old}, is now {new}" for name, old, new in changes if old != new)


def run_tasks(executor: Executor | None, tasks: Iterable[ShardTask], in_flight: int) -> Iterator[ShardDone]:
    """Make every shard, at most `in_flight` at a time; in this process when there is no executor."""
    if executor is None:
        yield from map(make_shard, tasks)
        return
    pending = set()
    try:
        for task in tasks:
            pending.add(executor.submit(make_shard, task))
            if len(pending) >= in_flight:
                ready, pending = wait(pending, return_when="FIRST_COMPLETED")
                yield from (future.result() for future in ready)
        yield from (future.result() for future in as_completed(pending))
    finally:
        for future in pending:
            future.cancel()
