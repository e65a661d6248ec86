"""Read sources that come from front to back: a hub's stream, Parquet, images that are computed.

A global shuffle needs every image in another order, so a stream is kept in a local spool first. A
stream larger than the spool's limit is read several times: once for labels and sizes, which is all
that the plan needs, then once for every group of shards whose images fit. Memory holds the rows
alone, the disk never more than the limit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pyarrow as pa

from wds_train.conversion.sources.names import key_of
from wds_train.conversion.sources.scan import SplitScan
from wds_train.conversion.sources.source import ROWS, Source
from wds_train.conversion.sources.splits import from_scans
from wds_train.conversion.sources.spool import Spool
from wds_train.dataset.arrow import to_array
from wds_train.dataset.manifest import ClassInfo
from wds_train.errors import DataError


class Item(NamedTuple):
    """A sample of a stream. `name` is unique in its split; `image` is encoded."""

    split: str
    name: str
    label: int
    image: bytes


@dataclass(frozen=True)
class ItemStream:
    """A stream of items that does not fit its spool.

    Attributes:
        read: Yields the same items in the same order each time.
        spool: Where some of the images lie for a while.
    """

    read: Callable[[], Iterator[Item]]
    spool: Spool

    def held_out(self, keys: set[str]) -> "ItemStream":
        """Return this stream with the samples of `train` that have `keys` in `val`."""

        # The stream itself stays as it is: its items get their new split as they pass.
        def read() -> Iterator[Item]:
            for item in self.read():
                if item.split == "train" and key_of(item.name) in keys:
                    yield item._replace(split="val")
                else:
                    yield item

        return ItemStream(read, self.spool)

    def fetch(self, wanted: pa.Table, split: str) -> pa.Table:
        """Read the images of some rows into the spool.

        Args:
            wanted: Rows of `split`.
            split: Their split.

        Returns:
            The same rows, with the places in the spool where their images now lie.

        Raises:
            DataError: The stream holds one of them no more.
        """
        # Read the whole stream, and keep the images of these rows.
        sizes = dict(zip(wanted["key"].to_pylist(), wanted["length"].to_pylist(), strict=True))
        places: dict[str, tuple[str, int, int]] = {}
        for item in self.read():
            key = key_of(item.name)
            if item.split == split and sizes.get(key) == len(item.image):
                places[key] = self.spool.append(item.image)
        self.spool.flush()

        # Put their places into the rows.
        paths = []
        offsets = []
        for key in sizes:
            if key not in places:
                raise DataError(
                    f"the sample {key!r} of {split} was in the stream at first and is not now; "
                    "convert again"
                )
            path, offset, _ = places[key]
            paths.append(path)
            offsets.append(offset)
        columns = {name: wanted[name] for name in ROWS.names}
        columns["path"] = to_array(paths, pa.string())
        columns["offset"] = to_array(offsets, pa.int64())
        return pa.table(columns, schema=ROWS)


def spool_items(
    description: str,
    classes: tuple[ClassInfo, ...],
    read: Callable[[], Iterator[Item]],
    spool: Spool,
) -> Source:
    """Read a stream, and return it as a source.

    Args:
        description: The source, for the manifest.
        classes: The classes.
        read: Yields the same items in the same order each time.
        spool: Where the images are kept, if all of them fit; if not, `Source.stream` fetches them.
    """
    scans: dict[str, SplitScan] = {}
    fits = True
    for item in read():
        found = scans.setdefault(item.split, SplitScan(item.split))
        # Once the images are too many, none are kept: each pass over the stream needs the room.
        if fits and spool.bytes + len(item.image) > spool.limit:
            fits = False
            spool.clear()
        if not 0 <= item.label < len(classes):
            found.note_label(item.name, item.label, len(classes))
        elif not item.image:
            found.note(item.name, "left out", "zero bytes")
        else:
            path = ""
            offset = 0
            if fits:
                path, offset, _ = spool.append(item.image)
            found.rows.add(key_of(item.name), item.label, path, offset, len(item.image))
    # A stream that fits is read no more; otherwise its rows have no places yet.
    spool.flush()
    source = from_scans(description, classes, [*scans.values()])
    if fits:
        return source
    return replace(source, stream=ItemStream(read, spool))
