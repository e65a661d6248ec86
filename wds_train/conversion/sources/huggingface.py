"""Read Hugging Face datasets: a hub's stream, a folder of `save_to_disk`, Parquet or arrow files.

Images are the encoded bytes of the Image feature ({"bytes", "path"}; huggingface.co/docs/datasets,
"Image"), never decoded. Arrow files hold them uncompressed, so a sample is a place in the file;
Parquet compresses pages, so it is read as a stream.
"""

import contextlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
ODD_LABEL = -2  # for a value that is no label of any class
FEW_SPLITS = 12  # a column with more different cells in its first rows is not that of the splits
PLAIN_TYPES = (
    pa.types.is_integer,
    pa.types.is_boolean,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_floating,
)
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")


@dataclass(frozen=True)
class Columns:
    """The columns that are read.

    Attributes:
        image: The column of the images.
        label: The column of the labels.
        names: The labels' names in their order, if the features say.
        split: The column of the splits; None where the files' names say them.
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
        columns = [self.image, self.label]
        return [*columns, self.split] if self.split else columns

    def split_of(self, batch: pa.RecordBatch, of_file: str) -> list[str]:
        """Return the split of each row of `batch`; `of_file` where the row does not say one."""
        if self.split is None:
            return [of_file] * batch.num_rows
        return [
            self.splits.get(str(cell).strip(), of_file) for cell in batch[self.split].to_pylist()
        ]


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
    kinds = {}
    for name, feature in features.items():
        kinds[name] = feature.get("_type") if isinstance(feature, dict) else None
    of_class = [name for name, kind in kinds.items() if kind == "ClassLabel"]

    # Collect what may be meant: columns of a telling type, and those of a usual name.
    images = [name for name, kind in kinds.items() if kind == "Image"]
    if not images:
        images = [name for name in IMAGE_COLUMNS if name in kinds]
    labels = [name for name in LABEL_COLUMNS if name in kinds] or of_class
    if wanted.image:
        images = [wanted.image] if wanted.image in kinds else []
    if wanted.label:
        labels = [wanted.label] if wanted.label in kinds else []

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
    names = features[label].get("names") if kinds[label] == "ClassLabel" else None
    if names is not None:
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not texts:
            raise DataError(
                f"{where}: the names of the classes of {label!r} are no list of texts; "
                "write the file again"
            )
    return Columns(images[0], label, names, doubtful=tuple(doubtful))


def _doubts(
    found: list[str], others: list[str], where: str, usual: Sequence[str], flag: str
) -> list[str]:
    """Return a sentence about `others` that may be meant instead of the first of `found`, if any.

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
        spool: Where the images of Parquet files are kept.
        wanted: The flags.

    Raises:
        UsageError: There are no such files, or those of several data sets.
        DataError: Their columns cannot be used.
    """
    files, unused = _files(root, wanted)
    columns = _columns(root, files, wanted)
    classes = _classes(columns, files, str(root), wanted)
    is_arrow = files[0][1].suffix == ".arrow"
    kind = "arrow" if is_arrow else "Parquet"
    splits = f"the column {columns.split!r}" if columns.split else "the files' names"
    understood = Understood(
        layout=f"{kind} files with images in the column {columns.image!r}; splits by {splits}",
        labels=f"the column {columns.label!r}",
        said=classes.said,
        doubtful=list(columns.doubtful),
    )

    description = f"huggingface {root.name}"
    if is_arrow:
        scans = {}
        for split in [*(split for split, _ in files), *columns.splits.values()]:
            if split in SPLITS and split not in scans:
                scans[split] = SplitScan(split)
        for split, path in files:
            _scan_arrow(scans, split, path, columns, classes)
        source = from_scans(description, classes.infos, [*scans.values()], understood)
    else:
        source = spool_items(
            description, classes.infos, lambda: _parquet_items(files, columns, classes), spool
        )
    notes = [Note("", str(path), "ignored", cause) for path, cause in unused]
    source = replace(source, understood=understood, notes=[*source.notes, *notes])
    return _grouped(source, columns, files, wanted)


def _grouped(
    source: Source, columns: Columns, files: Sequence[tuple[str, Path]], wanted: Wanted
) -> Source:
    """Return the source with the groups of the column that --group names, if it is one."""
    said = (wanted.group or "").casefold()
    group = next((name for name in _features(files[0][1]) if name.casefold() == said), None)
    if group is None:
        return source
    read = [group, columns.split] if columns.split else [group]
    groups: dict[str, str] = {}
    number = 0  # in `train`
    for of_file, path in files:
        for batch in _batches(path, read):
            values = batch[group].to_pylist()
            splits = columns.split_of(batch, of_file)
            for value, split in zip(values, splits, strict=True):
                if split == "train":
                    groups[f"{number:08d}"] = str(value)
                    number += 1
    return replace(source, grouping=Grouping(group, groups))


def _files(root: Path, wanted: Wanted) -> tuple[list[tuple[str, Path]], list[tuple[Path, str]]]:
    """Find the data files: arrow files, or Parquet files where there are no arrow files.

    Returns:
        (split, path) of every file, in the order of their names; and (path, cause) of those that
        are not used.
    """
    base = root.parent if root.is_file() else root
    for suffix in (".arrow", ".parquet"):
        paths = [root]
        if not root.is_file():
            paths = sorted(path for path in root.rglob(f"*{suffix}") if _is_data(path))
        names = {path.relative_to(base).as_posix(): path for path in paths if path.suffix == suffix}
        if names:
            _refuse_several_sets([*names], root)
            used, unused = file_splits([*names], wanted.splits, str(root))
            files = sorted((split, names[name]) for name, split in used.items())
            return files, [(names[name], cause) for name, cause in unused.items()]
    raise UsageError(f"{root} holds neither .arrow nor .parquet files")


def _refuse_several_sets(names: Sequence[str], root: Path) -> None:
    """Raise `UsageError` for files of several data sets, or configurations of one.

    Such as full/train-... and tiny/train-...
    """
    sets: dict[str, set[str]] = {}
    for name in names:
        parts = name.split("/")
        above = "/".join(part for part in parts[:-1] if not SPLIT_FOLDER.fullmatch(part))
        words = SPLIT_WORD.findall(name)
        sets.setdefault(words[-1].lower() if words else "", set()).add(above)
    for word, found in sets.items():
        if word and len(found) > 1:
            several = sorted(found)
            shown = ", ".join(place or "." for place in several)
            raise UsageError(
                f"{root} holds several data sets: {shown}; "
                f"give the path of one: {root / several[-1]}"
            )


def _is_data(path: Path) -> bool:
    """Return whether a file is data.

    `save_to_disk` leaves results of `map` in the same folder; its state.json names the data.
    """
    state = path.with_name("state.json")
    if not state.is_file():
        return True
    files = json.loads(state.read_text())["_data_files"]
    return path.name in {file["filename"] for file in files}


def _columns(root: Path, files: Sequence[tuple[str, Path]], wanted: Wanted) -> Columns:
    """Find the columns, and see that their types can be used and all files agree."""
    path = files[0][1]
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
    _refuse_paths(columns, path)
    _refuse_other_columns(columns, files)
    return _with_splits(columns, schema, files, wanted)


def _read_schema(path: Path) -> pa.Schema:
    with _reading(path):
        if path.suffix == ".parquet":
            return pq.read_schema(path)
        return next(_arrow_batches(_mapped(path))).schema


def _features(path: Path) -> dict[str, Any]:
    """Return the columns of a file.

    Returns:
        Name -> its feature as `datasets` writes it; {} where there is none.
    """
    schema = _read_schema(path)
    try:
        written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = written.get("info", {}).get("features", {})
        return {name: features.get(name, {}) for name in schema.names}
    except (ValueError, TypeError, AttributeError, RecursionError):
        # Not written by `datasets`: the columns alone count.
        return {name: {} for name in schema.names}


def _refuse_other_columns(columns: Columns, files: Sequence[tuple[str, Path]]) -> None:
    """Raise `DataError` for files that differ in the columns, or in the names of the classes."""
    first = files[0][1]
    for _, path in files:
        features = _features(path)
        missing = [name for name in (columns.image, columns.label) if name not in features]
        if missing:
            raise DataError(
                f"{path} has no column {missing[0]!r}, which {first} has; "
                "give files of one form, one after the other"
            )
        kind = features[columns.label]
        names = kind.get("names") if isinstance(kind, dict) else None
        if columns.names is not None and names != columns.names:
            mine = ", ".join(map(str, names or ()))[:100]
            theirs = ", ".join(columns.names)[:100]
            raise DataError(
                f"{path} names the classes {mine}, and {first} {theirs}: "
                "a number would be two classes; write the files again with one list"
            )


def _refuse_paths(columns: Columns, path: Path) -> None:
    """Raise `DataError` for images that are paths of files elsewhere, and no bytes."""
    first = next(_batches(path, [columns.image]), None)
    images = first[columns.image].to_pylist() if first is not None else []
    paths = []
    for image in images:
        if not isinstance(image, dict) or image.get("bytes"):
            return
        paths.append(image.get("path"))
    example = next(filter(None, paths), None)
    if example is not None:
        raise DataError(
            f"{path}: the column {columns.image!r} holds paths such as {example}, and no bytes; "
            "embed the images, or give the folder of the files and a table with their labels"
        )


def _with_splits(
    columns: Columns, schema: pa.Schema, files: Sequence[tuple[str, Path]], wanted: Wanted
) -> Columns:
    """Return the columns with that of the splits, if there is one."""
    path = files[0][1]

    # Columns of a few different values may be it.
    few = []
    for name in schema.names:
        if name in (columns.image, columns.label) or not _holds_labels(schema.field(name).type):
            continue
        first = next(_batches(path, [name]), None)
        if first is not None and len(set(first[name].to_pylist())) <= FEW_SPLITS:
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
    """Return whether a column of this type holds encoded images."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind)


