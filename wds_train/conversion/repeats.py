"""The same image twice in a dataset: in two splits, or in one split under two classes.

An image of val that the training has seen makes the score too good, and an image with two labels
cannot be learnt. Both are found by a digest of each image's bytes, which is taken while the image is
packed, and compared when all of them are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from isal.isal_zlib import adler32, crc32
from numpy.typing import NDArray

from wds_train.console import readable
from wds_train.conversion.sources.names import SPLITS
from wds_train.conversion.sources.source import take
from wds_train.dataset.arrow import to_numpy
from wds_train.dataset.manifest import ClassInfo

MOST = 1000  # pairs that are named in the report, for each two splits and for each split
SHOWN = 3  # pairs that are named in a line of text
AT_ONCE = 4 << 20  # images that are compared at once, in about 50 bytes each
NO_IMAGE = 0  # in the place of a digest: a sample that was left out


@dataclass(frozen=True)
class Pair:
    """Two samples whose images are equal, each with its class's id."""

    key: str
    class_id: str
    twin: str
    twin_class_id: str


@dataclass(frozen=True)
class Shared:
    """How many images of `split` are in `within`, too; `other_class`: only under other classes."""

    split: str
    within: str
    images: int
    other_class: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Contradictions:
    """How many images are in `split` under more than one class."""

    split: str
    images: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Repeats:
    """What `report.json` says under `repeats`. Splits without any are left out."""

    shared: tuple[Shared, ...]
    contradictions: tuple[Contradictions, ...]


class Packed(NamedTuple):
    """Images that were packed: their split, and of each its row in the split's table and its digest."""

    split: str
    rows: NDArray[np.integer]
    digests: NDArray[np.uint64]


def image_digest(data: bytes) -> int:
    """A number of 64 bits that tells images apart: their CRC-32 and their Adler-32.

    A photograph of 110 KB takes 10 microseconds; SHA-256 takes six times as long. Of 100 million
    different images, two have the same number with a chance of 3 in 10,000. A million pairs of them
    have the same CRC-32.
    """
    return (crc32(data) << 32 | adler32(data)) or 1


def find_repeats(
    tables: Mapping[str, pa.Table],
    packed: Sequence[Packed],
    classes: Sequence[ClassInfo],
) -> Repeats:
    """Compare all images with one another.

    Args:
        tables: for each split, a table with the `key` and the `label` of every row.
        packed: the images, in any order.
        classes: the label n is `classes[n]`.
    """
    names = sorted(tables, key=lambda name: [*SPLITS, name].index(name))
    couples = [(split, within) for within, split in combinations_with_replacement(names, 2)]
    counted = {couple: _Tally() for couple in couples}

    # One pass over the digests for every AT_ONCE images: memory does not grow with the dataset.
    passes = 1 + sum(len(part.rows) for part in packed) // AT_ONCE
    for number in range(passes):
        repeated = _repeated(tables, names, _gathered(packed, names, (number, passes)))
        for (split, within), tally in counted.items():
            if split == within:
                _count_contradictions(tally, repeated[split])
            else:
                _count_shared(tally, repeated[split], repeated[within])

    shared, contradictions = [], []
    for (split, within), tally in counted.items():
        if not tally.images:
            continue
        pairs = _pairs(tally, tables[split], tables[within], classes)
        if split == within:
            contradictions.append(Contradictions(split, tally.images, pairs))
        else:
            shared.append(Shared(split, within, tally.images, tally.other_class, pairs))
    return Repeats(tuple(shared), tuple(contradictions))


def repeat_lines(repeats: Repeats, *, held_out: bool) -> list[str]:
    """A line for each two splits that share images, and for each split with contradictions.

    Args:
        repeats: what was found.
        held_out: whether the conversion took val out of train, so that another choice is a remedy.
    """
    lines = []
    for each in repeats.shared:
        count = f"{_images(each.images)} of {each.split} {_are(each.images)} in {each.within}, too"
        if held_out and (each.split, each.within) == ("val", "train"):
            remedy = "--group keeps what belongs together on one side"
        else:
            remedy = "take them out of one of the two"
        named = _named(each.pairs, each.images)
        lines.append(f"{count}, byte for byte{_differing(each)}: {named}; {remedy}")
    for found in repeats.contradictions:
        count = f"{_images(found.images)} of {found.split} {_are(found.images)} there"
        named = _named(found.pairs, found.images)
        lines.append(f"{count} under more than one class: {named}; keep each under one")
    return lines


def _differing(shared: Shared) -> str:
    if not shared.other_class:
        return ""
    if shared.other_class == shared.images:
        return ", under another class"
    return f", {shared.other_class:,} of them under another class"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _named(pairs: Sequence[Pair], images: int) -> str:
    """The first of `pairs`, with the classes of those that have two."""
    named = []
    for pair in pairs[:SHOWN]:
        if pair.class_id == pair.twin_class_id:
            named.append(f"{pair.key} = {pair.twin}")
        else:
            named.append(f"{pair.key} ({pair.class_id}) = {pair.twin} ({pair.twin_class_id})")
    if max(len(pairs), images) > SHOWN:
        named.append("...")
    return readable(", ".join(named))


