"""`wds-train shards index DATASET`: WebDataset tars become a dataset where they lie. Only index and manifest are written."""

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
from wds_train.conversion.sources.tars import OUTSIDE, UNPACK, is_tar, outside, refuse_archives, refuse_split_folders
from wds_train.dataset import manifest as manifests
from wds_train.dataset.arrow import to_batch
from wds_train.dataset.index import write_index
from wds_train.dataset.manifest import ClassInfo, DatasetManifest, Index, Shard, Split, read_manifest
from wds_train.dataset.tar import Member, members
from wds_train.errors import Conflict, DataError, NotFound, StoreError, UsageError
from wds_train.storage.base import Entry, Store

CHUNK = 8 << 20
# A block of this many samples is what the loader fetches at once; one sample must fit many times over.
MAX_SAMPLE = 64 << 20
ANY = "any"  # the one class of samples that may hold anything
SAMPLES = pa.schema([("key", pa.string()), ("label", pa.int32())])
RESHARD = "make shards of them: wds-train shards wds:PATH"
ANY_TOO = "--any indexes samples without images, for SampleLoader (docs/loader.md)"


class Forward:
    """Reads of an object that move forward, in chunks, with the sha256 of all that passed."""

    def __init__(self, store: Store, entry: Entry, meter: Meter) -> None:
        self.entry = entry
        self._meter, self._store, self._digest = meter, store, hashlib.sha256()
        self._data, self._start = bytearray(), 0

    def read(self, offset: int, length: int) -> bytes:
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
        """Let go of what lies before `offset`, which will not be read again."""
        del self._data[: offset - self._start]
        self._start = offset

    def pass_over(self, stop: int) -> None:
        """Read up to `stop`, and keep nothing of it."""
        while (at := self._start + len(self._data)) < stop:
            after = min(at + CHUNK, stop)
            self.read(at, after - at)
            self.forget(after)
        self.forget(stop)

    def sha256(self) -> str:
        """The sha256 of the whole object, which is read to its end."""
        self.pass_over(self.entry.bytes)
        return self._digest.hexdigest()


@dataclass
class Indexed:
    """What indexing brings together for one split. A row's label is a text, until all are known.
    `digests`: the `image_digest` of each row.
    """

    shards: list[Shard] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    notes: list[Note] = field(default_factory=list)


def index_in_place(
    store: Store, policy: ImagePolicy | None, said: Mapping[str, str] = MappingProxyType({})
) -> tuple[dict[str, Indexed], list[Note]]:
    """Index every tar below `store`, by split; nothing is written.

    Args:
        store: Where the tars lie.
        policy: How images are checked; None for samples that hold anything.
        said: What a person said of splits; see `file_splits`.

    Returns:
        The index of each split, and the notes on what was left out.
    """
    there = {entry.key: entry for entry in store.list() if not is_litter(entry.key)}
    entries = {key: entry for key, entry in there.items() if key.lower().endswith(".tar")}
    refuse_archives(there, store.url)
    packed = [key for key in there if is_tar(key) and key not in entries]
    if entries and packed:
        raise DataError(f"{store.url} holds {', '.join(packed[:4])}, compressed, which cannot be indexed; {UNPACK}")
    if not entries:
        raise UsageError(f"{store.url} holds no .tar files; check the address; .tar.gz must be unpacked to plain tars")
    used, unused = file_splits([*entries], said, store.url)
    splits = {split: Indexed() for split in dict.fromkeys(used.values())}
    indexer = _Indexer(policy)
    with Meter(sum(entries[key].bytes for key in used)) as meter:
        for key, split in used.items():
            indexer.add(splits[split], split, Forward(store, entries[key], meter))
    indexer.labels.refuse(store.url, len(used))
    notes = [Note("", key, "ignored", cause) for key, cause in unused.items()]
    notes += [Note("", store.url, "kept", told) for told in (indexer.keys.told(), indexer.labels.told()) if told]
    notes += [note for found in splits.values() for note in found.notes]
    # Test images are often handed out without labels: these are no split.
    return {split: found for split, found in splits.items() if found.rows or split != "test"}, notes


