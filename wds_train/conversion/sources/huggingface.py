"""Hugging Face datasets: a stream of the hub, a folder of `save_to_disk`, Parquet or arrow files.

Images are the encoded bytes of the Image feature ({"bytes", "path"}; huggingface.co/docs/datasets,
"Image"), never decoded. Arrow files hold them uncompressed, so a sample is a place in the file.
Parquet compresses pages, so it is read as a stream, and the images go through a spool.
"""

import contextlib
import functools
import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wds_train.conversion.conversion_report import Note
from wds_train.conversion.sources.labels import (
    NO_LABEL,
    NO_TEXT,
    Classes,
    classes_of,
    label_text,
    to_classes,
)
from wds_train.conversion.sources.names import (
    SPLIT_FOLDER,
    SPLIT_OF,
    SPLIT_WORD,
    SPLITS,
    choose_splits,
    file_splits,
    in_any_case,
    unknown_split,
)
from wds_train.conversion.sources.scan import SplitScan
from wds_train.conversion.sources.sequential import Item, spool_items
from wds_train.conversion.sources.source import ANYTHING, Grouping, Source, Understood, Wanted
from wds_train.conversion.sources.splits import from_scans
from wds_train.conversion.sources.spool import Spool
from wds_train.conversion.sources.table import find_split_column
from wds_train.conversion.sources.tables import Table
from wds_train.errors import AccessDenied, DataError, UsageError

# Usual names, the most usual first.
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
ODD_LABEL = -2  # for a value that is no label of any class
FEW_SPLITS = 12  # a column with more different cells in its first rows is not that of the splits
BATCH_ROWS = 256  # rows of Parquet in memory at a time, with their images
MAX_SHOWN = 100  # characters of a list of classes in a message


class DataFile(NamedTuple):
    """A file of rows.

    Attributes:
        split: The split that its name says. Its rows may say another one.
        path: The file.
    """

    split: str
    path: Path


@dataclass(frozen=True)
class Columns:
    """The columns that are read.

    Attributes:
        image: The column of the images.
        label: The column of the labels.
        names: The labels' names in their order, if the features say.
        split: The column of the splits; None if the files' names say them.
        splits: The split that each cell of `split` means.
        doubtful: Other columns that may be the image or the label, a sentence each.
    """

    image: str
    label: str
    names: list[str] | None
    split: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    doubtful: tuple[str, ...] = ()

    @property
    def read(self) -> list[str]:
        """The columns that are read for a sample."""
        return self.with_split(self.image, self.label)

    def with_split(self, *columns: str) -> list[str]:
        """Return the columns, and that of the splits, if there is one."""
        if self.split:
            return [*columns, self.split]
        return [*columns]

    def split_of(self, batch: pa.RecordBatch, of_file: str) -> list[str]:
        """Return the split of each row of `batch`; `of_file` if the row does not say one."""
        if self.split is None:
            return [of_file] * batch.num_rows
        cells = batch[self.split].to_pylist()
        return [self.splits.get(str(cell).strip(), of_file) for cell in cells]


