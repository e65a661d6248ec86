"""Whether a dataset is whole: every byte is read anew and compared."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from isal.isal_zlib import crc32

from wds_train.dataset.index import SampleIndex, read_index
from wds_train.dataset.manifest import IN_PLACE, Index, Shard
from wds_train.dataset.reader import Dataset, read_whole, readings
from wds_train.dataset.tar import extension_of, members
from wds_train.errors import DataError, NotFound
from wds_train.storage.base import Store

CHUNK = 8 << 20
Passed = Callable[[int], object]  # is told of the bytes that were read, by several threads
SHARDS_AT_ONCE = 4


@dataclass(frozen=True)
class Damage:
    """What `verify` found: `key` is empty when it is not one sample's."""

    shard: str
    key: str
    cause: str

    def __str__(self) -> str:
        return f"{self.shard}{f' {self.key}' if self.key else ''}: {self.cause}"


def verify(dataset: Dataset, passed: Passed = lambda _: None) -> Iterator[Damage]:
    """Read every byte that the manifest names, and report what is not what manifest, index and tar say together."""
    if report := dataset.manifest.report:
        yield from _verify_object(dataset.store, report, passed)
    for name in dataset.manifest.splits:
        yield from _verify_split(dataset, name, passed)


def _verify_split(dataset: Dataset, name: str, passed: Passed) -> Iterator[Damage]:
    split = dataset.manifest.split(name)
    whose = {shard.sha256: shard.name for shard in split.shards}
    by_shard = isinstance(split.index, tuple)
    found, whole = ([], None) if by_shard else _verify_index(dataset, name, None, passed)
    yield from found

    def shard_damage(number: int) -> list[Damage]:
        found, index = _verify_index(dataset, name, number, passed) if by_shard else ([], whole)
        shard = split.shards[number]
        if index is None:  # one that says where nothing is tells nothing of the samples
            return [*found, *_verify_object(dataset.store, shard, passed)]
        return found + _verify_shard(dataset, shard, index, number, whose, passed=passed)

    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for damage in pool.map(shard_damage, range(len(split.shards))):
            yield from damage


def _verify_index(
    dataset: Dataset, name: str, shard: int | None, passed: Passed
) -> tuple[list[Damage], SampleIndex | None]:
    """What is wrong with the index of the split `name`, or of its `shard` alone, and the index, if samples can be found by it: it
    may be another one than the manifest names, and still tell which samples differ.
    """
    named = dataset.manifest.split(name).indexes[shard or 0]
    found = [*_verify_object(dataset.store, named, passed)]
    try:
        index = read_index(read_whole(dataset.store, named), f"{dataset.store.url}/{named.name}")
    except (DataError, NotFound) as error:
        return [*found, Damage(named.name, "", str(error))], None
    flaws = [Damage(named.name, "", flaw) for flaw in dataset.flaws(name, index, shard)]
    return found + flaws, None if flaws else index


def _verify_object(store: Store, named: Index | Shard, passed: Passed) -> Iterator[Damage]:
    try:
        data = read_whole(store, named)
    except NotFound:
        yield Damage(named.name, "", "it is missing")
        return
    passed(len(data))
    if (len(data), hashlib.sha256(data).hexdigest()) != (named.bytes, named.sha256):
        yield Damage(named.name, "", "it is not what the manifest names: its size or sha256 differs")


def _verify_shard(
    dataset: Dataset, shard: Shard, index: SampleIndex, number: int, whose: dict[str, str], *, passed: Passed
) -> list[Damage]:
    store, rows = dataset.store, np.flatnonzero(index.shard == number)
    try:
        size, _ = store.head(shard.name)
    except NotFound:
        return [Damage(shard.name, "", f"it is missing, with {shard.samples} samples")]
    for _ in readings(store):  # what lies between the samples has no checksum but the shard's
        found, sha256 = _verify_samples(dataset, shard.name, size, index, rows, passed=passed)
        if found or sha256 == shard.sha256:
            break
    if len(rows) != shard.samples:
        found.append(Damage(shard.name, "", f"the index has {len(rows)} samples, the manifest {shard.samples}"))
    if sha256 == shard.sha256:
        return found
    if sha256 in whose:  # every sample differs: one line says more than all of them
        return [Damage(shard.name, "", f"it holds the bytes of {whose[sha256]}")]
    cut = f"it has {size} bytes, the manifest says {shard.bytes}; " if size != shard.bytes else ""
    where = f"{len(found)} samples are named above" if found else "the damage is outside the samples"
    return [*found, Damage(shard.name, "", f"{cut}its sha256 differs from the manifest's; {where}")]


