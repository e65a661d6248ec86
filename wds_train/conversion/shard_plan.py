"""What a conversion is to make, and in which names: equal plans make equal bytes."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from wds_train.conversion.image_policy import ImagePolicy
from wds_train.conversion.sources.source import Source, take
from wds_train.conversion.sources.splits import hold_out
from wds_train.dataset.arrow import to_numpy
from wds_train.dataset.index import WHOLE_INDEX_SAMPLES
from wds_train.dataset.shard import END_BYTES, record_bytes
from wds_train.errors import UsageError
from wds_train.rng import Ids, permutation


@dataclass(frozen=True)
class Options:
    """What decides the dataset's bytes besides its source. `shard_bytes`: a shard's size is at most this. `hold_out`: the
    share of a source without `val` that becomes it. `whole_index`: a split of more samples has an index for each shard.
    `group`: what says which samples are held out together; empty where each stands for itself.
    """

    seed: int = 0
    shard_bytes: int = 128 << 20
    policy: ImagePolicy = field(default_factory=ImagePolicy)
    hold_out: float = 0.0
    whole_index: int = WHOLE_INDEX_SAMPLES
    group: str = ""


def shard_name(split: str, number: int, mark: str) -> str:
    return f"{split}/shard-{number:06d}{mark}.tar"


def shard_index_name(split: str, number: int, mark: str) -> str:
    return f"{split}/index-{number:06d}{mark}.parquet"


class Plan:
    """What a source becomes: `parts` are the rows of every shard, by split. Two conversions whose `settings` are equal are
    the same, and make the same bytes; `digest` is their sha256.
    """

    def __init__(self, source: Source, options: Options) -> None:
        if options.hold_out:
            if "train" not in source.splits or "val" in source.splits:
                there = ", ".join(source.splits)
                raise UsageError(f"{source.description} has {there}: nothing can be held out; leave --hold-out away")
            source = hold_out(source, options.hold_out)
        self.source, self.options = source, options
        cut = {split: _cut(rows, split, options) for split, rows in source.splits.items()}
        self.parts = {split: parts for split, (parts, _) in cut.items()}
        self._sizes = {split: sizes for split, (_, sizes) in cut.items()}
        self.settings: dict[str, Any] = {
            "source": source.description,
            "seed": options.seed,
            "image_policy": options.policy.to_json(),
            "conversion": {"source_sha256": source.digest(), "shard_bytes": options.shard_bytes}
            | ({"hold_out": options.hold_out} if options.hold_out else {})
            | ({"group": options.group} if options.group else {})
            | ({"whole_index": options.whole_index} if options.whole_index != WHOLE_INDEX_SAMPLES else {}),
        }
        self.digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def names(self, mark: str) -> list[str]:
        """Every object of the dataset but the manifest. `mark` is that of `Begun`."""
        shards = [shard_name(split, n, mark) for split, parts in self.parts.items() for n in range(len(parts))]
        indexes = [name for split in self.parts for name in self.index_names(split, mark)]
        return [*shards, *indexes, f"report{mark}.json"]

    def by_shard(self, split: str) -> bool:
        """Whether each shard of `split` has an index of its own."""
        return self.source.splits[split].num_rows > self.options.whole_index

    def index_names(self, split: str, mark: str) -> list[str]:
        if self.by_shard(split):
            return [shard_index_name(split, n, mark) for n in range(len(self.parts[split]))]
        return [f"{split}/index{mark}.parquet"]

    def windows(self, finished: set[tuple[str, int]]) -> Iterator[Iterable[tuple[str, int, pa.Table]]]:
        """Yields (split, number, rows) of the shards that are not `finished`, in groups: each must be done before the
        next is asked for, since a stream's spool holds the images of one group at a time.
        """
        missing = [
            (split, number, ids)
            for split, parts in self.parts.items()
            for number, ids in enumerate(parts)
            if (split, number) not in finished
        ]
        stream = self.source.stream
        if stream is None:
            yield ((split, number, self._rows(split, ids)) for split, number, ids in missing)
            return
        for split, group in _groups(missing, self.size, stream.spool.limit):
            stream.spool.clear()
            rows = stream.fetch(pa.concat_tables([self._rows(split, ids) for _, ids in group]), split)
            starts = np.cumsum([0] + [len(ids) for _, ids in group]).tolist()
            yield [  # take, not slice: a pickled slice carries the whole table
                (split, number, take(rows, range(start, start + len(ids))))
                for (number, ids), start in zip(group, starts[:-1], strict=True)
            ]

    def size(self, split: str, number: int) -> int:
        """The bytes of the source's images that go into the shard."""
        return int(self._sizes[split][number])

    def _rows(self, split: str, ids: np.ndarray) -> pa.Table:
        return take(self.source.splits[split], ids)


def _cut(rows: pa.Table, split: str, options: Options) -> tuple[list[np.ndarray], Ids]:
    """The rows of every shard, and the bytes of their images. They are all of the split's, shuffled by the seed, in as few shards
    as can be, of equal size, so that no process is left with a whole shard when the others are done. Samples of more than
    half a shard make it larger.
    """
    if not rows.num_rows:
        return [], np.zeros(0, np.int64)
    order = permutation(rows.num_rows, "shards", options.seed, split)
    lengths = to_numpy(rows["length"])[order]
    records = record_bytes(lengths)
    ends, limit = np.cumsum(records), max(options.shard_bytes - END_BYTES, 2 * int(records.max()))
    count = -(-int(ends[-1]) // limit)
    while True:
        cuts = np.unique(np.searchsorted(ends, ends[-1] * np.arange(1, count) / count))
        cuts = cuts[cuts > 0]
        starts = np.concatenate([[0], cuts])
        if np.add.reduceat(records, starts).max() <= limit:
            return np.split(order, cuts), np.add.reduceat(lengths, starts)
        count += 1


def _groups(
    missing: list[tuple[str, int, np.ndarray]], size: Callable[[str, int], int], limit: int
) -> Iterator[tuple[str, list[tuple[int, np.ndarray]]]]:
    """The `missing` (split, shard number, rows) in runs of one split whose images take at most `limit` bytes."""
    group: list[tuple[int, np.ndarray]] = []
    total, current = 0, ""
    for split, number, ids in missing:
        more = size(split, number)
        if more > limit:
            raise UsageError(f"one shard takes {more} bytes, the spool holds {limit}; raise --spool-gb")
        if group and (split != current or total + more > limit):
            yield current, group
            group, total = [], 0
        group, total, current = [*group, (number, ids)], total + more, split
    if group:
        yield current, group
