"""A source becomes a dataset: shards, index and report, then the manifest.

Kill it at any moment and run it again. What is finished is kept in the store under `.wip/`, which no manifest names:
`plan.json` says what is being made, under which names, and what it replaces; `SPLIT/shard-NNNNNN.parquet`, written when
that shard's upload was confirmed, holds the shard's index rows (or names their object), digest and tag. A shard whose
record and object agree is not made again; every shard is a pure function of the plan, so the result is the same bytes.

A conversion that replaces another one writes under names of its own, so that the other stays whole until one
compare-and-swap puts the new manifest in the place of the old. Only then is removed what the old one named.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from wds_train.conversion.conversion_report import report_json, say
from wds_train.conversion.pack import WIP, ShardDone, ShardTask, from_record, put
from wds_train.conversion.repeats import Packed, Repeats, find_repeats
from wds_train.conversion.shard_plan import Plan, shard_name
from wds_train.conversion.source_summary import describe
from wds_train.dataset import manifest as manifests
from wds_train.dataset.index import SCHEMA, write_index
from wds_train.dataset.manifest import DatasetManifest, Index, Split, read_manifest
from wds_train.errors import Conflict, DataError, NotFound, StoreError, UsageError
from wds_train.storage.base import Store
from wds_train.storage.proof import is_probe, prove

PLAN = f"{WIP}plan.json"
RECORD = re.compile(r"\.wip/[a-z]+/shard-\d{6}\.parquet")


@dataclass(frozen=True)
class Begun:
    """`.wip/plan.json`: a conversion that is under way, by whoever. `plan` is its `Plan.settings`, `mark` that of its
    `ShardTask`s; `names` are the objects that it writes, `stale` those of others that it replaces.
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