def find_columns(features: dict[str, Any], where: str, wanted: Wanted) -> Columns:
    """Find the columns of images and labels.

    Args:
        features: The features of `datasets` as JSON: name -> {"_type": ...}.
        where: The source, for messages.
        wanted: The flags that may name them.

    Raises:
        DataError: No column may be the image, or the label.
        UsageError: Several may be.
    """
    # Collect the columns of a telling type.
    kinds = {}
    images = []
    of_class = []
    for name, feature in features.items():
        kind = None
        if isinstance(feature, dict):
            kind = feature.get("_type")
        kinds[name] = kind
        if kind == "Image":
            images.append(name)
        if kind == "ClassLabel":
            of_class.append(name)

    # A flag decides; else columns of a usual name may be meant, too.
    images = images or _present(IMAGE_COLUMNS, kinds)
    labels = _present(LABEL_COLUMNS, kinds) or of_class
    if wanted.image:
        images = _present([wanted.image], kinds)
    if wanted.label:
        labels = _present([wanted.label], kinds)

    # The first of several is taken if its name is usual, and the others are mentioned.
    doubtful = []
    if wanted.image is None:
        doubtful += _doubts(images, images[1:], where, IMAGE_COLUMNS, "--image-column")
    if wanted.label is None:
        others = [name for name in of_class if name not in labels[:1]]
        doubtful += _doubts(labels, others, where, LABEL_COLUMNS, "--label-column")

    if not images or not labels:
        raise DataError(
            f"{where} has the columns {', '.join(kinds)}; an image and a label column are needed: "
            "name them with --image-column and --label-column"
        )
    label = labels[0]
    names = None
    if kinds[label] == "ClassLabel":
        names = _class_names(features[label], label, where)
    return Columns(images[0], label, names, doubtful=tuple(doubtful))


def _present(names: Iterable[str], columns: Collection[str]) -> list[str]:
    """Return those of `names` that are columns."""
    return [name for name in names if name in columns]


def _class_names(feature: dict[str, Any], label: str, where: str) -> list[str] | None:
    """Return the names of the classes that the feature of the column `label` gives."""
    names = feature.get("names")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"{where}: the names of the classes of {label!r} are no list of texts; "
            "write the file again"
        )
    return names


def _doubts(
    found: list[str], others: list[str], where: str, usual: Sequence[str], flag: str
) -> list[str]:
    """Return a sentence about `others` that may be meant instead of the first of `found`, if any.

    Args:
        found: The columns, of which the first is taken.
        others: The others.
        where: The source, for the message.
        usual: The usual names of such a column.
        flag: The flag that chooses another one.

    Raises:
        UsageError: The first is called by no usual name.
    """
    if not found or not others:
        return []
    if found[0] not in usual:
        raise UsageError(
            f"{where} has the columns {', '.join([found[0], *others])}; "
            f"say which one it is: {flag} {found[0]}"
        )
    return [f"{found[0]!r} is read; {', '.join(others)} may be meant as well: {flag} NAME"]


def open_files(root: Path, spool: Spool, wanted: Wanted) -> Source:
    """Open arrow or Parquet files.

    Args:
        root: A folder that holds them, or one file.
        spool: Keeps the images of Parquet files.
        wanted: The flags that a person gave.

    Raises:
        UsageError: There are no such files, or those of several data sets.
        DataError: Their columns cannot be used.
    """
    # Understand the files.
    files, unused = _find_files(root, wanted)
    columns = _check_columns(root, files, wanted)
    classes = _find_classes(columns, files, str(root), wanted)
    is_arrow = files[0].path.suffix == ".arrow"
    kind = "arrow" if is_arrow else "Parquet"
    splits = "the files' names"
    if columns.split:
        splits = f"the column {columns.split!r}"
    understood = Understood(
        layout=f"{kind} files with images in the column {columns.image!r}; splits by {splits}",
        labels=f"the column {columns.label!r}",
        said=classes.said,
        doubtful=list(columns.doubtful),
    )

    # Read the rows; the images of Parquet files come later, as a stream.
    description = f"huggingface {root.name}"
    if is_arrow:
        scans = _scan_all(files, columns, classes)
        source = from_scans(description, classes.infos, scans, understood)
    else:
        read = functools.partial(_parquet_items, files, columns, classes)
        source = spool_items(description, classes.infos, read, spool)
    notes = list(source.notes)
    for path, cause in unused:
        notes.append(Note("", str(path), "ignored", cause))
    source = replace(source, understood=understood, notes=notes)
    return _with_groups(source, columns, files, wanted)