def _holds_labels(kind: pa.DataType) -> bool:
    """Return whether a column of this type may hold labels."""
    if pa.types.is_dictionary(kind):
        return _holds_labels(kind.value_type)
    return any(is_it(kind) for is_it in PLAIN_TYPES)


def _classes(
    columns: Columns, files: Sequence[tuple[str, Path]], where: str, wanted: Wanted
) -> Classes:
    """Return the feature's names as classes; if there are none, those of the labels that occur."""
    if columns.names is not None:
        return _named_classes(columns.names, wanted)
    counts: dict[str, int] = {}
    for _, path in files:
        for batch in _batches(path, [columns.label]):
            _refuse_fractions(batch[columns.label], columns.label, path)
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
    numbers = [cell for cell in cells.to_pylist() if cell is not None and not math.isnan(cell)]
    odd = next((number for number in numbers if not number.is_integer()), None)
    if odd is not None:
        raise DataError(
            f"{path}: the column {name!r} holds {cells.type}, such as {odd}; "
            "a name or a whole number is needed"
        )


def _named_classes(names: Sequence[str], wanted: Wanted) -> Classes:
    """Return the classes that a feature names, whose labels are places in `names`."""
    if not wanted.labels.classes:
        numbers = {str(label): label for label in range(len(names))}
        return Classes(to_classes(names), numbers | {NO_TEXT: NO_LABEL, str(NO_LABEL): NO_LABEL})
    found = classes_of(dict.fromkeys(names, 1), "the features", wanted.labels, sure=True)
    numbers = {str(label): found.numbers[name] for label, name in enumerate(names)}
    return Classes(found.infos, numbers | {NO_TEXT: NO_LABEL, str(NO_LABEL): NO_LABEL}, found.said)


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
            yield from pq.ParquetFile(path).iter_batches(batch_size=256, columns=columns)


