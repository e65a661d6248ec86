"""`wds-train shards index DATASET`: WebDataset tars become a dataset where they lie. Only index and manifest are written."""

import contextlib
import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from isal.isal_zlib import crc32

from shards.images import ImagePolicy, check
from shards.repeats import Packed, Repeats, find_repeats, image_digest
from shards.report import Note
from shards.sources.litter import is_litter
from shards.sources.names import choose_splits, split_word
from shards.sources.tars import OUTSIDE, WdsSample, group, outside
from wds_train.errors import Conflict, DataError, NotFound, UsageError
from wds_train.format import manifest as manifests
from wds_train.format.arrow import to_batch
from wds_train.format.index import write_index
from wds_train.format.manifest import ClassInfo, DatasetManifest, Index, Shard, Split, read_manifest
from wds_train.format.tar import members
from wds_train.storage.base import Entry, Store
from wds_train.tracking.console import Meter, readable

CHUNK = 8 << 20
# A block of this many samples is what the loader fetches at once; one sample must fit many times over.
MAX_SAMPLE = 64 << 20
ANY = "any"  # the one class of samples that may hold anything
SAMPLES = pa.schema([("key", pa.string()), ("label", pa.int32())])
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

    def sha256(self) -> str:
        """The sha256 of the whole object, which is read to its end."""
        while (at := self._start + len(self._data)) < self.entry.bytes:
            self.read(at, CHUNK)
            self.forget(min(at + CHUNK, self.entry.bytes))
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


def index_in_place(store: Store, policy: ImagePolicy | None) -> tuple[dict[str, Indexed], list[Note]]:
    """The index of every tar below `store`, by split, and the notes on what was left out; nothing is written. With no
    policy for images, of samples that hold anything.
    """
    entries = [entry for entry in store.list() if entry.key.endswith(".tar") and not is_litter(entry.key)]
    if not entries:
        raise UsageError(f"{store.url} holds no .tar files; check the address; .tar.gz must be unpacked to plain tars")
    words = {entry: split_word(entry.key) for entry in entries}
    chosen = choose_splits(words.values())
    splits = {split: Indexed() for split in chosen.values()}
    with Meter(sum(entry.bytes for entry, word in words.items() if word in chosen)) as meter:
        for entry, word in words.items():
            if word in chosen:
                _index_tar(splits[chosen[word]], chosen[word], Forward(store, entry, meter), policy)
    notes = [
        Note("", e.key, "ignored", f"the split {word!r} is not used") for e, word in words.items() if word not in chosen
    ]
    return splits, notes + [note for found in splits.values() for note in found.notes]


def _index_tar(found: Indexed, split: str, file: Forward, policy: ImagePolicy | None) -> None:
    name, number, before = file.entry.key, len(found.shards), len(found.rows)
    seen: set[str] = set()
    try:
        for sample in _samples(file):
            if sample.key in seen:
                raise DataError(
                    f"the members of {sample.key!r} do not lie side by side; re-shard it: wds-train shards wds:PATH"
                )
            seen.add(sample.key)
            if sample.is_none and policy:
                found.notes.append(Note(split, readable(f"{name}: {sample.key}"), "ignored", "beside the samples"))
                continue
            try:
                found.rows.append(_row(sample, file, number, policy))
                found.digests.append(_digest(found.rows[-1], file))
            except DataError as error:
                found.notes.append(Note(split, readable(f"{name}: {sample.key}"), "left out", str(error)))
    except DataError as error:
        raise DataError(f"{file.entry.key} cannot be indexed: {error}") from error
    found.shards.append(Shard(name, file.entry.bytes, len(found.rows) - before, file.sha256()))


def _samples(file: Forward) -> Iterator[WdsSample]:
    """The samples of a tar; each one's bytes can be read until the next is asked for."""
    everything = members(file.read, 0, file.entry.bytes)
    plain = (member for member in everything if member.kind != "directory" and not is_litter(member.name))
    for sample in group(plain):
        odd = next((member for member in sample.members.values() if member.kind != "file"), None)
        if odd is not None:
            raise DataError(f"{odd.name!r} is a {odd.kind}; only plain files can be used")
        yield sample
        file.forget(max(member.end for member in sample.members.values()))


def _row(sample: WdsSample, file: Forward, number: int, policy: ImagePolicy | None) -> dict[str, Any]:
    parts = sorted(sample.members.values(), key=lambda member: member.offset)
    start, end = parts[0].offset, parts[-1].end
    image = sample.image if policy else max(parts, key=lambda member: member.size)
    if image is None:
        raise DataError(f"no image member; {ANY_TOO}")
    if not image.size and not policy:
        raise DataError("its members are empty")
    if not sample.key or readable(sample.key) != sample.key:
        raise DataError("its name is empty, not UTF-8, or cannot be printed; rename it")
    if outside(sample.key):
        raise DataError(OUTSIDE)
    if end - start > MAX_SAMPLE:
        raise DataError(f"it takes {end - start} bytes; at most {MAX_SAMPLE} can be streamed")
    label, width, height = ANY, 1, 1
    if policy:
        label = sample.label(file.read)
        checked = check(file.read(image.data_offset, image.size), policy)
        width, height = checked.width, checked.height
    return {
        "shard": number,
        "offset": start,
        "length": end - start,
        "data_offset": image.data_offset,
        "data_length": image.size,
        "label": label,
        "key": sample.key,
        "width": width,
        "height": height,
        "crc32": crc32(file.read(start, end - start)),
    }


def _digest(row: dict[str, Any], file: Forward) -> int:
    """The `image_digest` of the sample that the `file` was read to last."""
    return image_digest(file.read(row["data_offset"], row["data_length"]))


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
        classes, parts, "webdataset, indexed in place", 0, image_policy, {}, _put(store, "report", ".json", report)
    )
    if there is not None and not overwrite and there.fingerprint != made.fingerprint:
        raise UsageError(f"{store.url} has another manifest already, {there.fingerprint}; --overwrite replaces it")
    store.write(manifests.NAME, made.to_json(), **condition)
    tars = {shard.name for split in splits.values() for shard in split.shards}
    for stale in (there.objects() if there else set()) - made.objects() - tars:
        if not stale.endswith(".tar"):  # a tar is somebody's data, whoever indexed it before
            store.delete(stale)
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