def _with_groups(
    source: Source, columns: Columns, files: Sequence[DataFile], wanted: Wanted
) -> Source:
    """Return the source with the groups of the column that --group names.

    Without such a column --group is a pattern, and the source stays as it is.
    """
    group = in_any_case(wanted.group or "", _features(files[0].path))
    if group is None:
        return source
    # Keys are numbers in a split; only samples of train are held out.
    groups: dict[str, str] = {}
    number = 0
    for of_file, path in files:
        for batch in _batches(path, columns.with_split(group)):
            values = batch[group].to_pylist()
            splits = columns.split_of(batch, of_file)
            for value, split in zip(values, splits, strict=True):
                if split == "train":
                    groups[f"{number:08d}"] = str(value)
                    number += 1
    return replace(source, grouping=Grouping(group, groups))


def _find_files(root: Path, wanted: Wanted) -> tuple[list[DataFile], list[tuple[Path, str]]]:
    """Find the data files: arrow files, or Parquet files if there are no arrow files.

    Returns:
        The files, in the order of their splits and names; and (path, cause) of those that are not
        used.

    Raises:
        UsageError: There are none, or those of several data sets.
    """
    # Arrow files come first: their images need no spool.
    names = _data_files(root, ".arrow") or _data_files(root, ".parquet")
    if not names:
        raise UsageError(f"{root} holds neither .arrow nor .parquet files")
    _refuse_several_sets([*names], root)
    used, unused = file_splits([*names], wanted.splits, str(root))
    files = []
    for name, split in used.items():
        files.append(DataFile(split, names[name]))
    left_out = []
    for name, cause in unused.items():
        left_out.append((names[name], cause))
    return sorted(files), left_out


def _data_files(root: Path, suffix: str) -> dict[str, Path]:
    """Return the data files with a suffix: name below `root` -> path, sorted."""
    found = {}
    if root.is_file() and root.suffix == suffix:
        found[root.name] = root
    for path in sorted(root.rglob(f"*{suffix}")):
        # A file called .parquet has no suffix.
        if path.suffix == suffix and _is_data(path):
            found[path.relative_to(root).as_posix()] = path
    return found


def _refuse_several_sets(names: Sequence[str], root: Path) -> None:
    """Raise `UsageError` for files of several data sets, or configurations of one.

    An example is full/train-... and tiny/train-...
    """
    # Collect the folders that hold files of each split.
    sets: dict[str, set[str]] = {}
    for name in names:
        words = SPLIT_WORD.findall(name)
        if words:
            sets.setdefault(words[-1].lower(), set()).add(_folder_of_set(name))

    for found in sets.values():
        if len(found) > 1:
            several = sorted(found)
            shown = ", ".join(place or "." for place in several)
            raise UsageError(
                f"{root} holds several data sets: {shown}; "
                f"give the path of one: {root / several[-1]}"
            )


def _folder_of_set(name: str) -> str:
    """Return the folder of a file, without the parts that say its split."""
    folders = name.split("/")[:-1]
    return "/".join(part for part in folders if not SPLIT_FOLDER.fullmatch(part))


def _is_data(path: Path) -> bool:
    """Return True if a file is data.

    `save_to_disk` leaves results of `map` in the same folder; its state.json names the data.
    """
    state = path.with_name("state.json")
    if not state.is_file():
        return True
    files = json.loads(state.read_text())["_data_files"]
    return path.name in {file["filename"] for file in files}


def _check_columns(root: Path, files: Sequence[DataFile], wanted: Wanted) -> Columns:
    """Find the columns, and check that their types can be used and all files agree.

    Raises:
        DataError: A column's type cannot be used, or the files differ.
        UsageError: Several columns may be meant.
    """
    path = files[0].path
    # The first file stands for all; they are compared below.
    schema = _read_schema(path)
    columns = find_columns(_features(path), str(root), wanted)
    image = schema.field(columns.image).type
    if not _holds_bytes(image):
        raise DataError(
            f"{path}: the column {columns.image!r} holds {image}; encoded images (bytes) are needed"
        )
    label = schema.field(columns.label).type
    if not _holds_labels(label):
        raise DataError(
            f"{path}: the column {columns.label!r} holds {label}; "
            "a name or a whole number is needed"
        )

    # Types alone do not say it: bytes may be missing, and other files may differ.
    _refuse_paths(columns, path)
    _refuse_other_columns(columns, files)
    return _with_splits(columns, schema, files, wanted)


