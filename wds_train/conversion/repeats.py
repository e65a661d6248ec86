"""Find images that a dataset holds twice: in two splits, or in one split under two classes.

An image of val that the training has seen makes the score too good, and an image with two labels
cannot be learnt. Both are found by a digest of each image's bytes, which is taken while the image
is packed, and compared when all of them are.
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
# Instead of a digest: the sample was left out. `image_digest` never returns it.
NO_IMAGE = 0


@dataclass(frozen=True)
class Pair:
    """Two samples whose images are equal.

    Attributes:
        key: The first sample's key.
        class_id: The id of its class.
        twin: The other sample's key.
        twin_class_id: The id of its class.
    """

    key: str
    class_id: str
    twin: str
    twin_class_id: str


@dataclass(frozen=True)
class Shared:
    """Images that two splits share.

    Attributes:
        split: The split whose images are counted.
        within: The split that holds them, too.
        images: How many images of `split` are in `within`.
        other_class: How many of those are there under other classes only.
        pairs: The first of them, with a twin each.
    """

    split: str
    within: str
    images: int
    other_class: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Contradictions:
    """Images that a split holds under more than one class.

    Attributes:
        split: The split.
        images: How many images.
        pairs: The first of them, with a twin each.
    """

    split: str
    images: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Repeats:
    """All repeats of a dataset, as `report.json` holds them. Splits without any are left out."""

    shared: tuple[Shared, ...]
    contradictions: tuple[Contradictions, ...]


class Packed(NamedTuple):
    """Images of one split that were packed.

    Attributes:
        split: The split.
        rows: The images' rows in the split's table, int [images].
        digests: Their digests, uint64 [images]; `NO_IMAGE` for samples that were left out.
    """

    split: str
    rows: NDArray[np.integer]
    digests: NDArray[np.uint64]


def image_digest(data: bytes) -> int:
    """Return a number of 64 bits that tells images apart: their CRC-32 and their Adler-32.

    A photograph of 110 KB takes 10 microseconds; SHA-256 takes six times as long. Of 100 million
    different images, two have the same number with a chance of 3 in 10,000. A million pairs of them
    have the same CRC-32.
    """
    digest = crc32(data) << 32 | adler32(data)
    return digest or 1  # 0 is NO_IMAGE


def find_repeats(
    tables: Mapping[str, pa.Table],
    packed: Sequence[Packed],
    classes: Sequence[ClassInfo],
) -> Repeats:
    """Compare all images with one another.

    Args:
        tables: For each split, a table with the `key` and the `label` of every row.
        packed: The images, in any order.
        classes: The classes, in the order of their labels.

    Returns:
        The repeats, in the order of the splits: train, val, test.
    """
    names = sorted(tables, key=_split_order)
    tallies: dict[tuple[str, str], _Tally] = {}
    for within, split in combinations_with_replacement(names, 2):
        tallies[split, within] = _Tally()

    # One pass over the digests for every AT_ONCE images: memory does not grow with the dataset.
    passes = 1 + sum([len(part.rows) for part in packed]) // AT_ONCE
    for number in range(passes):
        repeated = _find_repeated(tables, names, _gather(packed, names, (number, passes)))
        for (split, within), tally in tallies.items():
            if split == within:
                _count_contradictions(tally, repeated[split])
            else:
                _count_shared(tally, repeated[split], repeated[within])

    # Only the pairs that are named need keys and classes.
    shared = []
    contradictions = []
    for (split, within), tally in tallies.items():
        if not tally.images:
            continue
        pairs = _name_pairs(tally, tables[split], tables[within], classes)
        if split == within:
            contradictions.append(Contradictions(split, tally.images, pairs))
        else:
            shared.append(Shared(split, within, tally.images, tally.other_class, pairs))
    return Repeats(tuple(shared), tuple(contradictions))


def _split_order(split: str) -> int:
    """Return a split's place among those of a dataset; any other comes last."""
    return [*SPLITS, split].index(split)


