"""What every source of images becomes: classes, and per split a table with a row per sample that says where its bytes
lie. A format is read once, for its rows; whoever then holds a row reads the image with one `pread` and knows nothing of
the format. That makes a shard a pure function of its rows, whichever process or machine computes it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa

from shards.report import Note
from shards.sources.names import LITTER
from shards.sources.spool import Spool
from wds_train.format.arrow import to_array
from wds_train.format.manifest import ClassInfo

# `path`, `offset`, `length`: where the image's bytes are. Offset 0 is a file of its own.
ROWS = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)
CHUNK = 16_384


def is_litter(name: str) -> bool:
    """Whether the file or tar member is one that an operating system leaves: ._1.jpg beside 1.jpg, on every Mac."""
    return LITTER.fullmatch(name.rpartition("/")[2]) is not None


@dataclass(frozen=True)
class Wanted:
    """What a person said of a source: the columns of its table, and whether images that shards do not hold are taken, too
    (`ImagePolicy.reencode`).
    """

    image: str | None = None
    label: str | None = None
    reencode: bool = False


ANYTHING = Wanted()


class Stream(Protocol):
    """Brings the images of a source that can only be read from front to back."""

    @property
    def spool(self) -> Spool:
        """Where the images lie for a while."""

    def held_out(self, keys: set[str]) -> "Stream":
        """This stream, its samples of `train` that have `keys` in `val`."""

    def fetch(self, wanted: pa.Table, split: str) -> pa.Table:
        """The `wanted` rows of `split`, with the places in the spool where their images now lie."""


@dataclass(frozen=True)
class Source:
    """A dataset as it was found. `description` goes into the manifest; `stamp` changes when a file of the source does."""

    description: str
    classes: tuple[ClassInfo, ...]
    splits: dict[str, pa.Table]
    notes: list[Note] = field(default_factory=list)
    stamp: str = ""
    stream: Stream | None = None  # rows have no places yet; this brings them

    @property
    def samples(self) -> int:
        return sum(table.num_rows for table in self.splits.values())

    def digest(self) -> str:
        """A sha256 over every row's key, label and length, and the stamp: sources with equal ones convert to the same
        bytes.
        """
        digest = hashlib.sha256(self.stamp.encode())
        for split, table in self.splits.items():
            digest.update(split.encode())
            rows = table.select(["key", "label", "length"])
            for start in range(0, rows.num_rows, CHUNK):  # however the table is cut into batches
                digest.update(repr(rows.slice(start, CHUNK).to_pydict()).encode())
        return digest.hexdigest()


def take(rows: pa.Table, ids: Sequence[int] | np.ndarray) -> pa.Table:
    """The rows of these numbers, in that order. Each batch is asked for its own: Arrow's `take` of a table first copies the whole
    of every text column, of which it then has room for 2 GB.
    """
    batches, wanted = rows.to_batches(), np.asarray(ids, np.int64)
    ends = np.cumsum([batch.num_rows for batch in batches])
    batch_of = np.searchsorted(ends, wanted, side="right")
    order = np.argsort(batch_of, kind="stable")
    found = []
    for number in np.unique(batch_of).tolist():
        of_batch = wanted[batch_of == number] - (ends[number] - batches[number].num_rows)
        found.append(batches[number].take(to_array(of_batch, pa.int64())))
    return pa.Table.from_batches(found, rows.schema).take(to_array(np.argsort(order), pa.int64()))