@dataclass
class _Tally:
    """Counts, and the rows of the first `MOST` pairs."""

    images: int = 0
    other_class: int = 0
    pairs: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    def add_pairs(self, rows: NDArray[np.int64], twins: NDArray[np.int64]) -> None:
        together = np.concatenate([self.pairs, np.stack([rows, twins], axis=1)])
        self.pairs = together[np.lexsort((together[:, 1], together[:, 0]))[:MOST]]


class _Images(NamedTuple):
    """Images of several splits: the number of the split, the row and the digest of each."""

    split: NDArray[np.int8]
    row: NDArray[np.int64]
    digest: NDArray[np.uint64]

    def at(self, places: NDArray[Any]) -> "_Images":
        return _Images(self.split[places], self.row[places], self.digest[places])


class _Repeated(NamedTuple):
    """Those of a split's images that are anywhere twice, in the order of digest, label and row. `kind`
    is a number for each digest and label, which ascends with them.
    """

    digest: NDArray[np.uint64]
    kind: NDArray[np.int64]
    row: NDArray[np.int64]


def _gathered(packed: Sequence[Packed], names: Sequence[str], part: tuple[int, int]) -> _Images:
    """The images of one `part`: (number, of how many). All images of one digest are of one part."""
    number, parts = part
    found = [_Images(np.zeros(0, np.int8), np.zeros(0, np.int64), np.zeros(0, np.uint64))]
    for each in packed:
        wanted = each.digests != NO_IMAGE
        if parts > 1:
            wanted &= each.digests % np.uint64(parts) == number
        split = np.full(wanted.sum(), names.index(each.split), np.int8)
        found.append(_Images(split, each.rows[wanted].astype(np.int64), each.digests[wanted]))
    return _Images(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _repeated(
    tables: Mapping[str, pa.Table],
    names: Sequence[str],
    images: _Images,
) -> dict[str, _Repeated]:
    """Of each split, those of the `images` that are twice among them."""
    images = images.at(np.argsort(images.digest))
    begins = _begins(images.digest)
    ends = np.ones(len(begins), bool)
    ends[:-1] = begins[1:]
    images = images.at(~(begins & ends))

    # Only now are labels asked for: of few images, as a rule.
    labels = np.zeros(len(images.row), np.int32)
    for number, name in enumerate(names):
        mine = images.split == number
        if mine.any():
            labels[mine] = to_numpy(take(tables[name].select(["label"]), images.row[mine])["label"])
    order = np.lexsort((images.row, labels, images.digest))
    images = images.at(order)
    kinds = np.cumsum(_begins(images.digest) | _begins(labels[order]))

    found = {}
    for number, name in enumerate(names):
        mine = images.split == number
        found[name] = _Repeated(images.digest[mine], kinds[mine], images.row[mine])
    return found


def _begins(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each of the values is another one than that before it."""
    begins = np.ones(len(values), bool)
    begins[1:] = values[1:] != values[:-1]
    return begins


def _count_shared(tally: _Tally, ours: _Repeated, theirs: _Repeated) -> None:
    """Add those of `ours` whose bytes are among `theirs`. Each is named with a twin of its own class,
    if it has one.
    """
    if not len(theirs.row):
        return
    last = len(theirs.row) - 1
    twin = np.minimum(np.searchsorted(theirs.digest, ours.digest), last)
    alike = np.minimum(np.searchsorted(theirs.kind, ours.kind), last)
    shared = theirs.digest[twin] == ours.digest
    agrees = theirs.kind[alike] == ours.kind
    tally.images += int(shared.sum())
    tally.other_class += int((shared & ~agrees).sum())
    tally.add_pairs(ours.row[shared], theirs.row[np.where(agrees, alike, twin)][shared])


def _count_contradictions(tally: _Tally, images: _Repeated) -> None:
    """Add the images that have more than one label. The first sample of the lowest label is named
    with the first of each other label.
    """
    _, first = np.unique(images.kind, return_index=True)
    digests, rows = images.digest[first], images.row[first]
    lowest = np.searchsorted(digests, digests)
    others = lowest != np.arange(len(digests))
    tally.images += len(np.unique(digests[others]))
    tally.add_pairs(rows[lowest[others]], rows[others])


def _pairs(
    tally: _Tally,
    ours: pa.Table,
    theirs: pa.Table,
    classes: Sequence[ClassInfo],
) -> tuple[Pair, ...]:
    samples = _samples(ours, tally.pairs[:, 0], classes)
    twins = _samples(theirs, tally.pairs[:, 1], classes)
    return tuple(Pair(*sample, *twin) for sample, twin in zip(samples, twins, strict=True))


def _samples(
    table: pa.Table,
    rows: NDArray[np.int64],
    classes: Sequence[ClassInfo],
) -> list[tuple[str, str]]:
    """Key and class id of each of `rows`."""
    if not len(rows):
        return []
    found = take(table.select(["key", "label"]), rows)
    return [(row["key"], classes[row["label"]].id) for row in found.to_pylist()]
