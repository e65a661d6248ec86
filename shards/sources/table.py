"""Folders of images with a table beside them: `labels.csv` with a column for the file and one for the label."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from shards.sources.base import Source, Wanted
from shards.sources.imagefolder import walk
from shards.sources.labels import classes_of, label_text
from shards.sources.names import IMAGE_SUFFIXES, SPLITS, choose_splits, split_word
from shards.sources.scan import SplitScan, scan
from shards.sources.splits import from_scans, relabelled
from wds_train.errors import DataError, UsageError

SUFFIXES = (".csv", ".tsv")
FILE_COLUMNS = (
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "path",
    "image",
    "image_path",
    "image_name",
    "image_id",
    "imageid",
    "img",
    "img_path",
    "img_name",
    "id",
    "name",
)
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "classname", "category", "target", "species", "breed")
SPLIT_COLUMNS = ("split", "set", "subset", "fold", "data set", "dataset")


def tables(root: Path) -> list[Path]:
    """The tables in the folder `root`."""
    return [Path(entry.path) for entry in scan(root) if entry.name.lower().endswith(SUFFIXES) and entry.is_file()]


def table(root: Path, wanted: Wanted) -> Source:
    """The images below `root` that its tables name. A table is of the split that its name or a column says, else of train."""
    images, scans, labels = _Images(root), {split: SplitScan(split) for split in SPLITS}, dict[str, int]()
    paths, unusable = tables(root), []
    for path in paths:
        try:
            rows = _rows(path, wanted)
        except UsageError as error:
            if len(paths) == 1 or wanted.image or wanted.label:
                raise
            unusable.append((path, str(error)))
            continue
        scans["train"].stamp.add(path.name, path.stat())
        _add(rows, path, images, scans, labels)
    if len(unusable) == len(paths):
        raise UsageError(unusable[0][1])
    for path, cause in unusable:
        scans["train"].note(path, "ignored", cause)
    if count := images.unnamed():
        scans["train"].note(root, "ignored", f"{count} images that no table names")
    found = [each for each in scans.values() if each.rows.table().num_rows or each.notes]
    samples = sum(each.rows.table().num_rows for each in found)
    classes, numbers = classes_of(labels, samples, str(root))
    if len(classes) == 1:
        raise DataError(f"the tables of {root} know one label, {classes[0].id!r}: there is nothing to tell apart")
    source = from_scans(f"table {root.name}", classes, found)
    return relabelled(source, np.array([numbers[text] for text in labels], np.int32))


def _add(
    rows: Iterator[tuple[str, str, str]],
    path: Path,
    images: "_Images",
    scans: dict[str, SplitScan],
    labels: dict[str, int],
) -> None:
    for number, (name, label, word) in enumerate(rows, 2):
        split = choose_splits([word.lower()]).get(word.lower()) if word else None
        found = scans[split or next(iter(choose_splits([split_word(path.stem)]).values()))]
        origin = f"{path}, line {number}: {name}"
        try:
            image = images.find(name, path.stem)
            text = label_text(label)
        except DataError as error:
            found.note(origin, "ignored" if found.split == "test" and not label.strip() else "left out", str(error))
            continue
        found.add_file(labels.setdefault(text, len(labels)), image, image.relative_to(images.root).as_posix())


class _Images:
    """The image files below `root`, found by path, name or stem."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._named: set[Path] = set()
        self._places: dict[str, list[Path]] = {}
        self._small: dict[
            str, list[Path]
        ] = {}  # by the same in small letters: a table of Windows' says img_1.jpg for IMG_1.JPG
        self._files = [path for path, _ in walk(root, "") if path.suffix.lower() in IMAGE_SUFFIXES]
        for path in self._files:
            place = path.relative_to(root)
            ends = ["/".join(place.parts[start:]) for start in range(len(place.parts))]
            for name in dict.fromkeys([*ends, *(end.removesuffix(path.suffix) for end in ends)]):
                self._places.setdefault(name, []).append(path)
            for name in {end.lower() for end in ends}:
                self._small.setdefault(name, []).append(path)

    def find(self, name: str, table: str) -> Path:
        """The image that the table `table` calls `name`: of train.csv, first what lies in train/. `DataError` when there is
        none, or several.
        """
        parts = Path(name.strip().replace("\\", "/")).parts
        ends = [
            "/".join(parts[start:]) for start in range(len(parts))
        ]  # the path may have been right where it was made
        ends = [*(f"{table}/{end}" for end in ends), *ends]
        for places in [
            *(self._places.get(end, []) for end in ends),
            *(self._small.get(end.lower(), []) for end in ends),
        ]:
            if len(places) > 1:
                raise DataError(f"it may be {places[0]} or {places[1]}; write its folder, too")
            if places:
                self._named.add(places[0])
                return places[0]
        raise DataError("there is no such image")

    def unnamed(self) -> int:
        """How many images no table named."""
        return len(self._files) - len(self._named)


def _rows(path: Path, wanted: Wanted) -> Iterator[tuple[str, str, str]]:
    """Yields (file, label, split or '') of every row; `UsageError` when the columns cannot be told."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    names = [name.strip() for name in next(reader, [])]
    image, label = _column(names, wanted.image, FILE_COLUMNS), _column(names, wanted.label, LABEL_COLUMNS)
    if label is None and wanted.label is None and image is not None and len(names) == 2:
        label = 1 - image
    for column, flag in ((image, "--image-column"), (label, "--label-column")):
        if column is None or image == label:
            raise UsageError(f"{path} has the columns {', '.join(names) or '(none)'}; say which one it is: {flag} NAME")
    assert image is not None and label is not None
    split = next((n for n, name in enumerate(names) if name.lower() in SPLIT_COLUMNS), None)

    def rows() -> Iterator[tuple[str, str, str]]:
        try:
            for row in reader:
                if any(cell.strip() for cell in row):
                    cells = [*row, *[""] * (len(names) - len(row))]
                    yield cells[image], cells[label], "" if split is None else cells[split].strip()
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}, cannot be read: {error}") from error

    return rows()


def _column(names: Sequence[str], wanted: str | None, usual: Sequence[str]) -> int | None:
    small = [name.lower() for name in names]
    known = [wanted.lower()] if wanted is not None else usual
    return next((small.index(name) for name in known if name in small), None)