def repeat_lines(repeats: Repeats, *, held_out: bool) -> list[str]:
    """Return a line for each two splits that share images, and for each contradictory split.

    Args:
        repeats: The repeats.
        held_out: The conversion took val out of train, so that another choice is a remedy.
    """
    lines = []
    for shared in repeats.shared:
        count = _count_images(shared.images, shared.split)
        remedy = "take them out of one of the two"
        if held_out and (shared.split, shared.within) == ("val", "train"):
            remedy = "--group keeps what belongs together on one side"
        named = _show_pairs(shared.pairs, shared.images)
        lines.append(
            f"{count} in {shared.within}, too, byte for byte{_differing(shared)}: {named}; {remedy}"
        )
    for found in repeats.contradictions:
        count = _count_images(found.images, found.split)
        named = _show_pairs(found.pairs, found.images)
        lines.append(f"{count} there under more than one class: {named}; keep each under one")
    return lines


def _differing(shared: Shared) -> str:
    """Say how many of the images are under another class, as a part of a sentence."""
    if not shared.other_class:
        return ""
    if shared.other_class == shared.images:
        return ", under another class"
    return f", {shared.other_class:,} of them under another class"


def _count_images(images: int, split: str) -> str:
    """Return the beginning of a sentence about so many images of a split."""
    if images == 1:
        return f"1 image of {split} is"
    return f"{images:,} images of {split} are"


def _show_pairs(pairs: Sequence[Pair], images: int) -> str:
    """Return the first of `pairs`, with the classes of those that have two."""
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
    """The repeats within a split or between two, while they are counted.

    Attributes:
        images: How many images.
        other_class: How many of them are under other classes only.
        pairs: The rows of the first `MOST` pairs, int64 [pairs, 2].
    """

    images: int = 0
    other_class: int = 0
    pairs: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    def add_pairs(self, rows: NDArray[np.int64], twins: NDArray[np.int64]) -> None:
        """Add pairs, and keep the first of all by their rows."""
        together = np.concatenate([self.pairs, np.stack([rows, twins], axis=1)])
        self.pairs = together[np.lexsort((together[:, 1], together[:, 0]))[:MOST]]


class _Images(NamedTuple):
    """Images of several splits, one a place of the arrays.

    Attributes:
        split: The number of the split.
        row: The row in the split's table.
        digest: The digest.
    """

    split: NDArray[np.int8]
    row: NDArray[np.int64]
    digest: NDArray[np.uint64]

    def at(self, places: NDArray[Any]) -> "_Images":
        """Return the images at `places`, numbers or a mask."""
        return _Images(self.split[places], self.row[places], self.digest[places])


class _Repeated(NamedTuple):
    """Images of a split that are anywhere twice, in the order of digest, label and row.

    Attributes:
        digest: The digest.
        kind: A number for each digest and label, which ascends with them.
        row: The row in the split's table.
    """

    digest: NDArray[np.uint64]
    kind: NDArray[np.int64]
    row: NDArray[np.int64]


def _gather(packed: Sequence[Packed], names: Sequence[str], part: tuple[int, int]) -> _Images:
    """Return the images of one part, to which all images of a digest belong.

    Args:
        packed: All images.
        names: The splits, in the order of their numbers.
        part: The part's number, and how many parts there are.
    """
    number, parts = part
    # Concatenating none is an error.
    splits = [np.zeros(0, np.int8)]
    rows = [np.zeros(0, np.int64)]
    digests = [np.zeros(0, np.uint64)]
    for each in packed:
        wanted = each.digests != NO_IMAGE
        if parts > 1:
            wanted &= each.digests % np.uint64(parts) == number
        splits.append(np.full(wanted.sum(), names.index(each.split), np.int8))
        rows.append(each.rows[wanted].astype(np.int64))
        digests.append(each.digests[wanted])
    return _Images(np.concatenate(splits), np.concatenate(rows), np.concatenate(digests))