def _read_schema(path: Path) -> pa.Schema:
    with _reading(path):
        if path.suffix == ".parquet":
            return pq.read_schema(path)
        for batch in _arrow_batches(_mapped(path)):
            return batch.schema
    raise DataError(f"{path} holds no rows; remove it, or write it again")


def _features(path: Path) -> dict[str, Any]:
    """Return the columns of a file.

    Returns:
        Name -> its feature as `datasets` writes it; {} if there is none.
    """
    schema = _read_schema(path)
    features = _written_features(schema)
    return {name: features.get(name, {}) for name in schema.names}


def _written_features(schema: pa.Schema) -> dict[str, Any]:
    """Return the features in a file's metadata; {} if `datasets` did not write the file."""
    try:
        written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = written.get("info", {}).get("features", {})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    return features


def _refuse_other_columns(columns: Columns, files: Sequence[DataFile]) -> None:
    """Raise `DataError` for files that differ in the columns, or in the names of the classes."""
    first = files[0].path
    for _, path in files:
        features = _features(path)
        for name in (columns.image, columns.label):
            if name not in features:
                raise DataError(
                    f"{path} has no column {name!r}, which {first} has; "
                    "give files of one form, one after the other"
                )

        # Labels are places in the list of names, so all lists must be one.
        feature = features[columns.label]
        names = None
        if isinstance(feature, dict):
            names = feature.get("names")
        if columns.names is not None and names != columns.names:
            mine = ", ".join(map(str, names or ()))[:MAX_SHOWN]
            theirs = ", ".join(columns.names)[:MAX_SHOWN]
            raise DataError(
                f"{path} names the classes {mine}, and {first} {theirs}: "
                "a number would be two classes; write the files again with one list"
            )


def _refuse_paths(columns: Columns, path: Path) -> None:
    """Raise `DataError` for images that are paths of files elsewhere, and no bytes."""
    example = None
    for image in _first_cells(path, columns.image) or ():
        if not isinstance(image, dict) or image.get("bytes"):
            return
        example = example or image.get("path")
    if example:
        raise DataError(
            f"{path}: the column {columns.image!r} holds paths such as {example}, and no bytes; "
            "embed the images, or give the folder of the files and a table with their labels"
        )


def _first_cells(path: Path, column: str) -> list[Any] | None:
    """Return the first cells of a column; None if the file has no rows."""
    batch = next(_batches(path, [column]), None)
    if batch is None:
        return None
    return batch[column].to_pylist()


def _with_splits(
    columns: Columns, schema: pa.Schema, files: Sequence[DataFile], wanted: Wanted
) -> Columns:
    """Return the columns with that of the splits, if there is one.

    Args:
        columns: The columns of images and labels.
        schema: The columns of the first file.
        files: The files.
        wanted: The flags, which may name the column.
    """
    path = files[0].path

    # Columns of a few different values may be it.
    few = []
    for name in schema.names:
        if name in (columns.image, columns.label) or not _holds_labels(schema.field(name).type):
            continue
        cells = _first_cells(path, name)
        if cells is not None and len(set(cells)) <= FEW_SPLITS:
            few.append(name)
    if not few and wanted.split is None:
        return columns

    # The values decide, as in a table.
    lines = []
    for _, each in files:
        for batch in _batches(each, few):
            for number, row in enumerate(batch.to_pylist()):
                lines.append((number, list(row.values())))
    name, splits, said = find_split_column(Table(path, few, lines), (), wanted)
    return replace(columns, split=name, splits=splits, doubtful=(*columns.doubtful, *said))