def _arrow_batches(whole: pa.Buffer) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a mapped arrow file, in either of the two IPC formats.

    Their buffers point into `whole`.
    """
    try:
        reader = pa.ipc.open_stream(whole)
    except pa.ArrowInvalid:
        file = pa.ipc.open_file(whole)
        for number in range(file.num_record_batches):
            yield file.get_batch(number)
    else:
        yield from reader


def _mapped(path: Path) -> pa.Buffer:
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
    other = value if isinstance(value, int) else ODD_LABEL
    return classes.numbers.get(text, other)


def _parquet_items(
    files: Sequence[tuple[str, Path]], columns: Columns, classes: Classes
) -> Iterator[Item]:
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
    """Return the encoded bytes of a cell; none where it holds none."""
    return (image.get("bytes") if isinstance(image, dict) else image) or b""


def _scan_arrow(
    scans: Mapping[str, SplitScan], of_file: str, path: Path, columns: Columns, classes: Classes
) -> None:
    """Add every row of an arrow file, with the place of its image in the file."""
    scans[of_file].stamp.add(path.name, path.stat())
    with _reading(path):
        whole = _mapped(path)
        for batch in _arrow_batches(whole):
            values = [_label(value, classes) for value in batch[columns.label].to_pylist()]
            places = _places(batch[columns.image], whole, path)
            splits = columns.split_of(batch, of_file)
            for label, (offset, length), split in zip(values, places, splits, strict=True):
                if split not in SPLITS:
                    continue
                found = scans[split]
                name = f"{found.seen:08d}"
                found.seen += 1
                if not 0 <= label < len(classes.infos):
                    found.note_label(f"{path}: row {name}", label, len(classes.infos))
                elif length == 0:
                    found.note(f"{path}: row {name}", "left out", "zero bytes")
                else:
                    found.rows.add(name, label, str(path), offset, length)


def _places(column: pa.Array, whole: pa.Buffer, path: Path) -> list[tuple[int, int]]:
    """Return offset in the file and length of every image of a batch, bytes."""
    binary = column.field("bytes") if pa.types.is_struct(column.type) else column
    width = {pa.binary(): np.int32, pa.large_binary(): np.int64}.get(binary.type)
    if width is None:
        raise DataError(f"{path} has images of type {binary.type}; encoded bytes are needed")
    _, offsets, data = binary.buffers()
    bounds = np.frombuffer(offsets, width)[binary.offset : binary.offset + len(binary) + 1].astype(
        np.int64
    )
    start = data.address - whole.address if data else 0
    if not 0 <= start <= whole.size:
        raise DataError(f"{path} is compressed inside; save it without compression, or as Parquet")
    return [(start + int(low), int(high - low)) for low, high in itertools.pairwise(bounds)]


def open_hub(name: str, spool: Spool, wanted: Wanted) -> Source:
    """Open a dataset of the Hugging Face hub as a stream.

    Args:
        name: ID or ID:CONFIG; $HF_TOKEN opens gated ones.
        spool: Where the images are kept.
        wanted: The flags.

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
    """Return the source of `splits`: split name -> a `datasets.IterableDataset`."""
    import datasets

    # Choose the splits.
    for word in splits:
        if word.lower() not in SPLIT_OF and word.lower() not in wanted.splits:
            raise unknown_split(word, name)
    meanings = {**choose_splits(splits)}
    for word in splits:
        said = wanted.splits.get(word.lower())
        if said is not None:
            meanings[word] = said
    chosen = {word: split for word, split in meanings.items() if split in SPLITS}
    if not chosen:
        raise UsageError(
            f"{name} has the splits {', '.join(splits)}, and none to train on; "
            "say which is: --split WORD=train"
        )

    # Find the columns and classes.
    first = splits[next(iter(chosen))]
    if first.features is None:
        raise DataError(f"{name} does not say its features; give its Parquet files instead")
    columns = find_columns(first.features.to_dict(), name, wanted)
    if columns.names is None:
        raise DataError(f"{name} does not name its classes; give its Parquet files instead")

    classes = _named_classes(columns.names, wanted)
    unused = [f"the split {word!r} is not used" for word in splits if word not in chosen]
    understood = Understood(
        layout=f"a stream of the hub with images in the column {columns.image!r}; "
        f"splits {', '.join(chosen)}",
        labels=f"the column {columns.label!r}",
        said=classes.said,
        doubtful=[*columns.doubtful, *unused],
    )

    def read() -> Iterator[Item]:
        for word, split in chosen.items():
            rows = splits[word].cast_column(columns.image, datasets.Image(decode=False))
            for number, row in enumerate(rows):
                label = _label(row[columns.label], classes)
                yield Item(split, f"{number:08d}", label, _image_bytes(row[columns.image]))

    source = spool_items(f"huggingface {name}", classes.infos, read, spool)
    return replace(source, understood=understood)