@dataclass(frozen=True)
class _Part:
    """A member of a tar that was read once: what is needed of it, whichever sample it belongs to."""

    member: Member
    crc32: int  # from its header to its padding
    text: bytes = b""  # of what may be a label
    size: tuple[int, int] = (1, 1)  # width and height of an image
    flaw: str = ""  # why it is no image that can be used
    digest: int = 0  # the `image_digest` of an image


class _Indexer:
    """Indexes the tars of a source, one after the other, with what they have in common."""

    def __init__(self, policy: ImagePolicy | None) -> None:
        self.keys = Keys()
        self.labels = Labels()
        self._policy = policy

    def add(self, found: Indexed, split: str, file: Forward) -> None:
        """Add the samples of the tar `file` to those `found`."""
        name, before = file.entry.key, len(found.rows)
        try:
            parts = [_read(member, file, self._policy) for member in members(file.read, 0, file.entry.bytes)]
            plain = [part.member for part in parts if _counts(part.member)]
            odd = next((member for member in plain if member.kind != "file"), None)
            if odd is not None:
                raise DataError(f"{odd.name!r} is a {odd.kind}; only plain files can be used")
            how = self.keys.choose(name, plain, BESIDE_CAPTIONS if self._policy else ANYTHING)
            samples = [*group(plain, how)]
            if self._policy:
                refuse_split_folders(name, samples, split)
            self._add_samples(found, split, name, samples, parts)
        except DataError as error:
            raise DataError(f"{name} cannot be indexed: {error}") from error
        found.shards.append(Shard(name, file.entry.bytes, len(found.rows) - before, file.sha256()))

    def _add_samples(self, found: Indexed, split: str, name: str, samples: list[WdsSample], parts: list[_Part]) -> None:
        tar, seen = _TarParts(parts), set[str]()
        for sample in samples:
            if sample.key in seen:
                raise DataError(
                    f"the members of {sample.key!r} do not lie side by side; re-shard it: wds-train shards wds:PATH"
                )
            seen.add(sample.key)
            origin = readable(f"{name}: {sample.key}")
            if sample.is_none and self._policy:
                found.notes.append(Note(split, origin, "ignored", "beside the samples"))
                continue
            try:
                if self._policy:
                    self.labels.check_split(origin, sample, tar.text, split)
                row = {"shard": len(found.shards)} | self._row(sample, tar)
                found.rows.append(row)
                found.digests.append(tar.digest(row["data_offset"]))
            except SeveralLabels as error:
                raise DataError(f"{sample.key}: {error}") from error
            except NoLabel as error:
                found.notes.append(without_label(split, origin, error))
            except DataError as error:
                found.notes.append(Note(split, origin, "left out", str(error)))

    def _row(self, sample: WdsSample, tar: "_TarParts") -> dict[str, Any]:
        own = sorted(sample.members.values(), key=lambda member: member.offset)
        start, end = own[0].offset, own[-1].end
        if self._policy and not sample.images():
            raise DataError(f"no image member; {ANY_TOO}")
        if not self._policy and not any(member.size for member in own):
            raise DataError("its members are empty")
        if not sample.key or readable(sample.key) != sample.key:
            raise DataError("its name is empty, not UTF-8, or cannot be printed; rename it")
        if outside(sample.key):
            raise DataError(OUTSIDE)
        if end - start > MAX_SAMPLE:
            raise DataError(f"it takes {end - start} bytes; at most {MAX_SAMPLE} can be streamed")
        label = self.labels.label(sample, tar.text) if self._policy else ANY
        image = sample.image() if self._policy else max(own, key=lambda member: member.size)
        assert image is not None, "it has one"
        part = tar.at(image)
        if part.flaw:
            raise DataError(part.flaw)
        return {
            "offset": start,
            "length": end - start,
            "data_offset": image.data_offset,
            "data_length": image.size,
            "label": label,
            "key": sample.key,
            "width": part.size[0],
            "height": part.size[1],
            "crc32": tar.crc32(own[0], own[-1]),
        }


