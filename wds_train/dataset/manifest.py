"""The dataset manifest: `manifest.json` beside the shards, written last. What it does not name does not exist.

{"format": 1, "kind": "wds-train dataset", "classes": [{"id", "name"}], "splits": {"train": {"shards": [{"name",
"bytes", "samples", "sha256"}], "index": {"name", "bytes", "sha256"}}}, "source", "seed", "image_policy", "fingerprint",
"conversion": what else decided the bytes, "report": {"name", "bytes", "sha256"} of the list of samples left out or altered}

A large split has a list for its "index", of one for each shard in turn, and the manifest is then of format 2.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from wds_train.errors import DataError
from wds_train.storage.base import Store

FORMAT = 1
FORMAT_BY_SHARD = 2
KIND = "wds-train dataset"
NAME = "manifest.json"
IN_PLACE = "webdataset, indexed in place"  # the source of a dataset whose tars others wrote
# A shard that replaces one of the same place in an overwritten dataset: train/shard-000007.1f2e3d4c.tar.
SHA256 = re.compile("[0-9a-f]{64}")
MOST = 1 << 62  # bytes or samples: sums of a few still fit into 64 bits
# In a name, they would break a line, or write over what a terminal shows; half a surrogate cannot be written at all.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
SPLIT_NAME = re.compile("[A-Za-z0-9_-]{1,60}")
REPLACEMENT = re.compile(r"(?<=/shard-\d{6})\.[0-9a-f]{8}(?=\.tar$)")


@dataclass(frozen=True)
class ClassInfo:
    """A class: `id` as the source calls it (a wnid, say), `name` for people. Its label is its place in the list."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)  # of which there may be 80,000
