"""Index WebDataset tars where they lie: `wds-train shards index DATASET`.

Only index, report and manifest are written.
"""

import contextlib
import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from isal.isal_zlib import crc32, crc32_combine

from wds_train.console import Meter, readable
from wds_train.conversion.conversion_report import Note, say
from wds_train.conversion.image_policy import ImagePolicy, check
from wds_train.conversion.repeats import Packed, Repeats, find_repeats, image_digest
from wds_train.conversion.sources.litter import is_litter
from wds_train.conversion.sources.names import file_splits
from wds_train.conversion.sources.tar_keys import ANYTHING, Keys
from wds_train.conversion.sources.tar_samples import (
    BESIDE_CAPTIONS,
    MAX_LABEL,
    Labels,
    NoLabel,
    SeveralLabels,
    WdsSample,
    group,
    is_image,
    kind_of,
    without_label,
)
from wds_train.conversion.sources.tars import (
    OUTSIDE,
    UNPACK,
    is_tar,
    outside,
    refuse_archives,
    refuse_split_folders,
)
from wds_train.dataset import manifest as manifests
from wds_train.dataset.arrow import to_batch
from wds_train.dataset.index import write_index
from wds_train.dataset.manifest import (
    ClassInfo,
    DatasetManifest,
    Index,
    Shard,
    Split,
    read_manifest,
)
from wds_train.dataset.tar import Member, members
from wds_train.errors import Conflict, DataError, NotFound, StoreError, UsageError
from wds_train.storage.base import Entry, Store

CHUNK = 8 << 20  # bytes of a request
NAMED = 4  # files that a message names
# The loader fetches blocks of many samples at once; one sample must fit into one many times over.
MAX_SAMPLE = 64 << 20
ANY = "any"  # the one class of samples that may hold anything
SAMPLES = pa.schema([("key", pa.string()), ("label", pa.int32())])
RESHARD = "make shards of them: wds-train shards wds:PATH"
ANY_TOO = "--any indexes samples without images, for SampleLoader (docs/loader.md)"


