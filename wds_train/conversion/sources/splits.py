"""Turn the scans of a source into splits: make keys distinct, hold out a share."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import pyarrow as pa

from wds_train.console import readable
from wds_train.conversion.conversion_report import Note, reasons
from wds_train.conversion.sources.labels import NO_LABEL
from wds_train.conversion.sources.names import SPLITS, key_of
from wds_train.conversion.sources.scan import UNLABELED, Rows, SplitScan
from wds_train.conversion.sources.source import ROWS, Grouping, Source, Understood, take
from wds_train.dataset.arrow import to_array, to_numpy
from wds_train.dataset.manifest import ClassInfo
from wds_train.errors import DataError, UsageError


def from_scans(
    description: str,
    classes: tuple[ClassInfo, ...],
    scans: Sequence[SplitScan],
    understood: Understood | None = None,
) -> Source:
    """Return the source that was scanned.

    Args:
        description: The source, for the manifest.
        classes: The classes.
        scans: One for each split. A test split without any labelled sample is dropped.
        understood: How the source was read.
    """
    order = [*SPLITS]
    splits = {}
    for scan in sorted(scans, key=lambda scan: order.index(scan.split)):
        splits[scan.split] = scan.rows.table()
    notes = []
    stamp = ""
    for scan in scans:
        notes += scan.all_notes()
        stamp += scan.stamp.hexdigest()
    return Source(
        description=readable(description),
        classes=classes,
        splits=_without_empty_test(splits),
        notes=notes,
        stamp=stamp,
        understood=understood,
    )


def _without_empty_test(splits: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """Return the splits, without `test` where it has no samples."""
    return {split: rows for split, rows in splits.items() if rows.num_rows or split != "test"}


def label_counts(scans: Iterable[SplitScan], texts: Sequence[str]) -> dict[str, int]:
    """Count the labels of scanned rows.

    Args:
        scans: The rows; a label is a place in `texts`.
        texts: The labels' texts.

    Returns:
        Each text, and the number of samples that have it.
    """
    # Count in numpy: a loop over millions of rows would take seconds.
    counts = np.zeros(len(texts), np.int64)
    for found in scans:
        rows = found.rows.table()
        if rows.num_rows:
            counts += np.bincount(to_numpy(rows["label"]), minlength=len(texts))
    return dict(zip(texts, counts.tolist(), strict=True))


def relabel(source: Source, labels: np.ndarray) -> Source:
    """Replace the labels of a source.

    Args:
        source: The source.
        labels: Label n becomes `labels[n]`, int32. Rows that become `NO_LABEL` are removed, and
            noted.
    """
    notes = list(source.notes)
    splits = {}
    for split, rows in source.splits.items():
        new = np.zeros(0, np.int32)
        if rows.num_rows:
            new = labels[to_numpy(rows["label"])]
        # Replace the column, then drop the rows that have no label now.
        place = rows.schema.get_field_index("label")
        kept = rows.set_column(place, ROWS.field("label"), to_array(new, pa.int32()))
        unlabeled = new == NO_LABEL
        if unlabeled.any():
            for row in take(rows, np.flatnonzero(unlabeled)).to_pylist():
                origin = row["key"] if row["offset"] else row["path"]
                notes.append(Note(split, origin, "ignored", UNLABELED))
            kept = take(kept, np.flatnonzero(~unlabeled))
        splits[split] = kept
    return replace(source, splits=_without_empty_test(splits), notes=notes)


def hold_out(source: Source, share: float) -> Source:
    """Make a `val` split of a share of `train`.

    Of each class, the samples are held out whose keys' hashes are the lowest: at least one, and
    never the class's only one. If the source has a grouping, whole groups are held out instead.
    Neither the machine nor the seed of the shuffle matters.

    Args:
        source: A source without `val`.
        share: The share of `train`, 0 to 1.

    Raises:
        UsageError: The grouping puts all samples into one group, or no group can be held out.
    """
    rows = source.splits["train"]
    labels = to_numpy(rows["label"])
    if source.grouping is None:
        held = _held_samples(rows, labels, share)
    else:
        held = _held_groups(rows, labels, share, source.grouping)

    # Divide the rows, a batch at a time.
    train = Rows()
    val = Rows()
    start = 0
    for batch in rows.to_batches():
        of_batch = held[start : start + batch.num_rows]
        train.add_batch(batch.take(to_array(np.flatnonzero(~of_batch), pa.int64())))
        val.add_batch(batch.take(to_array(np.flatnonzero(of_batch), pa.int64())))
        start += batch.num_rows
    splits = {"train": train.table(), "val": val.table()}

    stream = source.stream
    if stream is not None:
        stream = stream.held_out({*splits["val"]["key"].to_pylist()})
    for split, others in source.splits.items():
        splits.setdefault(split, others)
    return replace(source, splits=splits, stream=stream)


def _held_samples(rows: pa.Table, labels: np.ndarray, share: float) -> np.ndarray:
    """Return which rows are held out, bool [rows]."""
    # Sort the samples of each class by their hash. The texts of one chunk at a time are in memory.
    hashes = [np.zeros(0, ">u8")]
    for chunk in rows["key"].chunks:
        hashes.append(_hashes(chunk))
    order = np.lexsort((np.concatenate(hashes), labels))

    # Hold out the first ones, by the place of each sample of `order` in its class.
    counts = np.bincount(labels)
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = np.minimum(np.maximum(np.round(share * counts), 1), counts - 1)
    held = np.zeros(len(order), bool)
    held[order] = place < np.repeat(wanted, counts)
    return held


def _held_groups(
    rows: pa.Table, labels: np.ndarray, share: float, grouping: Grouping
) -> np.ndarray:
    """Return which rows are held out, bool [rows].

    Whole groups are held out, in the order of their names' hashes. A group is passed over when a
    class would be left without samples to train on.
    """
    # Collect the groups.
    members: dict[str, list[int]] = {}
    paths = rows["path"].to_pylist()
    offsets = rows["offset"].to_pylist()
    keys = rows["key"].to_pylist()
    for number, (path, offset, key) in enumerate(zip(paths, offsets, keys, strict=True)):
        group = grouping.group_of(key if offset else path, key)
        members.setdefault(group, []).append(number)
    if len(members) < 2:
        raise UsageError(
            f"--group {grouping.what} puts all samples into one group, {next(iter(members))!r}; "
            "name another one"
        )

    # Hold out groups until the share is reached.
    left = np.bincount(labels)
    held = np.zeros(len(labels), bool)
    for group in sorted(members, key=_hash):
        of_group = np.array(members[group])
        classes = np.bincount(labels[of_group], minlength=len(left))
        if held.sum() + len(of_group) / 2 > share * len(labels):
            continue
        if (left[classes > 0] > classes[classes > 0]).all():
            held[of_group] = True
            left = left - classes
    if not held.any():
        raise UsageError(
            f"--group {grouping.what} makes {len(members)} groups, none of which can be held out: "
            "each is larger than the share, or holds all samples of a class; "
            "raise --hold-out, or name another column or pattern"
        )
    return held


def _hash(text: str) -> bytes:
    """Return 8 bytes that are the same on every machine, unlike those of `hash`."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _hashes(keys: pa.StringArray) -> np.ndarray:
    """Return the hash of each key, big-endian uint64 [keys]."""
    return np.frombuffer(b"".join(map(_hash, keys.to_pylist())), ">u8")