def _holds_bytes(kind: pa.DataType) -> bool:
    """Return True if a column of this type holds encoded images."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind)


def _holds_labels(kind: pa.DataType) -> bool:
    """Return True if a column of this type may hold labels."""
    if pa.types.is_dictionary(kind):
        return _holds_labels(kind.value_type)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return is_number or is_text or pa.types.is_boolean(kind)


def _find_classes(
    columns: Columns, files: Sequence[DataFile], where: str, wanted: Wanted
) -> Classes:
    """Return the feature's names as classes; if there are none, those of the labels that occur."""
    if columns.names is not None:
        return _named_classes(columns.names, wanted)
    counts: dict[str, int] = {}
    for _, path in files:
        for batch in _batches(path, [columns.label]):
            _refuse_fractions(batch[columns.label], columns.label, path)
            # A few different labels in many rows: read the text of each once.
            for value, count in Counter(batch[columns.label].to_pylist()).items():
                with contextlib.suppress(DataError):  # noted later, with its sample
                    text = label_text(value)
                    counts[text] = counts.get(text, 0) + count
    return classes_of(counts, where, wanted.labels)


def _refuse_fractions(cells: pa.Array, name: str, path: Path) -> None:
    """Raise `DataError` for labels that are numbers with a fraction.

    Floats without one are accepted: a gap in a column of whole numbers makes floats of all.
    """
    if not pa.types.is_floating(cells.type):
        return
    for cell in cells.to_pylist():
        is_gap = cell is None or math.isnan(cell)
        if not is_gap and not cell.is_integer():
            raise DataError(
                f"{path}: the column {name!r} holds {cells.type}, such as {cell}; "
                "a name or a whole number is needed"
            )


def _named_classes(names: Sequence[str], wanted: Wanted) -> Classes:
    """Return the classes that a feature names, whose labels are places in `names`."""
    numbers: dict[str, int] = {}
    if wanted.labels.classes:
        found = classes_of(dict.fromkeys(names, 1), "the features", wanted.labels, sure=True)
        for label, name in enumerate(names):
            numbers[str(label)] = found.numbers[name]
    else:
        found = Classes(to_classes(names), {})
        for label in range(len(names)):
            numbers[str(label)] = label
    # Hugging Face marks test images with the label -1.
    numbers |= {NO_TEXT: NO_LABEL, str(NO_LABEL): NO_LABEL}
    return replace(found, numbers=numbers)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise errors of reading `path` as ours."""
    try:
        yield
    except PermissionError as error:
        raise AccessDenied(f"no permission to read {path}; check its owner and mode") from error
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}; download or write it again") from error


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a file with some of its columns."""
    with _reading(path):
        if path.suffix == ".arrow":
            for batch in _arrow_batches(_mapped(path)):
                yield batch.select(columns)
        else:
            yield from pq.ParquetFile(path).iter_batches(batch_size=BATCH_ROWS, columns=columns)