class Conversion:
    """A plan on its way into a store."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.mark = ""
        self.repeats = Repeats((), ())  # found by `finish`
        self._replaces: str | None = None  # the tag of the manifest that ours takes the place of

    def tasks(self, finished: set[tuple[str, int]]) -> Iterator[Iterator[ShardTask]]:
        """The shards that are not `finished`, in the plan's windows."""
        plan, policy = self.plan, self.plan.options.policy
        for window in self.plan.windows(finished):
            yield (
                ShardTask(self.store, plan.digest, split, number, rows, policy, self.mark, plan.by_shard(split))
                for split, number, rows in window
            )

    def begin(self, *, overwrite: bool, unsafe: bool = False) -> list[ShardDone] | None:
        """What earlier runs finished; None when the dataset is complete. Refused when another one is there, or files of
        somebody else's under the names that would be written, or the store ignores conditional writes and is not said to
        be `unsafe`.
        """
        proved = False
        while True:
            made = self._read_manifest()
            if made is not None and _settings(made, self.plan) == self.plan.settings:
                return None
            if made is not None and not overwrite:
                raise _other_settings(f"{self.store.url}/{manifests.NAME}", _settings(made, self.plan), self.plan)
            if not proved:
                prove(self.store, WIP, say, unsafe=unsafe)
                proved = True
                continue  # another one may have finished meanwhile: look again
            begun, tag = self._read_begun()
            if begun is not None and begun.plan == self.plan.settings:
                self.mark = begun.mark
                return self._finished()
            if begun is not None and not overwrite:
                raise _other_settings(f"{self.store.url}/{PLAN}", begun.plan, self.plan)
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
        """Write the indexes of whole splits, report and, when all of them are there, the manifest; then remove what it does
        not name.
        """
        splits = {}
        for split in self.plan.parts:
            mine = sorted((part for part in done if part.split == split), key=lambda part: part.number)
            index: Index | tuple[Index, ...] = tuple(part.index for part in mine if part.index)
            if not self.plan.by_shard(split):
                tables = [part.rows for part in mine if part.rows is not None]
                table = pa.Table.from_batches([batch for rows in tables for batch in rows.to_batches()], SCHEMA)
                index = put(self.store, f"{split}/index{self.mark}.parquet", write_index(table))
            splits[split] = Split(tuple(part.shard for part in mine), index)
        self.repeats = self._find_repeats(done)
        report = put(self.store, f"report{self.mark}.json", self._report(done))
        made = DatasetManifest(self.plan.source.classes, splits, report=report, **self.plan.settings)
        condition: dict[str, Any] = {"if_match": self._replaces} if self._replaces else {"if_absent": True}
        try:
            self.store.write(manifests.NAME, made.to_json(), **condition)
        except Conflict as error:
            theirs = read_manifest(self.store)[0]
            if theirs.to_json() != made.to_json():
                self.sweep(theirs)
                raise Conflict(
                    f"{self.store.url}: another conversion has finished there meanwhile; its dataset stands, this one's does not"
                ) from error
        self.sweep(made)
        return made

    def _find_repeats(self, done: list[ShardDone]) -> Repeats:
        packed = []
        for part in done:
            rows = self.plan.parts[part.split][part.number]
            packed.append(Packed(part.split, rows, part.digests))
        return find_repeats(self.plan.source.splits, packed, self.plan.source.classes)

    def _report(self, done: list[ShardDone]) -> bytes:
        notes = self.plan.source.notes + [note for part in done for note in part.notes]
        altered = sum(part.altered for part in done)
        extra = {"understood": describe(self.plan), "repeats": asdict(self.repeats)}
        return report_json(notes, altered, extra)

    def sweep(self, made: DatasetManifest) -> None:
        """Remove what the plan names, its own or what it replaced, and `made` does not; then the plan and its records.
        Nothing else is ours. The dataset is complete: what cannot be removed is told, and no more.

        Args:
            made: The manifest that stands, ours or that of another conversion that was faster.
        """
        for tidy in (self._abort_uploads, partial(self._remove_stale, made)):
            try:
                tidy()
            except StoreError as error:
                say(f"what interrupted or older conversions left stays there ({error}); see docs/stores.md", 2)

    def _abort_uploads(self) -> None:
        for split in self.plan.parts:
            self.store.abort_uploads(f"{split}/shard-")

    def _remove_stale(self, made: DatasetManifest) -> None:
        begun, _ = self._read_begun()
        if begun is not None and begun.plan != self.plan.settings:  # another conversion's by now
            return
        # Without a plan, one like ours has ended before us and removed all but the records that we wrote since.
        stale = {*begun.names, *begun.stale} - made.objects() if begun else set()
        records = {entry.key for entry in self.store.list(WIP) if RECORD.fullmatch(entry.key) or is_probe(entry.key)}
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
            made, self._replaces = read_manifest(self.store)
            return made
        return None

    def _read_begun(self) -> tuple[Begun | None, str]:
        with contextlib.suppress(NotFound):
            data, tag = self.store.read_tagged(PLAN)
            return Begun.from_json(data, f"{self.store.url}/{PLAN}"), tag
        return None, ""

    def _finished(self) -> list[ShardDone]:
        records = [entry.key for entry in self.store.list(WIP) if entry.key.endswith(".parquet")]
        with ThreadPoolExecutor(16) as pool:
            return [done for done in pool.map(self._confirmed, records) if done]

    def _confirmed(self, record: str) -> ShardDone | None:
        """Return the shard of `record`, if it is of this plan and is there.

        `NotFound` is no error: a conversion like this one may end at this moment, and remove its records.
        """
        try:
            done = from_record(self.store.read(record), self.plan.digest)
            if done is None or done.shard.name != shard_name(done.split, done.number, self.mark):
                return None
            if done.index and self.store.head(done.index.name)[0] != done.index.bytes:
                return None
            return done if self.store.head(done.shard.name) == (done.shard.bytes, done.tag) else None
        except NotFound:
            return None


def _settings(made: DatasetManifest, plan: Plan) -> dict[str, Any]:
    """Return what a finished dataset was made with, as `Plan.settings` has it."""
    return {name: getattr(made, name) for name in plan.settings}


def _other_settings(where: str, there: dict[str, Any], plan: Plan) -> UsageError:
    """Return the refusal of a place where something was begun with other settings."""
    return UsageError(
        f"{where} was begun with other settings: {_differences(there, plan.settings)}; "
        "use the same ones, another destination, or --overwrite to replace it"
    )


def _differences(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    flat = [{**plan, **plan.get("image_policy", {}), **plan.get("conversion", {})} for plan in (there, wanted)]
    names = [n for n in flat[0] | flat[1] if n not in ("image_policy", "conversion")]
    changes = [(name, *(plan.get(name) for plan in flat)) for name in names]
    return ", ".join(f"{name} was {old}, is now {new}" for name, old, new in changes if old != new)
