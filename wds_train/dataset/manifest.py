"""The dataset manifest: `manifest.json` next to the shards, written last.

What it does not name does not exist. Its fields:

    {"format": 1, "kind": "wds-train dataset", "classes": [{"id", "name"}],
     "splits": {"train": {"shards": [{"name", "bytes", "samples", "sha256"}],
                          "index": {"name", "bytes", "sha256"}}},
     "source", "seed", "image_policy", "fingerprint",
     "conversion": what else decided the bytes,
     "report": {"name", "bytes", "sha256"} of the list of samples left out or altered}

A large split has a list for its "index", with one for each shard in turn. The manifest is then of
format 2.
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
# With an index for each shard.
FORMAT_BY_SHARD = 2
KIND = "wds-train dataset"
NAME = "manifest.json"
# The source of a dataset whose tars others wrote.
IN_PLACE = "webdataset, indexed in place"
SHA256 = re.compile("[0-9a-f]{64}")
# Bytes or samples: sums of a few still fit into 64 bits.
MOST = 1 << 62
# In a name, these would break a line, or write over what a terminal shows; half a surrogate cannot
# be written at all.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
SPLIT_NAME = re.compile("[A-Za-z0-9_-]{1,60}")
# The addition to the name of a shard that replaces one in an overwritten dataset:
# train/shard-000007.1f2e3d4c.tar.
REPLACEMENT = re.compile(r"(?<=/shard-\d{6})\.[0-9a-f]{8}(?=\.tar$)")


@dataclass(frozen=True)
class ClassInfo:
    """A class. Its label is its place in the manifest's list.

    Attributes:
        id: Its name in the source, such as a wnid.
        name: Its name for people.
    """

    id: str
    name: str


# Slots save memory: there may be 80,000 shards.
@dataclass(frozen=True, slots=True)
class Shard:
    """A shard: its object's name, its size, its samples, and the sha256 of its bytes."""

    name: str
    bytes: int
    samples: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Index:
    """An object next to the shards: its name, its size, and the sha256 of its bytes."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """A split of a dataset.

    Attributes:
        shards: Its shards, in dataset order.
        index: The index of all samples, or one for each shard.
    """

    shards: tuple[Shard, ...]
    index: Index | tuple[Index, ...]

    @property
    def indexes(self) -> tuple[Index, ...]:
        """All of its index objects."""
        if isinstance(self.index, tuple):
            return self.index
        return (self.index,)

    @property
    def samples(self) -> int:
        """The number of samples."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """The bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class DatasetManifest:
    """The manifest of a dataset.

    Attributes:
        classes: The classes, in the order of labels.
        splits: The splits by name.
        source: Where the images came from, for people.
        seed: The seed of the order of samples in the shards.
        image_policy: How images were altered, as plain values.
        conversion: What else decided the bytes, as plain values.
        report: The list of samples that were left out or altered.
    """

    classes: tuple[ClassInfo, ...]
    splits: dict[str, Split]
    source: str
    seed: int
    image_policy: dict[str, Any]
    conversion: dict[str, Any] = field(default_factory=dict)
    report: Index | None = None

    @property
    def fingerprint(self) -> str:
        """The sha256 of the content alone: of classes and shards.

        It leaves out where they came from, and what they replaced. It also leaves out the index,
        which follows from the shards: its encoding may change with pyarrow's version.
        """
        shards: dict[str, list[dict[str, Any]]] = {}
        for name, split in self.splits.items():
            shards[name] = []
            for shard in split.shards:
                # Not by `asdict`, which takes .4 s for 80,000 shards.
                shards[name].append(
                    {
                        "bytes": shard.bytes,
                        "name": REPLACEMENT.sub("", shard.name),
                        "samples": shard.samples,
                        "sha256": shard.sha256,
                    }
                )
        content = {"classes": [asdict(each) for each in self.classes], "shards": shards}
        # Any other spacing or order of names would be another fingerprint.
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def split(self, name: str) -> Split:
        """Return the split `name`; raise `DataError` if there is none."""
        if name not in self.splits:
            remedy = ""
            if name == "val":
                remedy = "; convert it with --hold-out 0.1, which takes one from train"
            raise DataError(
                f"the dataset has no split {name!r}; it has {', '.join(self.splits)}{remedy}"
            )
        return self.splits[name]

    def objects(self) -> set[str]:
        """Return the names of all objects that the manifest names."""
        return {named.name for named in _list_objects(self)}

    @property
    def format(self) -> int:
        """The format that it is written in."""
        for split in self.splits.values():
            if isinstance(split.index, tuple):
                return FORMAT_BY_SHARD
        return FORMAT

    def to_json(self) -> bytes:
        """Return the file's bytes."""
        head = {"format": self.format, "kind": KIND, "fingerprint": self.fingerprint}
        text = json.dumps(head | asdict(self), indent=1, ensure_ascii=False)
        return f"{text}\n".encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "DatasetManifest":
        """Read a manifest.

        Args:
            data: The file's bytes.
            where: Its address, for messages.

        Raises:
            DataError: It is of another kind or a newer format, or damaged.
        """
        # The file: JSON, of our kind, in a format that this version reads.
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise DataError(
                f"{where} is not a {KIND} manifest; convert the dataset with `wds-train shards`"
            )
        found = content.get("format")
        if found not in (FORMAT, FORMAT_BY_SHARD):
            shown = "of another kind"
            if isinstance(found, int):
                shown = str(found)
            raise DataError(
                f"{where} has format {shown}, this wds-train reads formats {FORMAT} and "
                f"{FORMAT_BY_SHARD}; upgrade it"
            )

        # The content may be of any types: the constructors, and the checks, fail on odd ones.
        try:
            manifest = _read_content(content)
            flaw = next(_find_flaws(manifest), None)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{where} is damaged: {error!r:.200}; convert the dataset again"
            ) from error
        if flaw:
            raise DataError(f"{where} is damaged: {flaw}; convert the dataset again")

        # What decides the order of a training must be what the conversion wrote.
        if manifest.fingerprint != content.get("fingerprint"):
            raise DataError(
                f"{where} was altered: its content hashes to {manifest.fingerprint}, "
                f"it says {content.get('fingerprint')}; convert the dataset again"
            )
        return manifest


