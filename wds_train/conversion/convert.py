"""Convert a source to a dataset: shards, index and report, then the manifest.

Kill it at any moment and run it again. What is finished is kept in the store under `.wip/`, which
no manifest names. `plan.json` says what is being made, under which names, and what it replaces.
`SPLIT/shard-NNNNNN.parquet` is written when that shard's upload was confirmed: it holds the shard's
index rows (or names their object), digest and tag. A shard whose record and object agree is not
made again; every shard is a pure function of the plan, so the result is the same bytes.

A conversion that replaces another one writes under names of its own, so that the other stays whole
until one compare-and-swap replaces the old manifest by the new one. Only then are the objects
removed that the old one named.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
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
from wds_train.dataset.manifest import DatasetManifest, Split, read_manifest
from wds_train.errors import Conflict, DataError, NotFound, StoreError, UsageError
from wds_train.storage.base import Store
from wds_train.storage.proof import is_probe, prove

PLAN = f"{WIP}plan.json"
AT_ONCE = 16  # requests to the store: each waits for an answer most of its time
RECORD = re.compile(r"\.wip/[a-z]+/shard-\d{6}\.parquet")


@dataclass(frozen=True)
class PlanRecord:
    """`.wip/plan.json`: a conversion that is under way, perhaps in another process.

    Attributes:
        plan: Its `Plan.settings`.
        mark: The `mark` of its `ShardTask`s.
        names: The objects that it writes.
        stale: The objects of other conversions that it replaces.
    """

    plan: dict[str, Any]
    mark: str
    names: list[str]
    stale: list[str]

    def to_json(self) -> bytes:
        """Return the content of `plan.json`."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "PlanRecord":
        """Read the content of `plan.json`.

        Args:
            data: The object's bytes.
            where: Its address, for the message.

        Raises:
            DataError: It is not such a record.
        """
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{where} is damaged, or of another version; remove it and convert again"
            ) from error

    def objects(self) -> set[str]:
        """Return all objects that the record names."""
        return {*self.names, *self.stale}