def _arrow_batches(whole: pa.Buffer) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a mapped arrow file, in either of the two IPC formats.

    Their buffers point into `whole`.
    """
    # `datasets` writes streams; other programs write files.
    try:
        reader = pa.ipc.open_stream(whole)
    except pa.ArrowInvalid:
        file = pa.ipc.open_file(whole)
        for number in range(file.num_record_batches):
            yield file.get_batch(number)
    else:
        yield from reader


def _mapped(path: Path) -> pa.Buffer:
    # Mapped, not read: a file may be larger than memory, and only places in it are needed.
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def _label(value: Any, classes: Classes) -> int:
    """Return the label's number.

    It is `NO_LABEL` for a missing one, as Hugging Face marks test images; and for a value that is
    no class, a number that no class has.
    """
    try:
        text = label_text(value)
    except DataError:
        return ODD_LABEL
    if text in classes.numbers:
        return classes.numbers[text]
    # The note about this sample shows the number.
    if isinstance(value, int):
        return value
    return ODD_LABEL


def _parquet_items(files: Sequence[DataFile], columns: Columns, classes: Classes) -> Iterator[Item]:
    """Yield the samples of Parquet files, called by their numbers in their splits."""
    counts: Counter[str] = Counter()
    for of_file, path in files:
        for batch in _batches(path, columns.read):
            images = batch[columns.image].to_pylist()
            labels = batch[columns.label].to_pylist()
            splits = columns.split_of(batch, of_file)
            for image, label, split in zip(images, labels, splits, strict=True):
                if split in SPLITS:
                    name = f"{counts[split]:08d}"
                    yield Item(split, name, _label(label, classes), _image_bytes(image))
                    counts[split] += 1


def _image_bytes(image: Any) -> bytes:
    """Return the encoded bytes of a cell; none if it holds none."""
    if isinstance(image, dict):
        image = image.get("bytes")
    return image or b""


def _scan_all(files: Sequence[DataFile], columns: Columns, classes: Classes) -> list[SplitScan]:
    """Scan arrow files: one scan for each split that a file or a row may have."""
    scans: dict[str, SplitScan] = {}
    for file in files:
        scans.setdefault(file.split, SplitScan(file.split))
    for split in columns.splits.values():
        if split in SPLITS:
            scans.setdefault(split, SplitScan(split))
    for file in files:
        _scan_arrow(scans, file, columns, classes)
    return [*scans.values()]


def _scan_arrow(
    scans: Mapping[str, SplitScan], file: DataFile, columns: Columns, classes: Classes
) -> None:
    """Add every row of an arrow file, with the place of its image in the file.

    Args:
        scans: Get the rows, by split.
        file: The file.
        columns: Its columns.
        classes: The classes.
    """
    path = file.path
    scans[file.split].stamp.add(path.name, path.stat())
    with _reading(path):
        whole = _mapped(path)
        for batch in _arrow_batches(whole):
            values = batch[columns.label].to_pylist()
            places = _places(batch[columns.image], whole, path)
            splits = columns.split_of(batch, file.split)
            for value, (offset, length), split in zip(values, places, splits, strict=True):
                if split not in SPLITS:
                    continue
                # Every row counts, used or not, as in the names of Parquet's samples.
                found = scans[split]
                name = f"{found.seen:08d}"
                found.seen += 1
                label = _label(value, classes)
                if not 0 <= label < len(classes.infos):
                    found.note_label(f"{path}: row {name}", label, len(classes.infos))
                elif length == 0:
                    found.note(f"{path}: row {name}", "left out", "zero bytes")
                else:
                    found.rows.add(name, label, str(path), offset, length)


def _places(column: pa.Array, whole: pa.Buffer, path: Path) -> list[tuple[int, int]]:
    """Return the places of all images of a batch in the file.

    Args:
        column: The images of the batch.
        whole: The mapped file, which the batch points into.
        path: The file, for messages.

    Returns:
        (offset, length) of each image, bytes.

    Raises:
        DataError: The images are compressed, or of a type that is not read.
    """
    binary = column
    if pa.types.is_struct(column.type):
        binary = column.field("bytes")
    width = {pa.binary(): np.int32, pa.large_binary(): np.int64}.get(binary.type)
    if width is None:
        raise DataError(f"{path} has images of type {binary.type}; encoded bytes are needed")

    # Image n lies between the offsets n and n + 1 of the batch's buffer.
    _, offsets, data = binary.buffers()
    rows = slice(binary.offset, binary.offset + len(binary) + 1)
    bounds = np.frombuffer(offsets, width)[rows].astype(np.int64)
    start = data.address - whole.address if data else 0
    # A compressed buffer was unpacked to memory outside the file.
    if not 0 <= start <= whole.size:
        raise DataError(f"{path} is compressed inside; save it without compression, or as Parquet")
    begins = (start + bounds[:-1]).tolist()
    return list(zip(begins, np.diff(bounds).tolist(), strict=True))


def open_hub(name: str, spool: Spool, wanted: Wanted) -> Source:
    """Open a dataset of the Hugging Face hub as a stream.

    Args:
        name: ID or ID:CONFIG; $HF_TOKEN opens gated ones.
        spool: Keeps the images.
        wanted: The flags that a person gave.

    Raises:
        UsageError: The package `datasets` is missing, or the splits cannot be understood.
        DataError: The dataset cannot be opened, or does not name its classes.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            "hf:... needs the package `datasets`; install it: .venv/bin/uv pip install datasets"
        ) from error

    dataset, _, config = name.partition(":")
    try:
        token = os.environ.get("HF_TOKEN")
        splits = datasets.load_dataset(dataset, config or None, streaming=True, token=token)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"the hub's dataset {dataset!r} cannot be opened: {str(error)[:300]}; is HF_TOKEN set?"
        ) from error
    return from_iterable(name, splits, spool, wanted)