class Shard:
    name: str
    bytes: int
    samples: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Index:
    """An object beside the shards."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """`index`: that of all samples, or one for each shard."""

    shards: tuple[Shard, ...]
    index: Index | tuple[Index, ...]

    @property
    def indexes(self) -> tuple[Index, ...]:
        return self.index if isinstance(self.index, tuple) else (self.index,)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class DatasetManifest:
    classes: tuple[ClassInfo, ...]
    splits: dict[str, Split]
    source: str
    seed: int
    image_policy: dict[str, Any]
    conversion: dict[str, Any] = field(default_factory=dict)
    report: Index | None = None

    @property
    def fingerprint(self) -> str:
        """sha256 of the content alone: classes and shards, not where they came from, nor what they replaced. The index
        follows from the shards, and its Parquet encoding may change with pyarrow's version, so it is left out.
        """
        shards = {
            name: [
                {"bytes": s.bytes, "name": REPLACEMENT.sub("", s.name), "samples": s.samples, "sha256": s.sha256}
                for s in split.shards
            ]
            for name, split in self.splits.items()
        }
        content = {"classes": [asdict(entry) for entry in self.classes], "shards": shards}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def split(self, name: str) -> Split:
        if name not in self.splits:
            remedy = "; convert it with --hold-out 0.1, which takes one from train" if name == "val" else ""
            raise DataError(f"the dataset has no split {name!r}; it has {', '.join(self.splits)}{remedy}")
        return self.splits[name]

    def objects(self) -> set[str]:
        """The names of all objects that the manifest names."""
        return {named.name for named in _named(self)}

    @property
    def format(self) -> int:
        by_shard = any(isinstance(split.index, tuple) for split in self.splits.values())
        return FORMAT_BY_SHARD if by_shard else FORMAT

    def to_json(self) -> bytes:
        head = {"format": self.format, "kind": KIND, "fingerprint": self.fingerprint}
        return (json.dumps(head | asdict(self), indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "DatasetManifest":
        """Read a manifest found at `where`; `DataError` when it is another kind, a newer format, or damaged."""
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise DataError(f"{where} is not a {KIND} manifest; convert the dataset with `wds-train shards`")
        if (found := content.get("format")) not in (FORMAT, FORMAT_BY_SHARD):
            shown = found if isinstance(found, int) else "of another kind"
            raise DataError(
                f"{where} has format {shown}, this wds-train reads formats {FORMAT} and {FORMAT_BY_SHARD}; upgrade it"
            )
        try:
            manifest = cls(
                classes=tuple(ClassInfo(**entry) for entry in content["classes"]),
                splits={name: _split(entry) for name, entry in content["splits"].items()},
                source=content["source"],
                seed=content["seed"],
                image_policy=content["image_policy"],
                conversion=content.get("conversion", {}),
                report=Index(**content["report"]) if content.get("report") else None,
            )
            flaw = next(_flaws(manifest), None)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise DataError(f"{where} is damaged: {error!r:.200}; convert the dataset again") from error
        if flaw:
            raise DataError(f"{where} is damaged: {flaw}; convert the dataset again")
        if manifest.fingerprint != content.get("fingerprint"):
            raise DataError(
                f"{where} was altered: its content hashes to {manifest.fingerprint}, "
                f"it says {content.get('fingerprint')}; convert the dataset again"
            )
        return manifest


def read_manifest(store: Store) -> tuple[DatasetManifest, str]:
    """The manifest of the dataset at `store` and its tag; `NotFound` when there is no dataset."""
    data, tag = store.read_tagged(NAME)
    return DatasetManifest.from_json(data, f"{store.url}/{NAME}"), tag


def _flaws(manifest: DatasetManifest) -> Iterator[str]:
    """What no manifest of ours holds: a sentence each, with the field and its value."""
    if not manifest.classes:
        yield "classes is empty"
    if not manifest.splits:
        yield "splits is empty"
    for n, entry in enumerate(manifest.classes):
        if not all(isinstance(text, str) and not UNPRINTABLE.search(text) for text in (entry.id, entry.name)):
            yield f"classes[{n}] is {entry.id!r:.60}, {entry.name!r:.60}, which are no texts that can be printed"
    for name, kind in (("source", str), ("seed", int), ("image_policy", dict), ("conversion", dict)):
        if not isinstance(value := getattr(manifest, name), kind):
            yield f"{name} is {value!r:.60}, not of type {kind.__name__}"
        elif isinstance(value, dict) and any(isinstance(each, dict | list) for each in value.values()):
            yield f"{name} holds more than plain values"
    twice = [name for name, count in Counter(each.name for each in _named(manifest)).items() if count > 1]
    if twice:
        yield f"the object {twice[0]!r:.60} is named twice"
    for name, split in manifest.splits.items():
        yield from _split_flaws(name, split)
    for named in _named(manifest):
        yield from _object_flaws(named)


def _split_flaws(name: str, split: Split) -> Iterator[str]:
    if not SPLIT_NAME.fullmatch(name):
        yield f"a split is called {name!r:.60}"
    if not split.shards:
        yield f"splits.{name}.shards is empty"
    if isinstance(split.index, tuple) and len(split.index) != len(split.shards):
        yield f"splits.{name} has {len(split.shards)} shards and {len(split.index)} indexes"


def _named(manifest: DatasetManifest) -> Iterator[Shard | Index]:
    for split in manifest.splits.values():
        yield from split.shards
        yield from split.indexes
    if manifest.report:
        yield manifest.report


def _object_flaws(entry: Shard | Index) -> Iterator[str]:
    name = entry.name
    inside = isinstance(name, str) and not UNPRINTABLE.search(name) and not {"", ".", ".."} & {*name.split("/")}
    if not inside or name == NAME:
        yield f"it names the object {name!r:.60}, which is no key inside the dataset"
    for field_name in ("bytes", "samples"):
        value = getattr(entry, field_name, 1)
        if type(value) is not int or not 0 <= value < MOST:
            yield f"{field_name} of {name!r:.60} is {value!r:.60}, not a number of {field_name}"
    if not isinstance(entry.sha256, str) or not SHA256.fullmatch(entry.sha256):
        yield f"sha256 of {name!r:.60} is {entry.sha256!r:.80}"


def _split(entry: dict[str, Any]) -> Split:
    index = entry["index"]
    return Split(
        tuple(Shard(**shard) for shard in entry["shards"]),
        tuple(Index(**one) for one in index) if isinstance(index, list) else Index(**index),
    )