class Conversion:
    """A plan that is being carried out in a store.

    Call `begin`, make the shards of `tasks`, then call `finish`.

    Args:
        plan: The shards to make.
        store: The destination.
    """

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan = plan
        self.store = store
        self.mark = ""
        self.repeats = Repeats((), ())  # found by `finish`
        self._replaces: str | None = None  # the tag of the manifest that ours replaces

    def begin(self, *, overwrite: bool, unsafe: bool = False) -> list[ShardDone] | None:
        """Claim the destination, and return the shards that earlier runs finished.

        Args:
            overwrite: Replace a dataset that was made with other settings.
            unsafe: Accept a store that ignores conditional writes.

        Returns:
            The finished shards; None when the dataset is complete.

        Raises:
            UsageError: Another dataset is there, or another conversion has begun there, or there
                are foreign files under the names that would be written.
            StoreError: The store ignores conditional writes.
        """
        proved = False
        while True:
            # A finished dataset needs nothing, or is in the way.
            made = self._read_manifest()
            if made is not None:
                settings = _settings(made, self.plan)
                if settings == self.plan.settings:
                    return None
                if not overwrite:
                    raise _other_settings(f"{self.store.url}/{manifests.NAME}", settings, self.plan)
            if not proved:
                prove(self.store, WIP, say, unsafe=unsafe)
                proved = True
                continue  # another one may have finished meanwhile: look again

            # A conversion that was interrupted is continued, or is in the way.
            record, tag = _read_record(self.store)
            if record is not None:
                if record.plan == self.plan.settings:
                    self.mark = record.mark
                    return self._read_finished()
                if not overwrite:
                    raise _other_settings(f"{self.store.url}/{PLAN}", record.plan, self.plan)
            with contextlib.suppress(Conflict):  # another one began at this moment: look again
                self._write_record(made, record, tag)

    def tasks(self, finished: set[tuple[str, int]]) -> Iterator[Iterator[ShardTask]]:
        """Yield the shards to make, in the plan's windows.

        Args:
            finished: (split, number) of shards that are there already.
        """
        for window in self.plan.windows(finished):
            yield _make_tasks(window, self.store, self.plan, self.mark)

    def complete(self) -> DatasetManifest:
        """Return the manifest that `begin` found, after removing what a kill left behind."""
        made = self._read_manifest()
        assert made is not None, "begin() found it"
        self.remove_leftovers(made)
        return made

    def finish(self, done: list[ShardDone]) -> DatasetManifest:
        """Write indexes, report and then the manifest; then remove objects that it does not name.

        Args:
            done: All shards of the plan.

        Raises:
            Conflict: Another conversion has finished here meanwhile.
        """
        # Indexes and report, which nothing names yet.
        splits = {}
        for split in self.plan.parts:
            splits[split] = _write_split(self.store, self.plan, self.mark, split, done)
        self.repeats = _find_repeats(self.plan, done)
        content = _report(self.plan, self.repeats, done)
        report = put(self.store, f"report{self.mark}.json", content)
        made = DatasetManifest(
            self.plan.source.classes, splits, report=report, **self.plan.settings
        )

        # The manifest, by compare-and-swap: of two conversions that end now, one wins.
        condition: dict[str, Any] = {"if_absent": True}
        if self._replaces:
            condition = {"if_match": self._replaces}
        try:
            self.store.write(manifests.NAME, made.to_json(), **condition)
        except Conflict as error:
            theirs = read_manifest(self.store)[0]
            if theirs.to_json() != made.to_json():
                self.remove_leftovers(theirs)
                raise Conflict(
                    f"{self.store.url}: another conversion has finished there meanwhile; "
                    "its dataset stands, this one's does not"
                ) from error
        self.remove_leftovers(made)
        return made

    def remove_leftovers(self, made: DatasetManifest) -> None:
        """Remove objects of conversions that `made` does not name; then the plan and its records.

        Nothing is removed but what the plan names, as its own or as replaced. The dataset is
        complete by now, so an object that cannot be removed costs a line on stderr and no more.

        Args:
            made: The manifest that stands: ours, or that of another conversion that was faster.
        """
        with _reported():
            for split in self.plan.parts:
                self.store.abort_uploads(f"{split}/shard-")
        with _reported():
            self._remove_stale(made)

    def _remove_stale(self, made: DatasetManifest) -> None:
        record, _ = _read_record(self.store)
        if record is not None and record.plan != self.plan.settings:
            return  # another conversion has begun since
        # Without a plan, one like ours has ended before us and removed all but the records that we
        # wrote since.
        stale: set[str] = set()
        if record is not None:
            stale = record.objects() - made.objects()
        for entry in self.store.list(WIP):
            if RECORD.fullmatch(entry.key) or is_probe(entry.key):
                stale.add(entry.key)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self.store.delete, stale))
        self.store.delete(PLAN)  # last: it names what there is to remove

    def _write_record(
        self, made: DatasetManifest | None, record: PlanRecord | None, tag: str
    ) -> None:
        """Write our plan, and choose the names of our objects.

        Args:
            made: The dataset that ours replaces.
            record: The interrupted conversion that ours replaces.
            tag: The version of `record` in the store.

        Raises:
            Conflict: Another conversion has written its plan meanwhile.
            UsageError: There are foreign files under our names.
        """
        # Objects that replace others have a mark in their names, so that both can be there.
        replaced: set[str] = set()
        if made is not None:
            replaced |= made.objects()
        if record is not None:
            replaced |= record.objects()
        self.mark = f".{self.plan.digest[:8]}" if replaced else ""
        mine = self.plan.names(self.mark)
        if not replaced:
            _refuse_foreign(self.store, mine)

        # Written only over the record that was read: of two that begin now, one wins.
        ours = PlanRecord(self.plan.settings, self.mark, mine, sorted(replaced - {*mine}))
        if tag:
            self.store.write(PLAN, ours.to_json(), if_match=tag)
        else:
            self.store.write(PLAN, ours.to_json(), if_absent=True)

    def _read_manifest(self) -> DatasetManifest | None:
        with contextlib.suppress(NotFound):
            made, self._replaces = read_manifest(self.store)
            return made
        return None

    def _read_finished(self) -> list[ShardDone]:
        """Return the shards whose record and object agree."""
        records = []
        for entry in self.store.list(WIP):
            if entry.key.endswith(".parquet"):
                records.append(entry.key)
        confirm = partial(_confirm_record, self.store, self.plan.digest, self.mark)
        finished = []
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for done in pool.map(confirm, records):
                if done is not None:
                    finished.append(done)
        return finished


