"""Plan a conversion: which samples go into which shard, under which name.

Equal plans make equal bytes.
"""

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

# A shard to make: its split, its number, and the numbers of its samples in the split.
MissingShard = tuple[str, int, np.ndarray]
# Shards of one split: their numbers and samples.
ShardGroup = tuple[str, list[tuple[int, np.ndarray]]]


@dataclass(frozen=True)
class Options:
    """The settings that decide a dataset's bytes, with its source.

    Attributes:
        seed: Of the shuffle over the whole source.
        shard_bytes: A shard's largest size.
        policy: How images are checked and encoded.
        hold_out: The share of `train` that becomes `val`, for a source without `val`.
        whole_index: A split of more samples has an index for each shard.
        group: What --group said of samples that are held out together; empty for none.
    """

    seed: int = 0
    shard_bytes: int = 128 << 20
    policy: ImagePolicy = field(default_factory=ImagePolicy)
    hold_out: float = 0.0
    whole_index: int = WHOLE_INDEX_SAMPLES
    group: str = ""


def shard_name(split: str, number: int, mark: str) -> str:
    """Return the name of a shard."""
    return f"{split}/shard-{number:06d}{mark}.tar"


def shard_index_name(split: str, number: int, mark: str) -> str:
    """Return the name of the index of a shard that has its own."""
    return f"{split}/index-{number:06d}{mark}.parquet"


