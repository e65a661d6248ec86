"""Integrity of a dataset: read every byte, and compare it with manifest, index and tar headers.

`wds-train verify` prints what it finds.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from isal.isal_zlib import crc32

from wds_train.dataset.index import SampleIndex, read_index
from wds_train.dataset.manifest import IN_PLACE, Index, Shard
from wds_train.dataset.reader import Dataset, read_whole, readings
from wds_train.dataset.tar import Member, extension_of, members
from wds_train.errors import DataError, NotFound
from wds_train.storage.base import Store

# The bytes that are read at once.
CHUNK = 8 << 20
# Shards that are read at a time, each in a thread.
SHARDS_AT_ONCE = 4
# Zeros that make an archive of a sample's bytes.
END_BYTES = 1024
# Gets the number of bytes that were read. Several threads call it.
Passed = Callable[[int], object]


@dataclass(frozen=True)
class Damage:
    """A fault that `verify` found.

    Attributes:
        shard: The name of the shard, or of another object.
        key: The sample's key. Empty if it is not about one sample.
        cause: What is wrong.
    """

    shard: str
    key: str
    cause: str

    def __str__(self) -> str:
        where = self.shard
        if self.key:
            where = f"{self.shard} {self.key}"
        return f"{where}: {self.cause}"


def verify(dataset: Dataset, passed: Passed = lambda _: None) -> Iterator[Damage]:
    """Read every byte that the manifest names, and yield what does not fit.

    Manifest, index and tar headers must say the same.

    Args:
        dataset: The dataset.
        passed: Is called with the number of bytes that were read, for a progress bar.
    """
    report = dataset.manifest.report
    if report:
        yield from _verify_object(dataset.store, report, passed)
    for name in dataset.manifest.splits:
        yield from _verify_split(dataset, name, passed)


def _verify_split(dataset: Dataset, name: str, passed: Passed) -> Iterator[Damage]:
    split = dataset.manifest.split(name)
    # A shard in the place of another one is named.
    shard_of_sha256 = {shard.sha256: shard.name for shard in split.shards}

    # The index: one for the split, or one for each shard.
    by_shard = isinstance(split.index, tuple)
    whole_index = None
    if not by_shard:
        found, whole_index = _verify_index(dataset, name, None, passed)
        yield from found

    def verify_shard(number: int) -> list[Damage]:
        shard = split.shards[number]
        found: list[Damage] = []
        index = whole_index
        if by_shard:
            found, index = _verify_index(dataset, name, number, passed)
        # Nothing says where samples are: only the whole can be checked.
        if index is None:
            return [*found, *_verify_object(dataset.store, shard, passed)]
        return found + _verify_shard(dataset, shard, index, number, shard_of_sha256, passed=passed)

    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for damage in pool.map(verify_shard, range(len(split.shards))):
            yield from damage


def _verify_index(
    dataset: Dataset, name: str, shard: int | None, passed: Passed
) -> tuple[list[Damage], SampleIndex | None]:
    """Verify the index of the split `name`, or of its `shard` alone.

    Returns:
        Its faults; and the index, or None if samples cannot be found by it. It may be another one
        than the manifest names, and still tell which samples differ.
    """
    named = dataset.manifest.split(name).indexes[shard or 0]
    found = list(_verify_object(dataset.store, named, passed))
    try:
        index = read_index(read_whole(dataset.store, named), f"{dataset.store.url}/{named.name}")
    except (DataError, NotFound) as error:
        return [*found, Damage(named.name, "", str(error))], None
    flaws = list(dataset.find_flaws(name, index, shard))
    if not flaws:
        return found, index
    return found + [Damage(named.name, "", flaw) for flaw in flaws], None


def _verify_object(store: Store, named: Index | Shard, passed: Passed) -> Iterator[Damage]:
    try:
        data = read_whole(store, named)
    except NotFound:
        yield Damage(named.name, "", "it is missing")
        return
    passed(len(data))
    if (len(data), hashlib.sha256(data).hexdigest()) != (named.bytes, named.sha256):
        yield Damage(
            named.name, "", "it is not what the manifest names: its size or sha256 differs"
        )


def _verify_shard(
    dataset: Dataset,
    shard: Shard,
    index: SampleIndex,
    number: int,
    shard_of_sha256: dict[str, str],
    *,
    passed: Passed,
) -> list[Damage]:
    """Verify one shard, whose samples are those of `index` with its `number`."""
    store = dataset.store
    rows = np.flatnonzero(index.shard == number)
    try:
        size, _ = store.head(shard.name)
    except NotFound:
        return [Damage(shard.name, "", f"it is missing, with {shard.samples} samples")]

    # Bytes between the samples have no checksum but the shard's, so the shard is read again.
    for _ in readings(store):
        found, sha256 = _verify_samples(dataset, shard.name, size, index, rows, passed=passed)
        if found or sha256 == shard.sha256:
            break

    # What is wrong with the shard as a whole.
    if len(rows) != shard.samples:
        cause = f"the index has {len(rows)} samples, the manifest {shard.samples}"
        found.append(Damage(shard.name, "", cause))
    if sha256 == shard.sha256:
        return found
    # Another shard: every sample differs, and one line says more than all of them.
    if sha256 in shard_of_sha256:
        return [Damage(shard.name, "", f"it holds the bytes of {shard_of_sha256[sha256]}")]

    cut = ""
    if size != shard.bytes:
        cut = f"it has {size} bytes, the manifest says {shard.bytes}; "
    where = "the damage is outside the samples"
    if found:
        where = f"{len(found)} samples are named above"
    cause = f"{cut}its sha256 differs from the manifest's; {where}"
    return [*found, Damage(shard.name, "", cause)]


def _verify_samples(
    dataset: Dataset,
    name: str,
    size: int,
    index: SampleIndex,
    rows: np.ndarray,
    *,
    passed: Passed,
) -> tuple[list[Damage], str]:
    """Verify the samples `rows` of the shard `name`, and hash the shard, in one pass over it.

    Returns:
        The damaged samples, and the shard's sha256.
    """
    store = dataset.store
    check = _SampleCheck(
        index,
        classes=[entry.id for entry in dataset.manifest.classes],
        ours=dataset.manifest.source != IN_PLACE,
    )

    # Leave out samples that the index puts beyond the end, or before the one that they follow.
    ends = index.offset[rows] + index.length[rows]
    starts = np.concatenate([[0], ends])[:-1]
    usable = (ends <= size) & (index.offset[rows] >= starts)
    cause = (
        f"the shard ends at byte {size}, before the sample does, or the index has it out of order"
    )
    found = [Damage(name, index.key_of(row), cause) for row in rows[~usable]]
    rows = rows[usable]

    # Read the shard in runs of samples, and hash it on the way.
    digest = hashlib.sha256()
    at = 0
    for first, last in _split_runs(index, rows):
        start = int(index.offset[rows[first]])
        stop = int(index.offset[rows[last]] + index.length[rows[last]])
        for _ in readings(store):
            data = store.read(name, start, stop - start)
            damaged = []
            for row in rows[first : last + 1].tolist():
                offset = int(index.offset[row]) - start
                cause = check.find_damage(data[offset : offset + int(index.length[row])], row)
                if cause:
                    damaged.append(Damage(name, index.key_of(row), cause))
            if not damaged:
                break
        found += damaged
        # What lies between the runs, and the run.
        digest.update(_read(store, name, at, start))
        digest.update(data)
        passed(stop - at)
        at = stop
    digest.update(_read(store, name, at, size))
    passed(size - at)
    return found, digest.hexdigest()


def _split_runs(index: SampleIndex, rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the first and last place of the runs of `rows` to read at once, about CHUNK each."""
    first = 0
    for place in range(len(rows)):
        end = index.offset[rows[place]] + index.length[rows[place]]
        if end - index.offset[rows[first]] >= CHUNK or place == len(rows) - 1:
            yield first, place
            first = place + 1