def read_manifest(store: Store) -> tuple[DatasetManifest, str]:
    """Read the manifest of a dataset.

    Args:
        store: The store at the dataset's address.

    Returns:
        The manifest, and the tag of its object, for a conditional write.

    Raises:
        NotFound: There is no dataset.
        DataError: It is of another kind or a newer format, or damaged.
    """
    data, tag = store.read_tagged(NAME)
    return DatasetManifest.from_json(data, f"{store.url}/{NAME}"), tag


def _find_flaws(manifest: DatasetManifest) -> Iterator[str]:
    """Yield a sentence, with field and value, for each thing that no manifest of ours has."""
    if not manifest.classes:
        yield "classes is empty"
    if not manifest.splits:
        yield "splits is empty"
    for number, entry in enumerate(manifest.classes):
        if not (_is_printable(entry.id) and _is_printable(entry.name)):
            yield (
                f"classes[{number}] is {entry.id!r:.60}, {entry.name!r:.60}, "
                "which are no texts that can be printed"
            )

    # What is for people and for another conversion: plain values.
    kinds = {"source": str, "seed": int, "image_policy": dict, "conversion": dict}
    for name, kind in kinds.items():
        value = getattr(manifest, name)
        if not isinstance(value, kind):
            yield f"{name} is {value!r:.60}, not of type {kind.__name__}"
        elif isinstance(value, dict) and not _is_flat(value):
            yield f"{name} holds more than plain values"

    # The objects: each has one name, inside the dataset, and a size and a sha256 that can be.
    yield from _find_name_given_twice(manifest)
    for name, split in manifest.splits.items():
        yield from _find_split_flaws(name, split)
    for named in _list_objects(manifest):
        yield from _find_object_flaws(named)


def _find_name_given_twice(manifest: DatasetManifest) -> Iterator[str]:
    counts = Counter(each.name for each in _list_objects(manifest))
    for name, count in counts.items():
        if count > 1:
            yield f"the object {name!r:.60} is named twice"
            return


def _is_printable(text: Any) -> bool:
    return isinstance(text, str) and not UNPRINTABLE.search(text)


def _is_flat(values: dict[str, Any]) -> bool:
    """Return True if `values` holds no dictionaries and lists."""
    return not any(isinstance(each, dict | list) for each in values.values())


def _find_split_flaws(name: str, split: Split) -> Iterator[str]:
    if not SPLIT_NAME.fullmatch(name):
        yield f"a split is called {name!r:.60}"
    if not split.shards:
        yield f"splits.{name}.shards is empty"
    if isinstance(split.index, tuple) and len(split.index) != len(split.shards):
        yield f"splits.{name} has {len(split.shards)} shards and {len(split.index)} indexes"


def _list_objects(manifest: DatasetManifest) -> Iterator[Shard | Index]:
    """Yield all objects that the manifest names, with their facts."""
    for split in manifest.splits.values():
        yield from split.shards
        yield from split.indexes
    if manifest.report:
        yield manifest.report


def _find_object_flaws(entry: Shard | Index) -> Iterator[str]:
    name = entry.name
    # A name such as "../x" would lead out of the dataset.
    inside = _is_printable(name) and not {"", ".", ".."} & {*name.split("/")}
    if not inside or name == NAME:
        yield f"it names the object {name!r:.60}, which is no key inside the dataset"
    # An index has no samples.
    for field_name in ("bytes", "samples"):
        value = getattr(entry, field_name, 1)
        if type(value) is not int or not 0 <= value < MOST:
            yield f"{field_name} of {name!r:.60} is {value!r:.60}, not a number of {field_name}"
    if not isinstance(entry.sha256, str) or not SHA256.fullmatch(entry.sha256):
        yield f"sha256 of {name!r:.60} is {entry.sha256!r:.80}"


def _read_content(content: dict[str, Any]) -> DatasetManifest:
    """Return the manifest with the fields of a file, which are not checked yet."""
    classes = [ClassInfo(**entry) for entry in content["classes"]]
    splits = {}
    for name, entry in content["splits"].items():
        splits[name] = _read_split(entry)
    return DatasetManifest(
        classes=tuple(classes),
        splits=splits,
        source=content["source"],
        seed=content["seed"],
        image_policy=content["image_policy"],
        # Older manifests have neither of the two.
        conversion=content.get("conversion", {}),
        report=_read_report(content),
    )


def _read_report(content: dict[str, Any]) -> Index | None:
    if not content.get("report"):
        return None
    return Index(**content["report"])


def _read_split(entry: dict[str, Any]) -> Split:
    index: Index | tuple[Index, ...]
    if isinstance(entry["index"], list):
        index = tuple(Index(**each) for each in entry["index"])
    else:
        index = Index(**entry["index"])
    shards = [Shard(**shard) for shard in entry["shards"]]
    return Split(tuple(shards), index)
