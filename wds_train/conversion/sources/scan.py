"""Scan a source's files: collect rows, notes, and a stamp of every file."""

import hashlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from wds_train.console import readable
from wds_train.conversion.conversion_report import Note
from wds_train.conversion.sources.labels import NO_LABEL
from wds_train.conversion.sources.litter import litter_origin
from wds_train.conversion.sources.names import FOREIGN_SUFFIXES, IMAGE_SUFFIXES, SIDECARS, key_of
from wds_train.conversion.sources.source import CHUNK, ROWS
from wds_train.dataset.arrow import to_batch
from wds_train.errors import AccessDenied, DataError, StoreError
from wds_train.files import home

UNLABELED = "no label"
# What os.fsdecode makes of bytes that are no UTF-8. A table of rows cannot hold such a path.
NO_UTF8 = re.compile("[\udc80-\udcff]")
# Rows in a file. Their paths must fit into a column of texts, which has room for 2 GB.
MAPPED = 32 * CHUNK


class Rows:
    """Collect the rows of a split, at about 100 bytes each.

    The rows of a large split are kept in files, `MAPPED` in each.
    """

    def __init__(self) -> None:
        self._mapped: list[pa.RecordBatch] = []
        self._chunks: list[pa.RecordBatch] = []
        self._rows = 0  # of the chunks
        self._pending: list[tuple[str, int, str, int, int]] = []

    def add(self, key: str, label: int, path: str, offset: int, length: int) -> None:
        """Add a row; see `ROWS`."""
        self._pending.append((key, label, path, offset, length))
        if len(self._pending) == CHUNK:
            self._flush()

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Add the rows of a batch."""
        self._chunks.append(batch)
        self._rows += batch.num_rows
        if self._rows >= MAPPED:
            self._mapped.append(_map_batches(self._chunks))
            self._chunks = []
            self._rows = 0

    def table(self) -> pa.Table:
        """Return all rows."""
        self._flush()
        return pa.Table.from_batches(self._mapped + self._chunks, ROWS)

    def _flush(self) -> None:
        if self._pending:
            self.add_batch(to_batch(zip(*self._pending, strict=True), ROWS))
            self._pending.clear()


def _map_batches(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """Return the rows of `batches` as one batch that is mapped from a file.

    The system can take back its memory. The file has no name, and goes with the batch.
    """
    try:
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=home()) as file:
            (together,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
            with pa.ipc.new_file(file, ROWS) as writer:
                writer.write_batch(together)
            file.flush()
            return pa.ipc.open_file(pa.memory_map(file.name)).get_batch(0)
    except OSError as error:
        raise StoreError(
            f"the table of the source's files cannot be kept in {home()}: "
            f"{error.strerror or error}; free some room, or set WDS_HOME to another folder"
        ) from error


class Stamp:
    """A digest over the names, sizes and times of files, which changes when one is replaced."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, stat: os.stat_result) -> None:
        """Add a file."""
        line = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        self._digest.update(line.encode(errors="surrogateescape"))

    def hexdigest(self) -> str:
        """Return the digest."""
        return self._digest.hexdigest()