class Plan:
    """The shards that a source becomes.

    Args:
        source: What is converted.
        options: The settings.

    Attributes:
        parts: For each split the samples of every shard, as their numbers in the split.
        settings: What the manifest says of the conversion. Two conversions with equal settings are
            the same, and make the same bytes.
        digest: The sha256 of `settings`.

    Raises:
        UsageError: A share is to be held out of a source that has a `val` split, or no `train`.
    """

    def __init__(self, source: Source, options: Options) -> None:
        # Hold out first: which samples are val decides what the shards hold.
        if options.hold_out:
            if "train" not in source.splits or "val" in source.splits:
                there = ", ".join(source.splits)
                raise UsageError(
                    f"{source.description} has {there}: nothing can be held out; "
                    "leave --hold-out away"
                )
            source = hold_out(source, options.hold_out)
        self.source = source
        self.options = options

        # Distribute the samples of each split over its shards.
        self.parts: dict[str, list[np.ndarray]] = {}
        self._sizes: dict[str, Ids] = {}
        for split, rows in source.splits.items():
            self.parts[split], self._sizes[split] = _cut(rows, split, options)

        self.settings = _settings(source, options)
        text = json.dumps(self.settings, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def names(self, mark: str) -> list[str]:
        """Return every object of the dataset but the manifest.

        Args:
            mark: The `mark` of the `ShardTask`s.
        """
        names = []
        for split, parts in self.parts.items():
            names += [shard_name(split, number, mark) for number in range(len(parts))]
        for split in self.parts:
            names += self.index_names(split, mark)
        return [*names, f"report{mark}.json"]

    def by_shard(self, split: str) -> bool:
        """Return whether each shard of `split` has an index of its own."""
        return self.source.splits[split].num_rows > self.options.whole_index

    def index_names(self, split: str, mark: str) -> list[str]:
        """Return the objects that hold the index of `split`."""
        if self.by_shard(split):
            shards = range(len(self.parts[split]))
            return [shard_index_name(split, number, mark) for number in shards]
        return [f"{split}/index{mark}.parquet"]

    def windows(
        self, finished: set[tuple[str, int]]
    ) -> Iterator[Iterable[tuple[str, int, pa.Table]]]:
        """Yield the shards to make, in groups.

        Each group must be done before the next is asked for, since a stream's spool holds the
        images of one group at a time.

        Args:
            finished: (split, number) of the shards that are there already.

        Yields:
            (split, number, rows) of each shard of the group.
        """
        missing: list[MissingShard] = []
        for split, parts in self.parts.items():
            for number, ids in enumerate(parts):
                if (split, number) not in finished:
                    missing.append((split, number, ids))

        # Images on a disk can be read in any order: one group, whose rows are taken when needed.
        stream = self.source.stream
        if stream is None:
            yield self._take_each(missing)
            return

        # A stream is read once for each group of shards whose images fit the spool.
        for split, group in _groups(missing, self.size, stream.spool.limit):
            stream.spool.clear()
            wanted = pa.concat_tables([self._rows(split, ids) for _, ids in group])
            rows = stream.fetch(wanted, split)

            # Divide what was fetched among the shards of the group.
            window = []
            start = 0
            for number, ids in group:
                end = start + len(ids)
                # take, not slice: a pickled slice carries the whole table
                window.append((split, number, take(rows, range(start, end))))
                start = end
            yield window

    def _take_each(self, missing: list[MissingShard]) -> Iterator[tuple[str, int, pa.Table]]:
        for split, number, ids in missing:
            yield split, number, self._rows(split, ids)

    def size(self, split: str, number: int) -> int:
        """Return the bytes of the source's images that go into a shard."""
        return int(self._sizes[split][number])

    def _rows(self, split: str, ids: np.ndarray) -> pa.Table:
        return take(self.source.splits[split], ids)


def _settings(source: Source, options: Options) -> dict[str, Any]:
    """Return `Plan.settings`.

    Options at their defaults are left out, so that older datasets agree.
    """
    conversion: dict[str, Any] = {
        "source_sha256": source.digest(),
        "shard_bytes": options.shard_bytes,
    }
    if options.hold_out:
        conversion["hold_out"] = options.hold_out
    if options.group:
        conversion["group"] = options.group
    if options.whole_index != WHOLE_INDEX_SAMPLES:
        conversion["whole_index"] = options.whole_index
    return {
        "source": source.description,
        "seed": options.seed,
        "image_policy": options.policy.to_json(),
        "conversion": conversion,
    }


def _cut(rows: pa.Table, split: str, options: Options) -> tuple[list[np.ndarray], Ids]:
    """Distribute the samples of a split over its shards.

    All samples are shuffled by the seed, then cut into as few shards as can be, of equal size, so
    that no process is left with a whole shard when the others are done. Samples of more than half a
    shard make it larger.

    Returns:
        The samples of every shard, as their numbers in the split; and the bytes of their images.
    """
    if not rows.num_rows:
        return [], np.zeros(0, np.int64)
    order = permutation(rows.num_rows, "shards", options.seed, split)
    lengths = to_numpy(rows["length"])[order]
    records = record_bytes(lengths)  # of the samples in the tar, with their headers and padding
    ends = np.cumsum(records)
    limit = max(options.shard_bytes - END_BYTES, 2 * int(records.max()))

    # Begin with the fewest shards that could hold all, and add one until the largest fits.
    count = -(-int(ends[-1]) // limit)
    while True:
        cuts = np.unique(np.searchsorted(ends, ends[-1] * np.arange(1, count) / count))
        cuts = cuts[cuts > 0]
        starts = np.concatenate([[0], cuts])
        if np.add.reduceat(records, starts).max() <= limit:
            return np.split(order, cuts), np.add.reduceat(lengths, starts)
        count += 1


def _groups(
    missing: list[MissingShard], size: Callable[[str, int], int], limit: int
) -> Iterator[ShardGroup]:
    """Group neighbouring shards of one split whose images take at most `limit` bytes.

    Raises:
        UsageError: One shard alone takes more.
    """
    group: list[tuple[int, np.ndarray]] = []
    group_split = ""
    total = 0
    for split, number, ids in missing:
        # A group ends before the shard that would exceed the spool.
        more = size(split, number)
        if more > limit:
            raise UsageError(
                f"one shard takes {more} bytes, the spool holds {limit}; raise --spool-gb"
            )
        if group and (split != group_split or total + more > limit):
            yield group_split, group
            group = []
            total = 0
        group.append((number, ids))
        group_split = split
        total += more
    if group:
        yield group_split, group