def from_iterable(name: str, splits: Any, spool: Spool, wanted: Wanted = ANYTHING) -> Source:
    """Make the source of a stream.

    Args:
        name: The dataset, for messages.
        splits: Split name -> a `datasets.IterableDataset`.
        spool: Keeps the images.
        wanted: The flags that a person gave.

    Raises:
        UsageError: The splits cannot be understood.
        DataError: The dataset does not say its features, or does not name its classes.
    """
    chosen = _choose_streams(name, splits, wanted)

    # Find the columns and classes.
    first = splits[next(iter(chosen))]
    if first.features is None:
        raise DataError(f"{name} does not say its features; give its Parquet files instead")
    columns = find_columns(first.features.to_dict(), name, wanted)
    if columns.names is None:
        raise DataError(f"{name} does not name its classes; give its Parquet files instead")
    classes = _named_classes(columns.names, wanted)

    # Say how the stream is read.
    doubtful = [*columns.doubtful]
    for word in splits:
        if word not in chosen:
            doubtful.append(f"the split {word!r} is not used")
    understood = Understood(
        layout=f"a stream of the hub with images in the column {columns.image!r}; "
        f"splits {', '.join(chosen)}",
        labels=f"the column {columns.label!r}",
        said=classes.said,
        doubtful=doubtful,
    )
    read = functools.partial(_stream_items, splits, chosen, columns, classes)
    source = spool_items(f"huggingface {name}", classes.infos, read, spool)
    return replace(source, understood=understood)


def _choose_streams(name: str, splits: Collection[str], wanted: Wanted) -> dict[str, str]:
    """Return the split names of a hub's dataset that are used, and the split of each.

    Raises:
        UsageError: A name is not known, or there is none to train on.
    """
    # A word that nobody knows may be test images, which must not be trained on.
    for word in splits:
        if word.lower() not in SPLIT_OF and word.lower() not in wanted.splits:
            raise unknown_split(word, name)
    meanings = choose_splits(splits)
    for word in splits:
        said = wanted.splits.get(word.lower())
        if said is not None:
            meanings[word] = said

    # --split WORD=none leaves a split out.
    chosen = {}
    for word, split in meanings.items():
        if split in SPLITS:
            chosen[word] = split
    if not chosen:
        raise UsageError(
            f"{name} has the splits {', '.join(splits)}, and none to train on; "
            "say which is: --split WORD=train"
        )
    return chosen


def _stream_items(
    splits: Any, chosen: Mapping[str, str], columns: Columns, classes: Classes
) -> Iterator[Item]:
    """Yield the samples of a hub's stream, called by their numbers in their splits."""
    import datasets

    for word, split in chosen.items():
        # The encoded bytes: decoding would cost time, and the JPEG's own quality.
        rows = splits[word].cast_column(columns.image, datasets.Image(decode=False))
        for number, row in enumerate(rows):
            label = _label(row[columns.label], classes)
            yield Item(split, f"{number:08d}", label, _image_bytes(row[columns.image]))
