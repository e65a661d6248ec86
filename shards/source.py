"""What every source of images becomes: classes, and per split a table with a row per sample that says where its bytes
lie. A format is read once, for its rows; whoever then holds a row reads the image with one `pread` and knows nothing of
the format. That makes a shard a pure function of its rows, whichever process or machine computes it.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.spool import Spool
from wds_train.errors import AccessDenied, DataError
from wds_train.manifest import UNPRINTABLE, ClassInfo
from wds_train.tario import KEY_LENGTH, to_array, to_batch, to_numpy

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
# What a split is called, in the order of preference.
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "dev"), "test": ("test", "testing")}
_WORDS = "|".join(word for words in SPLITS.values() for word in words)
# In the name of a file: the word between separators.
SPLIT_WORD = re.compile(rf"(?:^|[-_./])({_WORDS})(?=[-_./0-9{{]|$)", re.IGNORECASE)
# A folder is a split when its name is such a word and no more than what people put around it: seg_train, Test Images.
SPLIT_FOLDER = re.compile(
    rf"(?:(?:seg|img|images?|data|dataset)[-_ .]?)?({_WORDS})[-_ .]?(?:set|data|img|images?|split|folder)?[-_ .]?\d*",
    re.IGNORECASE,
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".webp")
# Of images that shards do not hold: `ImagePolicy.reencode` takes them.
FOREIGN_SUFFIXES = (".bmp", ".gif", ".tif", ".tiff", ".avif")
# What stands beside images in people's folders, and is no sample: counted, one note a kind.
SIDECARS = (
    ".txt",
    ".xml",
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".md",
    ".yaml",
    ".yml",
    ".html",
    ".pdf",
    ".log",
    ".ini",
    ".db",
)
# What operating systems leave in folders: nobody's sample, so it does not count as a bad one.
LITTER = re.compile(r"\..*|(eh)?Thumbs\.db|desktop\.ini|__MACOSX|@eaDir|\$RECYCLE\.BIN|lost\+found", re.IGNORECASE)


def is_litter(name: str) -> bool:
    """Whether the file or tar member is one that an operating system leaves: ._1.jpg beside 1.jpg, on every Mac."""
    return LITTER.fullmatch(name.rpartition("/")[2]) is not None


@dataclass(frozen=True)
class Note:
    """A file or sample that is not in the dataset as the source holds it. `what`: `left out` (counts against the
    tolerance), `ignored` (no sample at all), `altered`, or `kept` (untouched, but odd).
    """

    split: str
    origin: str
    what: str
    cause: str


@dataclass(frozen=True)
class Wanted:
    """What a person said of a source: the columns of its table, and whether images that shards do not hold are taken, too
    (`ImagePolicy.reencode`).
    """

    image: str | None = None
    label: str | None = None
    reencode: bool = False


ANYTHING = Wanted()


class Rows:
    """Collects the rows of a split, at about 100 bytes each."""

    def __init__(self) -> None:
        self._chunks: list[pa.RecordBatch] = []
        self._pending: list[tuple[str, int, str, int, int]] = []

    def add(self, key: str, label: int, path: str, offset: int, length: int) -> None:
        self._pending.append((key, label, path, offset, length))
        if len(self._pending) == CHUNK:
            self._flush()

    def table(self) -> pa.Table:
        self._flush()
        return pa.Table.from_batches(self._chunks, ROWS)

    def _flush(self) -> None:
        if self._pending:
            columns = zip(*self._pending, strict=True)
            self._chunks.append(to_batch(columns, ROWS))
            self._pending.clear()


class Stream(Protocol):
    """Brings the images of a source that can only be read from front to back."""

    @property
    def spool(self) -> Spool:
        """Where they lie for a while."""

    def held_out(self, keys: set[str]) -> "Stream":
        """This stream, its samples of `train` that have `keys` in `val`."""

    def fetch(self, wanted: pa.Table, split: str) -> pa.Table:
        """`wanted`, rows of `split`, with the places in the spool where their images now lie."""


@dataclass(frozen=True)
class Source:
    """`description` goes into the manifest; `stamp` changes when a file of the source does."""

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
        """sha256 over every row's key, label and length, and the stamp: two equal ones convert to the same bytes."""
        digest = hashlib.sha256(self.stamp.encode())
        for split, table in self.splits.items():
            digest.update(split.encode())
            for batch in table.select(["key", "label", "length"]).to_batches(CHUNK):
                digest.update(repr(batch.to_pydict()).encode())
        return digest.hexdigest()


class Stamp:
    """A digest over the names, sizes and times of files: cheap, and another one when any was replaced."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, stat: os.stat_result) -> None:
        self._digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def readable(name: str) -> str:
    """`name`, which may be no UTF-8 or hold control characters, as something that can be printed in a line."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


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
        """Note a sample whose label is none of the classes'. Test images are often handed out without (-1)."""
        if self.split == "test" and label == -1:
            self.note(origin, "ignored", "a test image without a label")
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
        if LITTER.fullmatch(base):
            self.note(origin, "ignored", "left by the operating system")
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
    """`source`, whose label n is now `labels[n]` (int32)."""

    def changed(rows: pa.Table) -> pa.Table:
        new = to_array(labels[to_numpy(rows["label"])] if rows.num_rows else [], pa.int32())
        return rows.set_column(rows.schema.get_field_index("label"), ROWS.field("label"), new)

    return replace(source, splits={split: changed(rows) for split, rows in source.splits.items()})


