"""Sources that can only be read from front to back: a hub's stream, Parquet, images that are computed.

A global shuffle needs every image in an order of its own, so a stream is kept in a local spool first. A stream larger
than the spool's limit is read several times: once for labels and sizes, which is all that the plan needs, then once for
every group of shards whose images fit. Memory holds the rows alone, disk never more than the limit.
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
    """What a stream yields. `name` is unique in its split."""

    split: str
    name: str
    label: int
    image: bytes


@dataclass(frozen=True)
class ItemStream:
    """A stream of items. `read` yields the same items in the same order each time."""

    read: Callable[[], Iterator[Item]]
    spool: Spool

    def held_out(self, keys: set[str]) -> "ItemStream":
        """This stream, its samples of `train` that have `keys` in `val`."""

        def read() -> Iterator[Item]:
            for item in self.read():
                held = item.split == "train" and key_of(item.name) in keys
                yield item._replace(split="val") if held else item

        return ItemStream(read, self.spool)

    def fetch(self, wanted: pa.Table, split: str) -> pa.Table:
        """The `wanted` rows of `split`, with the places in the spool where their images now lie."""
        sizes = dict(zip(wanted["key"].to_pylist(), wanted["length"].to_pylist(), strict=True))
        places: dict[str, tuple[str, int, int]] = {}
        for item in self.read():
            key = key_of(item.name)
            if item.split == split and sizes.get(key) == len(item.image):
                places[key] = self.spool.append(item.image)
        self.spool.flush()
        gone = next((key for key in sizes if key not in places), None)
        if gone is not None:
            raise DataError(f"the sample {gone!r} of {split} was in the stream at first and is not now; convert again")
        found = [places[key] for key in sizes]
        paths = to_array([place[0] for place in found], pa.string())
        offsets = to_array([place[1] for place in found], pa.int64())
        columns = {name: wanted[name] for name in ROWS.names} | {"path": paths, "offset": offsets}
        return pa.table(columns, schema=ROWS)


def spooled(
    description: str, classes: tuple[ClassInfo, ...], read: Callable[[], Iterator[Item]], spool: Spool
) -> Source:
    """The source of a stream. Its images are in the spool, or, when they do not fit, `Source.stream` brings them."""
    scans: dict[str, SplitScan] = {}
    fits = True
    for item in read():
        found = scans.setdefault(item.split, SplitScan(item.split))
        if fits and spool.bytes + len(item.image) > spool.limit:
            fits = False
            spool.clear()
        if not 0 <= item.label < len(classes):
            found.note_label(item.name, item.label, len(classes))
        elif not item.image:
            found.note(item.name, "left out", "zero bytes")
        else:
            path, offset, length = spool.append(item.image) if fits else ("", 0, len(item.image))
            found.rows.add(key_of(item.name), item.label, path, offset, length)
    spool.flush()
    source = from_scans(description, classes, [*scans.values()])
    return source if fits else replace(source, stream=ItemStream(read, spool))