def _read(store: Store, name: str, start: int, stop: int) -> bytes:
    """Read the bytes [start, stop) of an object. Nothing is asked for if there are none."""
    if stop <= start:
        return b""
    return store.read(name, start, stop - start)


@dataclass(frozen=True)
class _SampleCheck:
    """Compares samples with their rows in the index.

    Attributes:
        index: The index.
        classes: The ids of the classes, in the order of labels.
        ours: The shards are ones that we wrote, not indexed in place.
    """

    index: SampleIndex
    classes: Sequence[str]
    ours: bool

    def find_damage(self, record: bytes, row: int) -> str:
        """Return why a sample is not what its row says; empty if it is.

        Args:
            record: The sample's bytes, from the first tar header to the last padding.
            row: Its row.
        """
        index = self.index
        if crc32(record) != index.crc32[row]:
            return "its bytes do not match the checksum in the index"

        # The record alone is not an archive: two zero blocks end it as one.
        data = record + bytes(END_BYTES)
        try:
            parts = list(members(lambda at, length: data[at : at + length], 0, len(data)))
        except DataError as error:
            return str(error)
        image_start = index.data_offset[row] - index.offset[row]
        image = _find_member_at(parts, int(image_start))
        if image is None or image.size != index.data_length[row]:
            return "its image is not where the index says"

        # Shards of others have folders, and files of their systems, between the members. These are
        # no part of the sample.
        fields: dict[Member, str] = {}
        for part in parts:
            field = extension_of(part.name, index.key_of(row))
            if field is not None:
                fields[part] = field
        label_fault = self._find_label_fault(fields, data, row)
        if label_fault:
            return label_fault
        for part in parts:
            if part not in fields and (self.ours or part is image):
                return f"the shard calls it {part.name!r}"
        return ""

    def _find_label_fault(self, fields: dict[Member, str], data: bytes, row: int) -> str:
        """Return why the label in the shard is not the index's; empty if it may be."""
        label = None
        # The first member of each name; cls has precedence.
        for name in ("cls", "label.cls"):
            for part, field in fields.items():
                if label is None and field == name:
                    label = part
        if label is None:
            return ""
        inside = data[label.data_offset : label.data_offset + label.size]
        # In shards of others it may be the class's name, as text or as JSON.
        text = inside.decode(errors="replace").strip().strip('"')
        number = self.index.label[row]
        if text in (str(number), self.classes[number]):
            return ""
        # Others write a label in many ways (3.0, cafe\u0301). It is wrong for certain only where
        # it names another class.
        if self.ours or text in self.classes:
            return (
                f"its label is {inside.decode(errors='replace')!r} in the shard "
                f"and {number} in the index"
            )
        return ""


def _find_member_at(parts: Sequence[Member], data_offset: int) -> Member | None:
    """Return the member whose data starts at `data_offset`; None if there is none."""
    for part in parts:
        if part.data_offset == data_offset:
            return part
    return None