class _TarParts:
    """The members of a tar, by where they lie."""

    def __init__(self, parts: list[_Part]) -> None:
        self._parts = parts
        self._place = {part.member.offset: place for place, part in enumerate(parts)}
        self._by_data = {part.member.data_offset: part for part in parts}

    def at(self, member: Member) -> _Part:
        return self._parts[self._place[member.offset]]

    def text(self, offset: int, length: int) -> bytes:
        """The content of the label member whose data begin at `offset`."""
        return self._by_data[offset].text

    def digest(self, offset: int) -> int:
        """The `image_digest` of the image whose data begin at `offset`."""
        return self._by_data[offset].digest

    def crc32(self, first: Member, last: Member) -> int:
        """The checksum of all that lies from the `first` member to the end of the `last`."""
        checksum = 0
        for part in self._parts[self._place[first.offset] : self._place[last.offset] + 1]:
            checksum = crc32_combine(checksum, part.crc32, part.member.end - part.member.offset)
        return checksum


def _counts(member: Member) -> bool:
    """Whether the member belongs to a sample: folders and litter do not."""
    return member.kind != "directory" and not is_litter(member.name)


def _read(member: Member, file: Forward, policy: ImagePolicy | None) -> _Part:
    """What is needed of the member; its bytes are let go of."""
    if member.end - member.offset > MAX_SAMPLE:  # no sample can hold it
        file.pass_over(member.end)
        return _Part(member, 0)
    record = file.read(member.offset, member.end - member.offset)
    file.forget(member.end)
    checksum = crc32(record)
    if not policy or not _counts(member):
        return _Part(member, checksum)
    start = member.data_offset - member.offset
    data = record[start : start + member.size]
    if is_image(member.name):
        try:
            image = check(data, policy)
        except DataError as error:
            return _Part(member, checksum, flaw=str(error))
        if image.altered:
            flaw = f"it has to be encoded anew ({image.oddity}), and tars stay as they are; {RESHARD}"
            return _Part(member, checksum, flaw=flaw)
        return _Part(member, checksum, size=(image.width, image.height), digest=image_digest(data))
    name = member.name.lower()
    may_be_label = kind_of(name) in BESIDE_CAPTIONS or ".label." in name
    return _Part(member, checksum, data if may_be_label and member.size <= MAX_LABEL else b"")


def repeats_in_place(splits: dict[str, Indexed], classes: tuple[ClassInfo, ...]) -> Repeats:
    """Which images the tars hold twice. To be asked when the label of every row is a number."""
    tables, packed = {}, []
    for split, found in splits.items():
        keys = [row["key"] for row in found.rows]
        labels = [row["label"] for row in found.rows]
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
    """Write indexes and report, then the manifest; `UsageError` where another manifest is, unless it is to be replaced: it
    stays, with all that it names, until the new one has taken its place.
    """
    there, condition = None, dict[str, Any](if_absent=True)
    with contextlib.suppress(NotFound):
        there, tag = read_manifest(store)
        condition = {"if_match": tag}
    parts = {
        split: Split(tuple(found.shards), _put(store, f"{split}/index", ".parquet", write_index(found.rows)))
        for split, found in splits.items()
    }
    made = DatasetManifest(
        classes, parts, manifests.IN_PLACE, 0, image_policy, {}, _put(store, "report", ".json", report)
    )
    if there is not None and not overwrite and there.fingerprint != made.fingerprint:
        raise UsageError(f"{store.url} has another manifest already, {there.fingerprint}; --overwrite replaces it")
    store.write(manifests.NAME, made.to_json(), **condition)
    tars = {shard.name for split in splits.values() for shard in split.shards}
    try:
        for stale in (there.objects() if there else set()) - made.objects() - tars:
            if not stale.lower().endswith(".tar"):  # a tar is somebody's data, whoever indexed it before
                store.delete(stale)
    except StoreError as error:
        say(f"the index that was replaced stays there ({error})", 2)
    return made


def _put(store: Store, name: str, suffix: str, body: bytes) -> Index:
    """Write the object, beside one of that name that holds something else."""
    digest = hashlib.sha256(body).hexdigest()
    try:
        store.write(name + suffix, body, if_absent=True)
        return Index(name + suffix, len(body), digest)
    except Conflict:
        name = f"{name}.{digest[:8]}{suffix}"
        store.write(name, body)
        return Index(name, len(body), digest)
