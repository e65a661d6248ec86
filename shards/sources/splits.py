"""What the scans of a source become, its splits: keys made distinct, a share held out."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from shards.report import reasons
from shards.sources.base import ROWS, Source
from shards.sources.names import SPLITS, key_of
from shards.sources.scan import Rows, SplitScan
from wds_train.errors import DataError
from wds_train.format.arrow import to_array, to_numpy
from wds_train.format.manifest import UNPRINTABLE, ClassInfo
from wds_train.tracking.console import readable


def from_scans(description: str, classes: tuple[ClassInfo, ...], scans: Sequence[SplitScan]) -> "Source":
    """The source that `scans`, one a split, found. A test split whose samples have no labels is none."""
    found = {scan.split: scan.rows.table() for scan in sorted(scans, key=lambda scan: [*SPLITS].index(scan.split))}
    return Source(
        readable(description),
        classes,
        {split: rows for split, rows in found.items() if rows.num_rows or split != "test"},
        [note for scan in scans for note in scan.all_notes()],
        "".join(scan.stamp.hexdigest() for scan in scans),
    )


def relabelled(source: Source, labels: np.ndarray) -> Source:
    """The `source`, whose label n is now `labels[n]` (int32)."""

    def changed(rows: pa.Table) -> pa.Table:
        new = to_array(labels[to_numpy(rows["label"])] if rows.num_rows else [], pa.int32())
        return rows.set_column(rows.schema.get_field_index("label"), ROWS.field("label"), new)

    return replace(source, splits={split: changed(rows) for split, rows in source.splits.items()})


def hold_out(source: Source, share: float) -> Source:
    """The `source`, which has no `val`, with `share` of each class of `train` for one: the samples whose keys' hashes
    are the lowest, at least one, and never the class's only one. Neither the machine nor the seed of the shuffle
    matters.
    """
    rows = source.splits["train"]
    labels = to_numpy(rows["label"])
    hashes = np.concatenate([np.zeros(0, ">u8"), *(_hashes(chunk) for chunk in rows["key"].chunks)])
    order, counts = np.lexsort((hashes, labels)), np.bincount(labels)
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)  # in its class, in `order`
    wanted = np.minimum(np.maximum(np.round(share * counts), 1), counts - 1)
    held = np.zeros(len(order), bool)
    held[order] = place < np.repeat(wanted, counts)
    parts, start = {"train": Rows(), "val": Rows()}, 0
    for batch in rows.to_batches():
        of_batch = held[start : start + batch.num_rows]
        for split, found in parts.items():
            found.add_batch(batch.take(to_array(np.flatnonzero(of_batch == (split == "val")), pa.int64())))
        start += batch.num_rows
    tables = {split: found.table() for split, found in parts.items()}
    stream = source.stream and source.stream.held_out({*tables["val"]["key"].to_pylist()})
    return replace(source, splits=tables | {k: v for k, v in source.splits.items() if k != "train"}, stream=stream)


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
    return replace(source, splits={split: _distinct(rows) for split, rows in source.splits.items()})


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


def to_classes(ids: Sequence[str], names: dict[str, str] | None = None) -> tuple[ClassInfo, ...]:
    classes = tuple(ClassInfo(id, (names or {}).get(id, id)) for id in ids)
    for entry in classes:
        if UNPRINTABLE.search(entry.id + entry.name):
            raise DataError(f"the class {entry.id!r} has a name that cannot be printed; rename it")
    return classes