def _make_tasks(
    window: Iterable[tuple[str, int, pa.Table]], store: Store, plan: Plan, mark: str
) -> Iterator[ShardTask]:
    """Yield the tasks of a window; its rows are taken when a task is asked for."""
    for split, number, rows in window:
        yield ShardTask(
            store=store,
            plan=plan.digest,
            split=split,
            number=number,
            rows=rows,
            policy=plan.options.policy,
            mark=mark,
            own_index=plan.by_shard(split),
        )


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Print an error of the store, and go on."""
    try:
        yield
    except StoreError as error:
        say(
            f"what interrupted or older conversions left stays there ({error}); see docs/stores.md",
            2,
        )


def _read_record(store: Store) -> tuple[PlanRecord | None, str]:
    with contextlib.suppress(NotFound):
        data, tag = store.read_tagged(PLAN)
        return PlanRecord.from_json(data, f"{store.url}/{PLAN}"), tag
    return None, ""


def _confirm_record(store: Store, plan: str, mark: str, record: str) -> ShardDone | None:
    """Return the shard of `record`, if it is of this plan and is there.

    `NotFound` is no error: a conversion like this one may end at this moment, and remove its
    records.
    """
    try:
        done = from_record(store.read(record), plan)
        if done is None or done.shard.name != shard_name(done.split, done.number, mark):
            return None
        if done.index and store.head(done.index.name)[0] != done.index.bytes:
            return None
        if store.head(done.shard.name) != (done.shard.bytes, done.tag):
            return None
        return done
    except NotFound:
        return None


def _write_split(store: Store, plan: Plan, mark: str, split: str, done: list[ShardDone]) -> Split:
    """Return the manifest's entry of `split`, and write its index if that is one object."""
    shards = []
    indexes = []
    batches = []
    for part in sorted(done, key=lambda part: part.number):
        if part.split != split:
            continue
        shards.append(part.shard)
        if part.index is not None:
            indexes.append(part.index)
        if part.rows is not None:
            batches += part.rows.to_batches()
    if plan.by_shard(split):
        return Split(tuple(shards), tuple(indexes))
    content = write_index(pa.Table.from_batches(batches, SCHEMA))
    return Split(tuple(shards), put(store, f"{split}/index{mark}.parquet", content))


def _find_repeats(plan: Plan, done: list[ShardDone]) -> Repeats:
    packed = []
    for part in done:
        rows = plan.parts[part.split][part.number]
        packed.append(Packed(part.split, rows, part.digests))
    return find_repeats(plan.source.splits, packed, plan.source.classes)


def _report(plan: Plan, repeats: Repeats, done: list[ShardDone]) -> bytes:
    notes = list(plan.source.notes)
    altered = 0
    for part in done:
        notes += part.notes
        altered += part.altered
    extra = {"understood": describe(plan), "repeats": asdict(repeats)}
    return report_json(notes, altered, extra)


def _refuse_foreign(store: Store, names: list[str]) -> None:
    """Raise `UsageError` if the store holds any of `names` already."""
    # One listing for each folder, rather than a question for each name.
    folders = {name.rpartition("/")[0] for name in names}
    there = set()
    for folder in sorted(folders):
        # The one object that lies in no folder is the report.
        prefix = f"{folder}/" if folder else "report.json"
        for entry in store.list(prefix):
            there.add(entry.key)
    foreign = sorted(there & {*names})
    if foreign:
        others = f" and {len(foreign) - 1} more" if foreign[1:] else ""
        raise UsageError(
            f"{store.url} holds {foreign[0]}{others}, which no manifest of ours names, "
            "under names that this conversion would write; choose another destination"
        )


def _settings(made: DatasetManifest, plan: Plan) -> dict[str, Any]:
    """Return the settings of a finished dataset, in the form of `Plan.settings`."""
    return {name: getattr(made, name) for name in plan.settings}


def _other_settings(where: str, there: dict[str, Any], plan: Plan) -> UsageError:
    """Return the refusal of a place where something was begun with other settings."""
    return UsageError(
        f"{where} was begun with other settings: {_differences(there, plan.settings)}; "
        "use the same ones, another destination, or --overwrite to replace it"
    )


def _differences(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    """List the settings that differ, each with both values."""
    before = _flatten(there)
    now = _flatten(wanted)
    changes = []
    for name in before | now:
        if before.get(name) != now.get(name):
            changes.append(f"{name} was {before.get(name)}, is now {now.get(name)}")
    return ", ".join(changes)


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with those of the image policy and of the conversion among them."""
    flat = {**settings, **settings.get("image_policy", {}), **settings.get("conversion", {})}
    flat.pop("image_policy", None)
    flat.pop("conversion", None)
    return flat