def _verify_samples(
    dataset: Dataset, name: str, size: int, index: SampleIndex, rows: np.ndarray, *, passed: Passed
) -> tuple[list[Damage], str]:
    """The damaged ones of the samples `rows` of an object, and the sha256 of all of it, reading it once."""
    store, ids = dataset.store, [entry.id for entry in dataset.manifest.classes]
    own = dataset.manifest.source != IN_PLACE
    ends = index.offset[rows] + index.length[rows]
    starts = np.concatenate([[0], ends])[:-1]
    usable = (ends <= size) & (index.offset[rows] >= starts)
    cause = f"the shard ends at byte {size}, before the sample does, or the index has it out of order"
    found = [Damage(name, index.key_of(row), cause) for row in rows[~usable]]
    rows, digest, at = rows[usable], hashlib.sha256(), 0
    for first, last in _runs(index, rows):
        start, stop = int(index.offset[rows[first]]), int(index.offset[rows[last]] + index.length[rows[last]])
        for _ in readings(store):
            data = store.read(name, start, stop - start)
            damaged = []
            for row in rows[first : last + 1].tolist():
                offset = int(index.offset[row]) - start
                cause = _sample_damage(data[offset : offset + int(index.length[row])], index, row, ids, own=own)
                damaged += [Damage(name, index.key_of(row), cause)] if cause else []
            if not damaged:
                break
        found += damaged
        digest.update(_read(store, name, at, start))
        digest.update(data)
        passed(stop - at)
        at = stop
    digest.update(_read(store, name, at, size))
    passed(size - at)
    return found, digest.hexdigest()


def _runs(index: SampleIndex, rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last place of the runs of `rows` that are read at once: about CHUNK bytes each."""
    first = 0
    for place in range(len(rows)):
        end = index.offset[rows[place]] + index.length[rows[place]]
        if end - index.offset[rows[first]] >= CHUNK or place == len(rows) - 1:
            yield first, place
            first = place + 1


def _read(store: Store, name: str, start: int, stop: int) -> bytes:
    return store.read(name, start, stop - start) if stop > start else b""


def _plain(label: bytes) -> str:
    """The label that a `.cls` holds: in those of others it may be the class's name, as text or as JSON."""
    return label.decode(errors="replace").strip().strip('"')


def _sample_damage(record: bytes, index: SampleIndex, row: int, ids: Sequence[str], *, own: bool) -> str:
    """Say why a sample is not what its row says, or nothing.

    Args:
        record: Its bytes, from the first header to the last padding.
        ids: The classes'.
        own: Whether the shard is one that we wrote.
    """
    if crc32(record) != index.crc32[row]:
        return "its bytes do not match the checksum in the index"
    # The record alone is not an archive: two zero blocks end it as one.
    data = record + bytes(1024)
    try:
        parts = list(members(lambda offset, length: data[offset : offset + length], 0, len(data)))
    except DataError as error:
        return str(error)
    image = next((part for part in parts if part.data_offset == index.data_offset[row] - index.offset[row]), None)
    if image is None or image.size != index.data_length[row]:
        return "its image is not where the index says"
    key = index.key_of(row)
    # Between the members of others lie folders and what systems leave: these are no part of the sample.
    mine = {part: name for part in parts if (name := extension_of(part.name, key)) is not None}
    label = next((part for name in ("cls", "label.cls") for part in mine if mine[part] == name), None)
    if label is not None:
        inside = record[label.data_offset : label.data_offset + label.size]
        said, right = _plain(inside), (str(index.label[row]), ids[index.label[row]])
        # Others write a label in many ways (3.0, cafe\u0301): it is wrong for certain where it names another class.
        if said not in right and (own or said in ids):
            return f"its label is {inside.decode(errors='replace')!r} in the shard and {index.label[row]} in the index"
    odd = next((part for part in parts if part not in mine and (own or part is image)), None)
    return f"the shard calls it {odd.name!r}" if odd is not None else ""