def _find_repeated(
    tables: Mapping[str, pa.Table],
    names: Sequence[str],
    images: _Images,
) -> dict[str, _Repeated]:
    """Return for each split those of the `images` that are twice among them.

    Args:
        tables: For each split, a table with the `label` of every row.
        names: The splits, in the order of their numbers.
        images: The images of all splits.
    """
    # Keep the digests that are there more than once: sorted, they are no runs of one.
    images = images.at(np.argsort(images.digest))
    begins = _begins(images.digest)
    ends = np.ones(len(begins), bool)
    ends[:-1] = begins[1:]
    images = images.at(~(begins & ends))

    # Look up the labels only now: of few images, as a rule.
    labels = np.zeros(len(images.row), np.int32)
    for number, name in enumerate(names):
        mine = images.split == number
        if mine.any():
            rows = take(tables[name].select(["label"]), images.row[mine])
            labels[mine] = to_numpy(rows["label"])

    # Number the kinds, and divide the images by splits, each in the order of all.
    order = np.lexsort((images.row, labels, images.digest))
    images = images.at(order)
    kinds = np.cumsum(_begins(images.digest) | _begins(labels[order]))

    found = {}
    for number, name in enumerate(names):
        mine = images.split == number
        found[name] = _Repeated(images.digest[mine], kinds[mine], images.row[mine])
    return found


def _begins(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return a mask of the values that differ from the one before; the first always does."""
    begins = np.ones(len(values), bool)
    begins[1:] = values[1:] != values[:-1]
    return begins


def _count_shared(tally: _Tally, ours: _Repeated, theirs: _Repeated) -> None:
    """Add those of `ours` whose bytes are among `theirs`.

    Each is named with a twin of its own class, if it has one.
    """
    if not len(theirs.row):
        return

    # searchsorted gives the place behind the last for what is larger than all.
    last = len(theirs.row) - 1
    twin = np.minimum(np.searchsorted(theirs.digest, ours.digest), last)
    alike = np.minimum(np.searchsorted(theirs.kind, ours.kind), last)
    shared = theirs.digest[twin] == ours.digest
    agrees = theirs.kind[alike] == ours.kind

    tally.images += int(shared.sum())
    tally.other_class += int((shared & ~agrees).sum())
    tally.add_pairs(ours.row[shared], theirs.row[np.where(agrees, alike, twin)][shared])


def _count_contradictions(tally: _Tally, images: _Repeated) -> None:
    """Add the images that have more than one label.

    The first sample of the lowest label is named with the first of each other label.
    """
    # One row for each digest and label: the second of a digest is a contradiction.
    _, first = np.unique(images.kind, return_index=True)
    digests = images.digest[first]
    rows = images.row[first]
    lowest = np.searchsorted(digests, digests)
    others = lowest != np.arange(len(digests))
    tally.images += len(np.unique(digests[others]))
    tally.add_pairs(rows[lowest[others]], rows[others])


def _name_pairs(
    tally: _Tally,
    ours: pa.Table,
    theirs: pa.Table,
    classes: Sequence[ClassInfo],
) -> tuple[Pair, ...]:
    """Return the pairs of `tally`, whose rows are in the tables `ours` and `theirs`."""
    samples = _name_samples(ours, tally.pairs[:, 0], classes)
    twins = _name_samples(theirs, tally.pairs[:, 1], classes)
    pairs = []
    for (key, class_id), (twin, twin_class_id) in zip(samples, twins, strict=True):
        pairs.append(Pair(key, class_id, twin, twin_class_id))
    return tuple(pairs)


def _name_samples(
    table: pa.Table,
    rows: NDArray[np.int64],
    classes: Sequence[ClassInfo],
) -> list[tuple[str, str]]:
    """Return key and class id of each of `rows`."""
    if not len(rows):
        return []
    found = take(table.select(["key", "label"]), rows)
    return [(row["key"], classes[row["label"]].id) for row in found.to_pylist()]
