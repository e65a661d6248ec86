"""The common form of all sources: classes, and for each split a table with a row per sample.

A row says where an image's bytes lie. A format is read once, for its rows; code that has a row
reads the image with one `pread` and knows nothing of the format. That makes a shard a pure function
of its rows, in every process and on every machine.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from wds_train.conversion.conversion_report import Note
from wds_train.conversion.sources.labels import LabelRules
from wds_train.conversion.sources.spool import Spool
from wds_train.dataset.arrow import to_array
from wds_train.dataset.manifest import ClassInfo
from wds_train.errors import UsageError

# `path`, `offset`, `length`: where the image's bytes are. Offset 0: the image is the whole file.
ROWS = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)
CHUNK = 16_384  # rows in a batch


@dataclass(frozen=True)
class Wanted:
    """The flags that a person gave about a source.

    Attributes:
        image: The column of the files or images (--image-column).
        label: The column of the labels (--label-column).
        split: The column of the splits (--split-column); `none` for no column.
        table: The table that says the labels (--table).
        splits: Split name in small letters -> train, val, test or none (--split WORD=SPLIT).
        class_level: How many levels below SOURCE, or below a split's folder, the folders lie that
            name the classes.
        group: The column, or the pattern of paths, that says which samples are held out together
            (--group).
        labels: Which labels are classes.
        reencode: Images of formats that shards do not hold are taken, too (`ImagePolicy.reencode`).
    """

    image: str | None = None
    label: str | None = None
    split: str | None = None
    table: Path | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    class_level: int | None = None
    group: str | None = None
    labels: LabelRules = field(default_factory=LabelRules)
    reencode: bool = False


ANYTHING = Wanted()


@dataclass(frozen=True)
class Grouping:
    """The groups of samples that belong together: those of a patient, or of a burst of shots.

    Attributes:
        what: The value of --group: a column, or a pattern.
        column: The value of the column for each image, by its path; None where `what` is a pattern.
        root: The source's folder: patterns are matched with paths below it.
    """

    what: str
    column: dict[str, str] | None = None
    root: str = ""

    def group_of(self, path: str, key: str) -> str:
        """Return the group of the image at `path` whose sample has `key`.

        Raises:
            UsageError: The pattern does not match.
        """
        if self.column is not None:
            return self.column[path]
        for text in (path.removeprefix(self.root).lstrip("/"), key):
            found = re.search(self.what, text)
            if found and found.groups():
                return found[1]
            if found:
                return found[0]
        raise UsageError(
            f"--group {self.what} is no column of a table here, and as a pattern it does not match "
            f"{path}; correct it, as in --group 'patient_(\\d+)'"
        )


@dataclass
class Understood:
    """A description of how a source was read: printed before the work, and kept in the report.

    Attributes:
        layout: The layout that the source has, and where its splits come from.
        labels: Where the labels come from.
        said: Other decisions, a sentence each.
        doubtful: Decisions that may be wrong, a sentence each.
    """

    layout: str
    labels: str
    said: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)


class Stream(Protocol):
    """Fetches the images of a source that can only be read from front to back."""

    @property
    def spool(self) -> Spool:
        """Where the images lie for a while."""

    def held_out(self, keys: set[str]) -> "Stream":
        """Return this stream with the samples of `train` that have `keys` in `val`."""

    def fetch(self, wanted: pa.Table, split: str) -> pa.Table:
        """Return the `wanted` rows of `split` with the places in the spool of their images."""


@dataclass(frozen=True)
class Source:
    """A dataset as it was found.

    Attributes:
        description: The source in a few words, for the manifest.
        classes: The classes, in the order of their labels.
        splits: The rows of each split.
        notes: Files and samples that are not in the rows, and why.
        stamp: Text that changes when a file of the source does.
        stream: Fetches the images of rows that have no places yet; None where all have.
        understood: How the source was read.
        grouping: The samples that are held out together; None where each stands for itself.
    """

    description: str
    classes: tuple[ClassInfo, ...]
    splits: dict[str, pa.Table]
    notes: list[Note] = field(default_factory=list)
    stamp: str = ""
    stream: Stream | None = None
    understood: Understood | None = None
    grouping: Grouping | None = None

    @property
    def samples(self) -> int:
        """The samples of all splits."""
        return sum(table.num_rows for table in self.splits.values())

    def digest(self) -> str:
        """Return a sha256 over every row's key, label and length, and the stamp.

        Sources with equal digests convert to the same bytes.
        """
        digest = hashlib.sha256(self.stamp.encode())
        for split, table in self.splits.items():
            digest.update(split.encode())
            rows = table.select(["key", "label", "length"])
            # In steps of CHUNK, not by the table's batches: these differ from reader to reader.
            for start in range(0, rows.num_rows, CHUNK):
                digest.update(repr(rows.slice(start, CHUNK).to_pydict()).encode())
        return digest.hexdigest()


def take(rows: pa.Table, ids: Sequence[int] | np.ndarray) -> pa.Table:
    """Return some rows of a table, in the order of `ids`.

    Each batch is asked for its own rows: Arrow's `take` of a table first copies the whole of every
    text column, of which it then has room for 2 GB.

    Args:
        rows: The table.
        ids: The numbers of the rows.
    """
    batches = rows.to_batches()
    wanted = np.asarray(ids, np.int64)

    # Group the ids by their batch, and take those of each batch.
    ends = np.cumsum([batch.num_rows for batch in batches])
    batch_of = np.searchsorted(ends, wanted, side="right")
    order = np.argsort(batch_of, kind="stable")
    found = []
    for number in np.unique(batch_of).tolist():
        of_batch = wanted[batch_of == number] - (ends[number] - batches[number].num_rows)
        found.append(batches[number].take(to_array(of_batch, pa.int64())))

    # Return to the order of `ids`.
    together = pa.Table.from_batches(found, rows.schema)
    return together.take(to_array(np.argsort(order), pa.int64()))