class Forward:
    """Read an object from front to back, in chunks, and hash all that passes.

    Args:
        store: Where it lies.
        entry: Its name and size.
        meter: What shows the progress.
    """

    def __init__(self, store: Store, entry: Entry, meter: Meter) -> None:
        self.entry = entry
        self._store = store
        self._meter = meter
        self._digest = hashlib.sha256()
        self._data = bytearray()  # what was read and is still needed
        self._start = 0  # where `_data` begins in the object

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes at `offset`, fewer at the end; `offset` must not be forgotten."""
        assert offset >= self._start, "reads go forward"
        stop = min(offset + length, self.entry.bytes)
        while self._start + len(self._data) < stop:
            at = self._start + len(self._data)
            chunk = self._store.read(self.entry.key, at, min(CHUNK, self.entry.bytes - at))
            self._digest.update(chunk)
            self._data += chunk
            self._meter.add(len(chunk))
        return bytes(self._data[offset - self._start : stop - self._start])

    def forget(self, offset: int) -> None:
        """Drop what lies before `offset`, which will not be read again."""
        del self._data[: offset - self._start]
        self._start = offset

    def pass_over(self, stop: int) -> None:
        """Read up to `stop`, and keep nothing of it."""
        at = self._start + len(self._data)
        while at < stop:
            after = min(at + CHUNK, stop)
            self.read(at, after - at)
            self.forget(after)
            at = self._start + len(self._data)
        self.forget(stop)

    def sha256(self) -> str:
        """Return the sha256 of the whole object, after reading it to its end."""
        self.pass_over(self.entry.bytes)
        return self._digest.hexdigest()


@dataclass
class Indexed:
    """The index of one split, while it grows.

    Attributes:
        shards: The manifest's entries of the tars.
        rows: The index rows. A row's label is a text until all labels are known.
        digests: The `image_digest` of each row.
        notes: Samples that are not in the index, and why.
    """

    shards: list[Shard] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    notes: list[Note] = field(default_factory=list)


def index_in_place(
    store: Store, policy: ImagePolicy | None, said: Mapping[str, str] = MappingProxyType({})
) -> tuple[dict[str, Indexed], list[Note]]:
    """Index every tar below `store`, by split; write nothing.

    Args:
        store: Where the tars lie.
        policy: How images are checked; None for samples that hold anything.
        said: What a person said of splits; see `file_splits`.

    Returns:
        The index of each split, and the notes on what was left out.

    Raises:
        UsageError: There are no tars.
        DataError: A tar cannot be indexed.
    """
    tars = _find_tars(store)
    used, unused = file_splits([*tars], said, store.url)

    # Read each of them once.
    splits: dict[str, Indexed] = {}
    indexer = _Indexer(policy)
    with Meter(sum([tars[key].bytes for key in used])) as meter:
        for key, split in used.items():
            found = splits.setdefault(split, Indexed())
            indexer.add(found, split, Forward(store, tars[key], meter))
    indexer.labels.refuse(store.url, len(used))

    # Note what is odd about all of them together, and about each split.
    notes = [Note("", key, "ignored", cause) for key, cause in unused.items()]
    for sentence in (indexer.keys.remark(), indexer.labels.remark()):
        if sentence:
            notes.append(Note("", store.url, "kept", sentence))
    for found in splits.values():
        notes += found.notes
    # Test images are often handed out without labels: these are no split.
    if "test" in splits and not splits["test"].rows:
        del splits["test"]
    return splits, notes


def _find_tars(store: Store) -> dict[str, Entry]:
    """Return the tars below `store`, by their names.

    Raises:
        UsageError: There are none.
        DataError: There are archives that cannot be indexed.
    """
    # Find the tars, and archives that only look like some.
    there: dict[str, Entry] = {}
    tars: dict[str, Entry] = {}
    compressed = []
    for entry in store.list():
        if is_litter(entry.key):
            continue
        there[entry.key] = entry
        if entry.key.lower().endswith(".tar"):
            tars[entry.key] = entry
        elif is_tar(entry.key):
            compressed.append(entry.key)

    # No archive is passed over in silence: half of the data would be missing.
    refuse_archives(there, store.url)
    if tars and compressed:
        shown = ", ".join(compressed[:NAMED])
        raise DataError(f"{store.url} holds {shown}, compressed, which cannot be indexed; {UNPACK}")
    if not tars:
        raise UsageError(
            f"{store.url} holds no .tar files; check the address; "
            ".tar.gz must be unpacked to plain tars"
        )
    return tars


@dataclass(frozen=True)
class _Part:
    """The facts about a member of a tar, which is read once.

    Attributes:
        member: Its place in the tar.
        crc32: From its header to its padding.
        text: The content of a member that may be a label.
        size: Width and height of an image, pixels.
        flaw: Why it is no usable image.
        digest: The `image_digest` of an image.
    """

    member: Member
    crc32: int
    text: bytes = b""
    size: tuple[int, int] = (1, 1)
    flaw: str = ""
    digest: int = 0


class _Indexer:
    """Indexes the tars of a source, one after the other, with what they have in common.

    Args:
        policy: How images are checked; None for samples that hold anything.
    """

    def __init__(self, policy: ImagePolicy | None) -> None:
        self.keys = Keys()
        self.labels = Labels()
        self._policy = policy

    def add(self, found: Indexed, split: str, file: Forward) -> None:
        """Add the samples of the tar `file` to those `found`."""
        name = file.entry.key
        before = len(found.rows)
        try:
            parts = []
            for member in members(file.read, 0, file.entry.bytes):
                parts.append(_read(member, file, self._policy))
            plain = _plain_members(parts)

            # Group them into samples by their names.
            how = self.keys.choose(name, plain, BESIDE_CAPTIONS if self._policy else ANYTHING)
            samples = [*group(plain, how)]
            if self._policy:
                refuse_split_folders(name, samples, split)
            self._add_samples(found, split, name, samples, parts)
        except DataError as error:
            raise DataError(f"{name} cannot be indexed: {error}") from error
        found.shards.append(Shard(name, file.entry.bytes, len(found.rows) - before, file.sha256()))

    def _add_samples(
        self,
        found: Indexed,
        split: str,
        name: str,
        samples: list[WdsSample],
        parts: list[_Part],
    ) -> None:
        """Add the `samples` of the tar `name` to those `found`, or note why not."""
        tar = _TarParts(parts)
        seen: set[str] = set()
        for sample in samples:
            # A sample is read as one range of bytes: its members must be neighbours.
            if sample.key in seen:
                raise DataError(
                    f"the members of {sample.key!r} do not lie side by side; "
                    "re-shard it: wds-train shards wds:PATH"
                )
            seen.add(sample.key)
            origin = readable(f"{name}: {sample.key}")
            if sample.is_stray and self._policy:
                found.notes.append(Note(split, origin, "ignored", "beside the samples"))
                continue
            try:
                if self._policy:
                    self.labels.check_split(origin, sample, tar.text, split)
                row = {"shard": len(found.shards), **self._row(sample, tar)}
                found.rows.append(row)
                found.digests.append(tar.digest(row["data_offset"]))
            except SeveralLabels as error:
                raise DataError(f"{sample.key}: {error}") from error
            except NoLabel as error:
                found.notes.append(without_label(split, origin, error))
            except DataError as error:
                found.notes.append(Note(split, origin, "left out", str(error)))

    def _row(self, sample: WdsSample, tar: "_TarParts") -> dict[str, Any]:
        """Return the index row of a sample, without its shard.

        Raises:
            DataError: The sample cannot be used.
        """
        # A sample is the range from its first member to the end of its last.
        own = sorted(sample.members.values(), key=lambda member: member.offset)
        start = own[0].offset

        # Refuse what the loader could not name or stream.
        length = own[-1].end - start
        largest = max(own, key=lambda member: member.size)
        if self._policy:
            if not sample.images():
                raise DataError(f"no image member; {ANY_TOO}")
        elif largest.size == 0:
            raise DataError("its members are empty")
        if not sample.key or readable(sample.key) != sample.key:
            raise DataError("its name is empty, not UTF-8, or cannot be printed; rename it")
        if outside(sample.key):
            raise DataError(OUTSIDE)
        if length > MAX_SAMPLE:
            raise DataError(f"it takes {length} bytes; at most {MAX_SAMPLE} can be streamed")

        # Of samples that may hold anything, the largest member takes the place of the image.
        label = ANY
        image: Member | None = largest
        if self._policy:
            label = self.labels.label(sample, tar.text)
            image = sample.image()
        assert image is not None, "it has one"
        part = tar.at(image)
        if part.flaw:
            raise DataError(part.flaw)
        return {
            "offset": start,
            "length": length,
            "data_offset": image.data_offset,
            "data_length": image.size,
            "label": label,
            "key": sample.key,
            "width": part.size[0],
            "height": part.size[1],
            "crc32": tar.crc32(own[0], own[-1]),
        }


class _TarParts:
    """The members of a tar, found by their offsets."""

    def __init__(self, parts: list[_Part]) -> None:
        self._parts = parts
        self._place: dict[int, int] = {}
        self._by_data: dict[int, _Part] = {}
        for place, part in enumerate(parts):
            self._place[part.member.offset] = place
            self._by_data[part.member.data_offset] = part

    def at(self, member: Member) -> _Part:
        """Return what is known of `member`."""
        return self._parts[self._place[member.offset]]

    def text(self, offset: int, length: int) -> bytes:
        """Return the content of the label member whose data begin at `offset`."""
        return self._by_data[offset].text

    def digest(self, offset: int) -> int:
        """Return the `image_digest` of the image whose data begin at `offset`."""
        return self._by_data[offset].digest

    def crc32(self, first: Member, last: Member) -> int:
        """Return the checksum of all bytes from the `first` member to the end of the `last`."""
        checksum = 0
        start = self._place[first.offset]
        end = self._place[last.offset] + 1
        for part in self._parts[start:end]:
            size = part.member.end - part.member.offset
            checksum = crc32_combine(checksum, part.crc32, size)
        return checksum


def _counts(member: Member) -> bool:
    """Return whether the member belongs to a sample: folders and litter do not."""
    return member.kind != "directory" and not is_litter(member.name)


def _plain_members(parts: list[_Part]) -> list[Member]:
    """Return the members that belong to samples.

    Raises:
        DataError: One of them is no file.
    """
    plain = []
    for part in parts:
        member = part.member
        if not _counts(member):
            continue
        if member.kind != "file":
            raise DataError(f"{member.name!r} is a {member.kind}; only plain files can be used")
        plain.append(member)
    return plain


def _read(member: Member, file: Forward, policy: ImagePolicy | None) -> _Part:
    """Read a member, check it if it is an image, and return the facts; its bytes are dropped."""
    if member.end - member.offset > MAX_SAMPLE:  # no sample can hold it
        file.pass_over(member.end)
        return _Part(member, 0)

    # Read all of it: the checksum of a sample covers headers and padding.
    record = file.read(member.offset, member.end - member.offset)
    file.forget(member.end)
    checksum = crc32(record)
    if not policy or not _counts(member):
        return _Part(member, checksum)

    # Keep what decides the sample: the facts about an image, the text of a label.
    start = member.data_offset - member.offset
    data = record[start : start + member.size]
    if is_image(member.name):
        return _check_image(member, checksum, data, policy)
    name = member.name.lower()
    may_be_label = kind_of(name) in BESIDE_CAPTIONS or ".label." in name
    if may_be_label and member.size <= MAX_LABEL:
        return _Part(member, checksum, data)
    return _Part(member, checksum)


def _check_image(member: Member, checksum: int, data: bytes, policy: ImagePolicy) -> _Part:
    """Return the facts about the image `data`, or why it is unreadable."""
    try:
        image = check(data, policy)
    except DataError as error:
        return _Part(member, checksum, flaw=str(error))
    if image.altered:
        flaw = f"it has to be encoded anew ({image.oddity}), and tars stay as they are; {RESHARD}"
        return _Part(member, checksum, flaw=flaw)
    size = (image.width, image.height)
    return _Part(member, checksum, size=size, digest=image_digest(data))


def repeats_in_place(splits: dict[str, Indexed], classes: tuple[ClassInfo, ...]) -> Repeats:
    """Find images that the tars hold twice. The label of every row must be a number by now."""
    tables = {}
    packed = []
    for split, found in splits.items():
        keys = []
        labels = []
        for row in found.rows:
            keys.append(row["key"])
            labels.append(row["label"])
        tables[split] = pa.Table.from_batches([to_batch([keys, labels], SAMPLES)])
        packed.append(Packed(split, np.arange(len(keys)), np.array(found.digests, np.uint64)))
    return find_repeats(tables, packed, classes)


def write_dataset(
    store: Store,
    splits: dict[str, Indexed],
    classes: tuple[ClassInfo, ...],
    image_policy: dict[str, Any],
    report: bytes,
    *,
    overwrite: bool,
) -> DatasetManifest:
    """Write indexes and report, then the manifest.

    A manifest that is replaced stays, with all objects that it names, until the new one is written.

    Args:
        store: Where the tars lie.
        splits: The index of each split; labels are numbers.
        classes: The classes.
        image_policy: The manifest's image policy.
        report: The content of the report.
        overwrite: Replace another manifest.

    Raises:
        UsageError: Another manifest is there, and is not to be replaced.
        Conflict: Another writer has changed the manifest meanwhile.
    """
    # Remember the version of the manifest that is replaced.
    old = None
    condition: dict[str, Any] = {"if_absent": True}
    with contextlib.suppress(NotFound):
        old, tag = read_manifest(store)
        condition = {"if_match": tag}

    # Nothing names these until the manifest is written.
    parts = {}
    for split, found in splits.items():
        index = _put(store, f"{split}/index", ".parquet", write_index(found.rows))
        parts[split] = Split(tuple(found.shards), index)
    reported = _put(store, "report", ".json", report)
    made = DatasetManifest(classes, parts, manifests.IN_PLACE, 0, image_policy, {}, reported)

    # The manifest, over the one that was read before: another writer since then is a conflict.
    if old is not None and not overwrite and old.fingerprint != made.fingerprint:
        raise UsageError(
            f"{store.url} has another manifest already, {old.fingerprint}; --overwrite replaces it"
        )
    store.write(manifests.NAME, made.to_json(), **condition)
    if old is not None:
        _remove_replaced(store, old, made)
    return made


def _remove_replaced(store: Store, old: DatasetManifest, made: DatasetManifest) -> None:
    """Remove the objects of the manifest `old` that the new one does not name, except tars."""
    try:
        for name in old.objects() - made.objects():
            # A tar is somebody's data, however it was indexed before.
            if not name.lower().endswith(".tar"):
                store.delete(name)
    except StoreError as error:
        say(f"the index that was replaced stays there ({error})", 2)


def _put(store: Store, name: str, suffix: str, body: bytes) -> Index:
    """Write an object; under another name if there is one of that name with other content."""
    digest = hashlib.sha256(body).hexdigest()
    try:
        store.write(name + suffix, body, if_absent=True)
        return Index(name + suffix, len(body), digest)
    except Conflict:
        name = f"{name}.{digest[:8]}{suffix}"
        store.write(name, body)
        return Index(name, len(body), digest)
