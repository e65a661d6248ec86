"""What the scans of a source become, its splits: keys made distinct, a share held out."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

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
    description: str, classes: tuple[ClassInfo, ...], scans: Sequence[SplitScan], understood: Understood | None = None
) -> "Source":
    """Return the source that `scans`, one a split, found. A test split whose samples have no labels is none."""
    found = {scan.split: scan.rows.table() for scan in sorted(scans, key=lambda scan: [*SPLITS].index(scan.split))}
    return Source(
        readable(description),
        classes,
        {split: rows for split, rows in found.items() if rows.num_rows or split != "test"},
        [note for scan in scans for note in scan.all_notes()],
        "".join(scan.stamp.hexdigest() for scan in scans),
        understood=understood,
    )


def label_counts(scans: Iterable[SplitScan], texts: Sequence[str]) -> dict[str, int]:
    """Return how often each of `texts` occurs, where a row's label is a place in `texts`."""
    counts = np.zeros(len(texts), np.int64)
    for found in scans:
        rows = found.rows.table()
        if rows.num_rows:
            counts += np.bincount(to_numpy(rows["label"]), minlength=len(texts))
    return dict(zip(texts, counts.tolist(), strict=True))


def relabelled(source: Source, labels: np.ndarray) -> Source:
    """Return the `source`, whose label n is now `labels[n]` (int32); rows that become `NO_LABEL` are left out, and noted."""
    notes = list(source.notes)
    splits = {}
    for split, rows in source.splits.items():
        new = labels[to_numpy(rows["label"])] if rows.num_rows else np.zeros(0, np.int32)
        place = rows.schema.get_field_index("label")
        kept = rows.set_column(place, ROWS.field("label"), to_array(new, pa.int32()))
        if (new == NO_LABEL).any():
            for row in take(rows, np.flatnonzero(new == NO_LABEL)).to_pylist():
                notes.append(Note(split, row["key"] if row["offset"] else row["path"], "ignored", UNLABELED))
            kept = take(kept, np.flatnonzero(new != NO_LABEL))
        splits[split] = kept
    splits = {split: rows for split, rows in splits.items() if rows.num_rows or split != "test"}
    return replace(source, splits=splits, notes=notes)


def hold_out(source: Source, share: float) -> Source:
    """Return the `source`, which has no `val`, with `share` of `train` for one.

    Of each class the samples whose keys' hashes are the lowest, at least one, and never the class's only one; or, where the
    source has a grouping, whole groups. Neither the machine nor the seed of the shuffle matters.
    """
    rows = source.splits["train"]
    labels = to_numpy(rows["label"])
    if source.grouping is None:
        held = _held_samples(rows, labels, share)
    else:
        held = _held_groups(rows, labels, share, source.grouping)
    parts, start = {"train": Rows(), "val": Rows()}, 0
    for batch in rows.to_batches():
        of_batch = held[start : start + batch.num_rows]
        for split, found in parts.items():
            found.add_batch(batch.take(to_array(np.flatnonzero(of_batch == (split == "val")), pa.int64())))
        start += batch.num_rows
    tables = {split: found.table() for split, found in parts.items()}
    stream = source.stream and source.stream.held_out({*tables["val"]["key"].to_pylist()})
    return replace(source, splits=tables | {k: v for k, v in source.splits.items() if k != "train"}, stream=stream)


def _held_samples(rows: pa.Table, labels: np.ndarray, share: float) -> np.ndarray:
    """Return which rows are held out, bool [rows]."""
    hashes = np.concatenate([np.zeros(0, ">u8"), *(_hashes(chunk) for chunk in rows["key"].chunks)])
    order, counts = np.lexsort((hashes, labels)), np.bincount(labels)
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)  # in its class, in `order`
    wanted = np.minimum(np.maximum(np.round(share * counts), 1), counts - 1)
    held = np.zeros(len(order), bool)
    held[order] = place < np.repeat(wanted, counts)
    return held


def _held_groups(rows: pa.Table, labels: np.ndarray, share: float, grouping: Grouping) -> np.ndarray:
    """Return which rows are held out, bool [rows]: whole groups in the order of their names' hashes.

    A group is passed over when a class would be left without samples to train on.
    """
    members: dict[str, list[int]] = {}
    places = zip(rows["path"].to_pylist(), rows["offset"].to_pylist(), rows["key"].to_pylist(), strict=True)
    for number, (path, offset, key) in enumerate(places):
        members.setdefault(grouping.group_of(key if offset else path, key), []).append(number)
    if len(members) < 2:
        raise UsageError(
            f"--group {grouping.what} puts all samples into one group, {next(iter(members))!r}; name another one"
        )
    left = np.bincount(labels)
    held = np.zeros(len(labels), bool)
    for group in sorted(members, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest()):
        of_group = np.array(members[group])
        classes = np.bincount(labels[of_group], minlength=len(left))
        if held.sum() + len(of_group) / 2 > share * len(labels):
            continue
        if (left[classes > 0] > classes[classes > 0]).all():
            held[of_group] = True
            left = left - classes
    if not held.any():
        raise UsageError(
            f"--group {grouping.what} makes {len(members)} groups, none of which can be held out: each is larger than the share, "
            "or holds all samples of a class; raise --hold-out, or name another column or pattern"
        )
    return held


def _hashes(keys: pa.StringArray) -> np.ndarray:
    return np.frombuffer(
        b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys.to_pylist()), ">u8"
    )


def checked(source: Source) -> Source:
    """The `source`, if it can become a dataset, each sample of a split with a key of its own; `DataError` for no
    samples or no classes.
    """
    if not source.classes or not source.samples:
        raise DataError(
            f"{source.description} holds no images that can be used{reasons(source.notes)}; check the address"
        )
    splits = {split: _distinct(rows) for split, rows in source.splits.items() if rows.num_rows}
    left = [note for note in source.notes if note.split == "train" and note.what == "ignored"]
    if "train" not in splits and "train" in source.splits:
        raise DataError(
            f"{source.description} holds images of {', '.join(splits)} and none to train on{reasons(left)}; name the table or the "
            "folder of train: --table FILE, --split WORD=train"
        )
    return replace(source, splits=splits)


def _distinct(rows: pa.Table) -> pa.Table:
    """The `rows`, of which those that share a key (a.jpg beside a.png, one name in two tars) get others, but for the
    first.
    """
    # A set of the texts would take 100 bytes a sample. Two of one hash are looked at as if they were equal.
    keys = (key for chunk in rows["key"].chunks for key in chunk.to_pylist())
    hashes = np.sort(np.fromiter(map(hash, keys), np.int64, rows.num_rows))
    if (hashes[1:] != hashes[:-1]).all():
        return rows
    seen, distinct = Counter[str](), list[str]()
    for key in rows["key"].to_pylist():
        seen[key] += 1
        distinct.append(key if seen[key] == 1 else key_of(f"{key}~{seen[key]}"))
    return rows.set_column(rows.schema.get_field_index("key"), ROWS.field("key"), to_array(distinct, pa.string()))