class SplitScan:
    """The results of scanning the files of a split.

    Args:
        split: The split.
        foreign: Take images of formats that shards do not hold, too.

    Attributes:
        rows: The samples.
        notes: Files that are no samples, and why.
        sidecars: Files that often lie next to images, counted by their suffix.
        stamp: The digest of every file that was looked at.
        seen: A number for callers that count their samples.
    """

    def __init__(self, split: str, *, foreign: bool = False) -> None:
        self.split = split
        self.rows = Rows()
        self.notes: list[Note] = []
        self.sidecars = Counter[str]()
        self.stamp = Stamp()
        self.seen = 0
        self._suffixes: tuple[str, ...] = IMAGE_SUFFIXES
        if foreign:
            self._suffixes += FOREIGN_SUFFIXES

    def note(self, origin: str | Path, what: str, cause: str) -> None:
        """Add a note; see `Note`."""
        self.notes.append(Note(self.split, readable(str(origin)), what, cause))

    def all_notes(self) -> list[Note]:
        """Return the notes, and one for each kind of sidecar."""
        notes = list(self.notes)
        for suffix, count in sorted(self.sidecars.items()):
            notes.append(
                Note(self.split, f"{count} files {suffix}", "ignored", "beside the images")
            )
        return notes

    def note_label(self, origin: str, label: int, classes: int) -> None:
        """Note a sample whose label is no class, or missing, as often in test splits."""
        if label == NO_LABEL:
            cause = UNLABELED
            if self.split == "test":
                cause = "a test image without a label"
            self.note(origin, "ignored", cause)
        else:
            self.note(origin, "left out", f"its label {label} is outside the {classes} classes")

    def add_file(self, label: int, path: Path, name: str) -> bool:
        """Add the image at `path`, or note why it is no sample.

        Args:
            label: Its label.
            path: The file.
            name: Its name in the source, which its key is made from.

        Returns:
            Whether it was added.
        """
        try:
            stat = path.stat()
        except OSError as error:
            self.note(path, "left out", f"it cannot be read: {error.strerror}")
            return False
        self.stamp.add(name, stat)
        return self.add(label, name, str(path), 0, stat.st_size)

    def add(self, label: int, name: str, path: str, offset: int, length: int) -> bool:
        """Add an image, or note why it is no sample.

        Args:
            label: Its label.
            name: Its name in the source, which its key is made from.
            path: The file that holds its bytes.
            offset: Where they begin in that file; 0 for a file of its own.
            length: The number of bytes.

        Returns:
            Whether it was added.
        """
        base = name.rpartition("/")[2]
        suffix = Path(base).suffix
        origin = path
        if offset:  # in a tar, or another file of many images
            origin = f"{path}: {name}"

        # Pass over what is no image, and note the images that cannot be samples.
        litter = litter_origin(base)
        if litter:
            self.note(origin, "ignored", litter)
        elif suffix.lower() in SIDECARS:
            self.sidecars[suffix.lower()] += 1
        elif suffix.lower() not in self._suffixes:
            cause = f"not an image that shards hold ({suffix or 'no extension'})"
            if suffix.lower() in FOREIGN_SUFFIXES:
                cause += "; --reencode takes it"
            self.note(origin, "left out", cause)
        elif length == 0:
            self.note(origin, "left out", "zero bytes")
        elif NO_UTF8.search(path):
            self.note(origin, "left out", "its name is not UTF-8; rename it")
        else:
            self.rows.add(key_of(name[: -len(suffix)]), label, path, offset, length)
            return True
        return False


def read_bytes(path: str, offset: int, length: int) -> bytes:
    """Return the bytes of one row.

    Args:
        path: The file.
        offset: Where the bytes begin.
        length: Their number.

    Raises:
        DataError: The file is not what it was when the source was scanned.
        AccessDenied: It may not be read.
    """
    try:
        # Path.open costs as much as the read.
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            # One read may return less than it was asked for.
            data = os.pread(file.fileno(), length, offset)
            while len(data) < length:
                more = os.pread(file.fileno(), length - len(data), offset + len(data))
                if not more:
                    break
                data += more
    except PermissionError as error:
        raise AccessDenied(f"no permission to read {path}; check its owner and mode") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); restore it and run again"
        ) from error
    if len(data) < length:
        raise DataError(
            f"{path} ends at byte {offset + len(data)}, {offset + length} were there at the start; "
            "convert again"
        )
    return data


def scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of `folder` by name, so that every machine sees the same order.

    Raises:
        AccessDenied: It may not be listed.
        DataError: It cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            yield from sorted(entries, key=lambda entry: entry.name)
    except PermissionError as error:
        raise AccessDenied(f"no permission to list {folder}; check its owner and mode") from error
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from error