def check_source(source: Source) -> Source:
    """Return the source with different keys for all samples of a split.

    Raises:
        DataError: It has no samples or no classes, or none to train on.
    """
    if not source.classes or not source.samples:
        raise DataError(
            f"{source.description} holds no images that can be used{reasons(source.notes)}; "
            "check the address"
        )
    splits = {}
    for split, rows in source.splits.items():
        if rows.num_rows:
            splits[split] = _make_distinct(rows)
    if "train" not in splits and "train" in source.splits:
        left = []
        for note in source.notes:
            if note.split == "train" and note.what == "ignored":
                left.append(note)
        raise DataError(
            f"{source.description} holds images of {', '.join(splits)} and none to train on"
            f"{reasons(left)}; name the table or the folder of train: "
            "--table FILE, --split WORD=train"
        )
    return replace(source, splits=splits)


def _make_distinct(rows: pa.Table) -> pa.Table:
    """Return the rows with different keys.

    Of those that share a key (a.jpg and a.png, one name in two tars), all but the first get others.
    """
    # Most sources have no equal keys. A set of the texts would take 100 bytes a sample, the hashes
    # take 8; two keys of one hash are treated as equal here.
    keys = chain.from_iterable(chunk.to_pylist() for chunk in rows["key"].chunks)
    hashes = np.sort(np.fromiter(map(hash, keys), np.int64, rows.num_rows))
    if (hashes[1:] != hashes[:-1]).all():
        return rows

    # Number the others: a~2, a~3, ...
    seen: Counter[str] = Counter()
    distinct = []
    for key in rows["key"].to_pylist():
        seen[key] += 1
        if seen[key] == 1:
            distinct.append(key)
        else:
            distinct.append(key_of(f"{key}~{seen[key]}"))
    place = rows.schema.get_field_index("key")
    return rows.set_column(place, ROWS.field("key"), to_array(distinct, pa.string()))