def hold_out(source: Source, share: float) -> Source:
    """`source`, which has no `val`, with `share` of each class of `train` for one: the samples whose keys' hashes are
    the lowest, at least one, and never the class's only one. Neither the machine nor the seed of the shuffle matters.
    """
    rows = source.splits["train"]
    keys, labels = rows["key"].to_pylist(), to_numpy(rows["label"])
    hashes = np.array([hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys]).view(">u8")
    order, counts = np.lexsort((hashes, labels)), np.bincount(labels)
    place = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)  # in its class, in `order`
    wanted = np.minimum(np.maximum(np.round(share * counts), 1), counts - 1)
    held = np.zeros(len(keys), bool)
    held[order] = place < np.repeat(wanted, counts)
    parts = {split: take(rows, np.flatnonzero(held == (split == "val"))) for split in ("train", "val")}
    stream = source.stream and source.stream.held_out({key for key, is_held in zip(keys, held, strict=True) if is_held})
    return replace(source, splits=parts | {k: v for k, v in source.splits.items() if k != "train"}, stream=stream)


def take(rows: pa.Table, ids: Sequence[int] | np.ndarray) -> pa.Table:
    return rows.take(to_array(ids, pa.int64()))


def split_word(name: str) -> str:
    """The last word in a path that names a split; `train` where none does."""
    words = SPLIT_WORD.findall(name)
    return words[-1].lower() if words else "train"


def choose_splits(words: Iterable[str]) -> dict[str, str]:
    """Which of the splits in a source become `train`, `val` and `test`; of two names for one, the first in `SPLITS`."""
    there = set(words)
    chosen = {split: next((name for name in names if name in there), None) for split, names in SPLITS.items()}
    return {word: split for split, word in chosen.items() if word is not None}


def key_of(*parts: str) -> str:
    """A sample's key from a class id and a file's stem, say. What a key cannot hold becomes '_'; a key so changed, or
    cut, ends in a digest of what it was, so that different names stay different.
    """
    given = "/".join(parts)
    clean = "/".join(re.sub(r"[^A-Za-z0-9_-]", "_", part) or "_" for part in given.split("/"))
    if clean == given and len(clean) <= KEY_LENGTH:
        return clean
    digest = hashlib.blake2b(given.encode(errors="surrogateescape"), digest_size=5).hexdigest()
    return f"{clean[: KEY_LENGTH - len(digest) - 1].rstrip('/')}-{digest}"


def checked(source: Source) -> Source:
    """`source`, if it can become a dataset, each sample of a split with a key of its own; `DataError` for no samples or no
    classes.
    """
    if not source.classes or not source.samples:
        raise DataError(
            f"{source.description} holds no images that can be used{reasons(source.notes)}; check the address"
        )
    return replace(source, splits={split: _distinct(rows) for split, rows in source.splits.items()})


def reasons(notes: Sequence[Note], most: int = 5) -> str:
    """Why what is left out or ignored is: the causes, most frequent first, each with an example."""
    causes = Counter(note.cause for note in notes if note.what in ("left out", "ignored"))
    example = {note.cause: note.origin for note in reversed(notes)}
    told = [f"{count} x {cause} ({example[cause]})" for cause, count in causes.most_common(most)]
    return f": {'; '.join(told)}" if told else ""


def _distinct(rows: pa.Table) -> pa.Table:
    """`rows`, of which those that share a key (a.jpg beside a.png, one name in two tars) get others, but for the first."""
    if pc.count_distinct(rows["key"]).as_py() == rows.num_rows:
        return rows
    seen, keys = Counter[str](), list[str]()
    for key in rows["key"].to_pylist():
        seen[key] += 1
        keys.append(key if seen[key] == 1 else key_of(f"{key}~{seen[key]}"))
    return rows.set_column(rows.schema.get_field_index("key"), ROWS.field("key"), to_array(keys, pa.string()))


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


def to_classes(ids: Sequence[str], names: dict[str, str] | None = None) -> tuple[ClassInfo, ...]:
    classes = tuple(ClassInfo(id, (names or {}).get(id, id)) for id in ids)
    for entry in classes:
        if UNPRINTABLE.search(entry.id + entry.name):
            raise DataError(f"the class {entry.id!r} has a name that cannot be printed; rename it")
    return classes


def report_json(notes: Iterable[Note], reencoded: int) -> bytes:
    """`report.json`: every file and sample that is not in the dataset as it is in the source, and why."""
    rows = [vars(note) for note in sorted(notes, key=lambda note: (note.what, note.split, note.origin, note.cause))]
    content = {"reencoded": reencoded, "samples": rows}
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
