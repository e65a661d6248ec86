"""What is met on the way through a source's files."""

import hashlib
import os
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
MAPPED = 32 * CHUNK  # rows; their paths are no more than a column of texts holds


class Rows:
    """Collects the rows of a split, at about 100 bytes each; of a large one in files, `MAPPED` in each."""

    def __init__(self) -> None:
        self._mapped: list[pa.RecordBatch] = []
        self._chunks: list[pa.RecordBatch] = []
        self._pending: list[tuple[str, int, str, int, int]] = []

    def add(self, key: str, label: int, path: str, offset: int, length: int) -> None:
        self._pending.append((key, label, path, offset, length))
        if len(self._pending) == CHUNK:
            self._flush()

    def add_batch(self, batch: pa.RecordBatch) -> None:
        self._chunks.append(batch)
        if sum(chunk.num_rows for chunk in self._chunks) >= MAPPED:
            self._mapped.append(_mapped(self._chunks))
            self._chunks = []

    def table(self) -> pa.Table:
        self._flush()
        return pa.Table.from_batches(self._mapped + self._chunks, ROWS)

    def _flush(self) -> None:
        if self._pending:
            self.add_batch(to_batch(zip(*self._pending, strict=True), ROWS))
            self._pending.clear()


def _mapped(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """The rows of `batches` as one batch, in a file without a name, which goes with it: memory that the system can take back."""
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
            f"the table of the source's files cannot be kept in {home()}: {error.strerror or error}; free some room, or set "
            "WDS_HOME to another folder"
        ) from error


class Stamp:
    """A digest over the names, sizes and times of files: cheap, and another one when any was replaced."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, stat: os.stat_result) -> None:
        self._digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class SplitScan:
    """What scanning the files of a split brings together: rows, notes, and a stamp of every file looked at. `foreign`:
    whether images count that shards do not hold.
    """

    def __init__(self, split: str, *, foreign: bool = False) -> None:
        self.split = split
        self.rows = Rows()
        self.notes: list[Note] = []
        self.sidecars = Counter[str]()
        self.stamp = Stamp()
        self.seen = 0
        self._suffixes = IMAGE_SUFFIXES + (FOREIGN_SUFFIXES if foreign else ())

    def note(self, origin: str | Path, what: str, cause: str) -> None:
        self.notes.append(Note(self.split, readable(str(origin)), what, cause))

    def all_notes(self) -> list[Note]:
        """The notes, and one for each kind of file that lay beside the images."""
        beside = [
            Note(self.split, f"{count} files {suffix}", "ignored", "beside the images")
            for suffix, count in sorted(self.sidecars.items())
        ]
        return self.notes + beside

    def note_label(self, origin: str, label: int, classes: int) -> None:
        """Note a sample whose label is none of the classes'. Test images are often handed out without."""
        if label == NO_LABEL:
            self.note(origin, "ignored", "a test image without a label" if self.split == "test" else UNLABELED)
        else:
            self.note(origin, "left out", f"its label {label} is outside the {classes} classes")

    def add_file(self, label: int, path: Path, name: str) -> bool:
        """Add the image at `path`, whose key comes from `name`, or note why not; whether it was added."""
        try:
            stat = path.stat()
        except OSError as error:
            self.note(path, "left out", f"it cannot be read: {error.strerror}")
            return False
        self.stamp.add(name, stat)
        return self.add(label, name, str(path), 0, stat.st_size)

    def add(self, label: int, name: str, path: str, offset: int, length: int) -> bool:
        """Add the image file `name`, whose bytes lie at `path`, or note why it is no sample; whether it was added."""
        base = name.rpartition("/")[2]
        suffix = Path(base).suffix
        origin = f"{path}: {name}" if offset else path
        if litter := litter_origin(base):
            self.note(origin, "ignored", litter)
        elif suffix.lower() in SIDECARS:
            self.sidecars[suffix.lower()] += 1
        elif suffix.lower() not in self._suffixes:
            remedy = "; --reencode takes it" if suffix.lower() in FOREIGN_SUFFIXES else ""
            self.note(origin, "left out", f"not an image that shards hold ({suffix or 'no extension'}){remedy}")
        elif length == 0:
            self.note(origin, "left out", "zero bytes")
        elif any("\udc80" <= letter <= "\udcff" for letter in path):  # os.fsdecode's mark for bytes that are no UTF-8
            self.note(origin, "left out", "its name is not UTF-8; rename it")
        else:
            self.rows.add(key_of(name[: -len(suffix)]), label, path, offset, length)
            return True
        return False


def read_bytes(path: str, offset: int, length: int) -> bytes:
    """The bytes of one row; `DataError` when the file is no longer what it was when the source was scanned."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (Path.open costs as much as the read)
            data = os.pread(file.fileno(), length, offset)
            while len(data) < length and (more := os.pread(file.fileno(), length - len(data), offset + len(data))):
                data += more
    except PermissionError as error:
        raise AccessDenied(f"no permission to read {path}; check its owner and mode") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); restore it and run again") from error
    if len(data) < length:
        raise DataError(
            f"{path} ends at byte {offset + len(data)}, {offset + length} were there at the start; convert again"
        )
    return data


def scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The entries of `folder` by name, so that every machine sees the same order."""
    try:
        with os.scandir(folder) as entries:
            yield from sorted(entries, key=lambda entry: entry.name)
    except PermissionError as error:
        raise AccessDenied(f"no permission to list {folder}; check its owner and mode") from error
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from error
