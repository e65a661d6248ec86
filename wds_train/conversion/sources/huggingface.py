"""Hugging Face datasets: a hub id as a stream, a folder written by `save_to_disk`, Parquet or arrow files.

Images are the encoded bytes of the Image feature ({"bytes", "path"}; huggingface.co/docs/datasets, "Image"), never
decoded. Arrow files hold them uncompressed, so a sample is a place in the file; Parquet compresses pages, so it is read
as a stream.
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
from wds_train.conversion.sources.labels import NO_LABEL, NO_TEXT, Classes, classes_of, label_text, to_classes
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
ODD_LABEL = -2  # of a value that is no label of any class
FEW_SPLITS = 12  # different cells of a column in its first rows, above which it says no splits
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
    """Which columns are read.

    Attributes:
        image: That of the images.
        label: That of the labels.
        names: The labels' names in their order, if the features say.
        split: That of the splits; None where the files' names say them.
        splits: What each cell of `split` means.
        doubtful: What else may be the image or the label, a sentence each.
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
        return [self.image, self.label, *([self.split] if self.split else [])]

    def split_of(self, batch: pa.RecordBatch, of_file: str) -> list[str]:
        """Return the split of each row of `batch`; `of_file` where the row does not say one."""
        if self.split is None:
            return [of_file] * batch.num_rows
        return [self.splits.get(str(cell).strip(), of_file) for cell in batch[self.split].to_pylist()]


def find_columns(features: dict[str, Any], where: str, wanted: Wanted) -> Columns:
    """Return the columns that `datasets` features name, given as JSON: name -> {"_type": ...}.

    Raises:
        DataError: There is none that may be the image, or the label.
        UsageError: Several may be.
    """
    kinds = {name: kind.get("_type") if isinstance(kind, dict) else None for name, kind in features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"] or [n for n in IMAGE_COLUMNS if n in kinds]
    labels = [name for name in LABEL_COLUMNS if name in kinds] or [
        n for n, kind in kinds.items() if kind == "ClassLabel"
    ]
    images = [name for name in (wanted.image,) if name in kinds] if wanted.image else images
    labels = [name for name in (wanted.label,) if name in kinds] if wanted.label else labels
    doubtful = []
    others = [n for n, kind in kinds.items() if kind == "ClassLabel" and n not in labels[:1]]
    for found, rest, usual, flag in (
        (images, images[1:], IMAGE_COLUMNS, "--image-column"),
        (labels, others, LABEL_COLUMNS, "--label-column"),
    ):
        if found and rest and getattr(wanted, flag[2:7]) is None:
            if found[0] not in usual:
                raise UsageError(
                    f"{where} has the columns {', '.join([found[0], *rest])}; say which one it is: {flag} {found[0]}"
                )
            doubtful.append(f"{found[0]!r} is read; {', '.join(rest)} may be meant as well: {flag} NAME")
    if not images or not labels:
        raise DataError(
            f"{where} has the columns {', '.join(kinds)}; an image and a label column are needed: name them with "
            "--image-column and --label-column"
        )
    names = features[labels[0]].get("names") if kinds[labels[0]] == "ClassLabel" else None
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise DataError(
            f"{where}: the names of the classes of {labels[0]!r} are no list of texts; write the file again"
        )
    return Columns(images[0], labels[0], names, doubtful=tuple(doubtful))


def open_files(root: Path, spool: Spool, wanted: Wanted) -> Source:
    """Read the arrow or Parquet files below the folder `root`, or the one file."""
    files, unused = _files(root, wanted)
    columns = _columns(root, files, wanted)
    classes = _classes(columns, files, str(root), wanted)
    description = f"huggingface {root.name}"
    splits = f"the column {columns.split!r}" if columns.split else "the files' names"
    understood = Understood(
        f"{'arrow' if files[0][1].suffix == '.arrow' else 'Parquet'} files with images in the column {columns.image!r}; splits by {splits}",
        f"the column {columns.label!r}",
        classes.said,
        list(columns.doubtful),
    )
    if files[0][1].suffix == ".arrow":
        scans = {
            split: SplitScan(split) for split in [*dict.fromkeys(split for split, _ in files), *columns.splits.values()]
        }
        scans = {split: found for split, found in scans.items() if split in SPLITS}
        for split, path in files:
            _scan_arrow(scans, split, path, columns, classes)
        source = from_scans(description, classes.infos, [*scans.values()], understood)
    else:
        source = spool_items(description, classes.infos, lambda: _parquet_items(files, columns, classes), spool)
    notes = [Note("", str(path), "ignored", cause) for path, cause in unused]
    source = replace(source, understood=understood, notes=[*source.notes, *notes])
    return _grouped(source, columns, files, wanted)


def _grouped(source: Source, columns: Columns, files: Sequence[tuple[str, Path]], wanted: Wanted) -> Source:
    """Return the `source` with the groups of the column that --group names, if it is one."""
    group = next((name for name in _features(files[0][1]) if name.casefold() == (wanted.group or "").casefold()), None)
    if group is None:
        return source
    groups: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for of_file, path in files:
        for batch in _batches(path, [group, *([columns.split] if columns.split else [])]):
            for value, split in zip(batch[group].to_pylist(), columns.split_of(batch, of_file), strict=True):
                if split == "train":
                    groups[f"{seen[split]:08d}"] = str(value)
                seen[split] += 1
    return replace(source, grouping=Grouping(group, groups))


def _files(root: Path, wanted: Wanted) -> tuple[list[tuple[str, Path]], list[tuple[Path, str]]]:
    """Return (split, path) of every data file, arrow before Parquet, in the order of their names; and (path, why) of those
    that are not used.
    """
    for suffix in (".arrow", ".parquet"):
        paths = [root] if root.is_file() else sorted(p for p in root.rglob(f"*{suffix}") if _is_data(p))
        base = root.parent if root.is_file() else root
        names = {path.relative_to(base).as_posix(): path for path in paths if path.suffix == suffix}
        if names:
            _refuse_several_sets([*names], root)
            used, unused = file_splits([*names], wanted.splits, str(root))
            files = sorted((split, names[name]) for name, split in used.items())
            return files, [(names[name], cause) for name, cause in unused.items()]
    raise UsageError(f"{root} holds neither .arrow nor .parquet files")


def _refuse_several_sets(names: Sequence[str], root: Path) -> None:
    """Raise `UsageError` for files of several data sets, or configurations of one: full/train-... and tiny/train-..."""
    sets: dict[str, set[str]] = {}
    for name in names:
        parts = name.split("/")
        above = "/".join(part for part in parts[:-1] if not SPLIT_FOLDER.fullmatch(part))
        words = SPLIT_WORD.findall(name)
        sets.setdefault(words[-1].lower() if words else "", set()).add(above)
    several = next((found for word, found in sets.items() if word and len(found) > 1), None)
    if several:
        shown = sorted(several)
        raise UsageError(
            f"{root} holds several data sets: {', '.join(place or '.' for place in shown)}; give the path of one: {root / shown[-1]}"
        )


def _is_data(path: Path) -> bool:
    """Whether the file is data: `save_to_disk` leaves results of `map` beside the data; its state.json tells them
    apart.
    """
    state = path.with_name("state.json")
    return not state.is_file() or path.name in {e["filename"] for e in json.loads(state.read_text())["_data_files"]}


def _columns(root: Path, files: Sequence[tuple[str, Path]], wanted: Wanted) -> Columns:
    path = files[0][1]
    with _reading(path):
        schema = pq.read_schema(path) if path.suffix == ".parquet" else next(_arrow_batches(_mapped(path))).schema
    columns = find_columns(_features(path), str(root), wanted)
    for name, fits, what in (
        (columns.image, _holds_bytes, "encoded images (bytes) are"),
        (columns.label, _holds_labels, "a name or a whole number is"),
    ):
        if not fits(schema.field(name).type):
            raise DataError(f"{path}: the column {name!r} holds {schema.field(name).type}; {what} needed")
    _refuse_paths(columns, path)
    _refuse_other_columns(columns, files)
    return _with_splits(columns, schema, files, wanted)


def _features(path: Path) -> dict[str, Any]:
    """Return the columns of a file: name -> its feature as `datasets` writes it, or {} where nobody wrote one."""
    with _reading(path):
        schema = pq.read_schema(path) if path.suffix == ".parquet" else next(_arrow_batches(_mapped(path))).schema
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        return {name: info.get("features", {}).get(name, {}) for name in schema.names}
    except (
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ):  # not written by `datasets`: the columns alone count
        return {name: {} for name in schema.names}


def _refuse_other_columns(columns: Columns, files: Sequence[tuple[str, Path]]) -> None:
    """Raise `DataError` for files that do not agree on the columns, or on the names of the classes."""
    for _, path in files:
        features = _features(path)
        missing = [name for name in (columns.image, columns.label) if name not in features]
        if missing:
            raise DataError(
                f"{path} has no column {missing[0]!r}, which {files[0][1]} has; give files of one form, one after the other"
            )
        kind = features[columns.label]
        names = kind.get("names") if isinstance(kind, dict) else None
        if columns.names is not None and names != columns.names:
            raise DataError(
                f"{path} names the classes {', '.join(map(str, names or ()))[:100]}, and {files[0][1]} {', '.join(columns.names)[:100]}: "
                "a number would be two classes; write the files again with one list"
            )


def _refuse_paths(columns: Columns, path: Path) -> None:
    """Raise `DataError` for images that are paths of files elsewhere, and no bytes."""
    first = next(_batches(path, [columns.image]), None)
    images = first[columns.image].to_pylist() if first is not None else []
    paths = [image.get("path") for image in images if isinstance(image, dict) and not image.get("bytes")]
    if images and len(paths) == len(images) and any(paths):
        raise DataError(
            f"{path}: the column {columns.image!r} holds paths such as {next(filter(None, paths))}, and no bytes; embed the images, or give "
            "the folder of the files and a table with their labels"
        )


def _with_splits(columns: Columns, schema: pa.Schema, files: Sequence[tuple[str, Path]], wanted: Wanted) -> Columns:
    """Return the `columns` with that of the splits, if there is one."""
    path = files[0][1]
    plain = [
        name
        for name in schema.names
        if name not in (columns.image, columns.label) and _holds_labels(schema.field(name).type)
    ]
    few = []
    for name in plain:
        first = next(_batches(path, [name]), None)
        if first is not None and len(set(first[name].to_pylist())) <= FEW_SPLITS:
            few.append(name)
    if not few and wanted.split is None:
        return columns
    lines = [
        (number, list(row.values()))
        for _, each in files
        for batch in _batches(each, few)
        for number, row in enumerate(batch.to_pylist())
    ]
    name, splits, said = find_split_column(Table(path, few, lines), (), wanted)
    return replace(columns, split=name, splits=splits, doubtful=(*columns.doubtful, *said))


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind)


def _holds_labels(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_labels(kind.value_type)
    return any(is_it(kind) for is_it in PLAIN_TYPES)


def _classes(columns: Columns, files: Sequence[tuple[str, Path]], where: str, wanted: Wanted) -> Classes:
    """Return the feature's names as classes, or else what follows from the labels that occur."""
    if columns.names is not None:
        return _named_classes(columns.names, wanted)
    counts: dict[str, int] = {}
    for _, path in files:
        for batch in _batches(path, [columns.label]):
            _refuse_fractions(batch[columns.label], columns.label, path)
            for value, count in Counter(batch[columns.label].to_pylist()).items():
                with contextlib.suppress(DataError):  # it is named with its sample
                    text = label_text(value)
                    counts[text] = counts.get(text, 0) + count
    return classes_of(counts, where, wanted.labels)


def _refuse_fractions(cells: pa.Array, name: str, path: Path) -> None:
    """Raise `DataError` for labels that are numbers with a fraction: a gap in a column of numbers makes floats of it, no more."""
    if not pa.types.is_floating(cells.type):
        return
    numbers = [cell for cell in cells.to_pylist() if cell is not None and not math.isnan(cell)]
    odd = next((number for number in numbers if not number.is_integer()), None)
    if odd is not None:
        raise DataError(
            f"{path}: the column {name!r} holds {cells.type}, such as {odd}; a name or a whole number is needed"
        )


def _named_classes(names: Sequence[str], wanted: Wanted) -> Classes:
    """Return the classes that a feature names: a label is a place in that list, or in the one that a person gave."""
    if not wanted.labels.classes:
        numbers = {str(label): label for label in range(len(names))}
        return Classes(to_classes(names), numbers | {NO_TEXT: NO_LABEL, str(NO_LABEL): NO_LABEL})
    found = classes_of(dict.fromkeys(names, 1), "the features", wanted.labels, sure=True)
    numbers = {str(label): found.numbers[name] for label, name in enumerate(names)}
    return Classes(found.infos, numbers | {NO_TEXT: NO_LABEL, str(NO_LABEL): NO_LABEL}, found.said)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise AccessDenied(f"no permission to read {path}; check its owner and mode") from error
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}; download or write it again") from error


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with _reading(path):
        if path.suffix == ".arrow":
            yield from (batch.select(columns) for batch in _arrow_batches(_mapped(path)))
        else:
            yield from pq.ParquetFile(path).iter_batches(batch_size=256, columns=columns)


def _arrow_batches(whole: pa.Buffer) -> Iterator[pa.RecordBatch]:
    """The batches of a mapped arrow file, in either of the two IPC formats; their buffers point into `whole`."""
    try:
        reader = pa.ipc.open_stream(whole)
    except pa.ArrowInvalid:
        file = pa.ipc.open_file(whole)
        yield from (file.get_batch(number) for number in range(file.num_record_batches))
    else:
        yield from reader


def _mapped(path: Path) -> pa.Buffer:
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def _label(value: Any, classes: Classes) -> int:
    """Return the label's number; `NO_LABEL` for a missing one, as HF marks test images, and one that no class has for a
    value that is none of the classes'.
    """
    try:
        text = label_text(value)
    except DataError:
        return ODD_LABEL
    return classes.numbers.get(text, value if isinstance(value, int) else ODD_LABEL)


def _parquet_items(files: Sequence[tuple[str, Path]], columns: Columns, classes: Classes) -> Iterator[Item]:
    counts: dict[str, int] = {}
    for of_file, path in files:
        for batch in _batches(path, columns.read):
            images, labels = batch[columns.image].to_pylist(), batch[columns.label].to_pylist()
            for image, label, split in zip(images, labels, columns.split_of(batch, of_file), strict=True):
                if split in SPLITS:
                    number = counts.get(split, 0)
                    yield Item(split, f"{number:08d}", _label(label, classes), _image_bytes(image))
                    counts[split] = number + 1


def _image_bytes(image: Any) -> bytes:
    return (image.get("bytes") if isinstance(image, dict) else image) or b""


def _scan_arrow(scans: Mapping[str, SplitScan], of_file: str, path: Path, columns: Columns, classes: Classes) -> None:
    """Add every row of the file by the place of its bytes in it."""
    scans[of_file].stamp.add(path.name, path.stat())
    with _reading(path):
        whole = _mapped(path)
        for batch in _arrow_batches(whole):
            values = [_label(value, classes) for value in batch[columns.label].to_pylist()]
            places = _places(batch[columns.image], whole, path)
            for label, (offset, length), split in zip(values, places, columns.split_of(batch, of_file), strict=True):
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
    """Offset in the file and length of every image of a batch."""
    binary = column.field("bytes") if pa.types.is_struct(column.type) else column
    width = {pa.binary(): np.int32, pa.large_binary(): np.int64}.get(binary.type)
    if width is None:
        raise DataError(f"{path} has images of type {binary.type}; encoded bytes are needed")
    _, offsets, data = binary.buffers()
    bounds = np.frombuffer(offsets, width)[binary.offset : binary.offset + len(binary) + 1].astype(np.int64)
    start = data.address - whole.address if data else 0
    if not 0 <= start <= whole.size:
        raise DataError(f"{path} is compressed inside; save it without compression, or as Parquet")
    return [(start + int(low), int(high - low)) for low, high in itertools.pairwise(bounds)]


def open_hub(name: str, spool: Spool, wanted: Wanted) -> Source:
    """A dataset of the Hugging Face hub, read as a stream. `name` is ID or ID:CONFIG; $HF_TOKEN opens gated ones."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            "hf:... needs the package `datasets`; install it: .venv/bin/uv pip install datasets"
        ) from error
    dataset, _, config = name.partition(":")
    try:
        splits = datasets.load_dataset(dataset, config or None, streaming=True, token=os.environ.get("HF_TOKEN"))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"the hub's dataset {dataset!r} cannot be opened: {str(error)[:300]}; is HF_TOKEN set?"
        ) from error
    return from_iterable(name, splits, spool, wanted)


def from_iterable(name: str, splits: Any, spool: Spool, wanted: Wanted = ANYTHING) -> Source:
    """The source of `splits`: split name -> a `datasets.IterableDataset`, whose images are then taken without decoding."""
    import datasets

    for word in splits:
        if word.lower() not in SPLIT_OF and word.lower() not in wanted.splits:
            raise unknown_split(word, name)
    named = {word: wanted.splits.get(word.lower()) for word in splits}
    said = {word: split for word, split in named.items() if split is not None}
    chosen = {word: split for word, split in (choose_splits(splits) | said).items() if split in SPLITS}
    if not chosen:
        raise UsageError(
            f"{name} has the splits {', '.join(splits)}, and none to train on; say which is: --split WORD=train"
        )
    first = splits[next(iter(chosen))]
    if first.features is None:
        raise DataError(f"{name} does not say its features; give its Parquet files instead")
    columns = find_columns(first.features.to_dict(), name, wanted)
    if columns.names is None:
        raise DataError(f"{name} does not name its classes; give its Parquet files instead")

    classes = _named_classes(columns.names, wanted)
    understood = Understood(
        f"a stream of the hub with images in the column {columns.image!r}; splits {', '.join(chosen)}",
        f"the column {columns.label!r}",
        classes.said,
        [*columns.doubtful, *(f"the split {word!r} is not used" for word in splits if word not in chosen)],
    )

    def read() -> Iterator[Item]:
        for word, split in chosen.items():
            rows = splits[word].cast_column(columns.image, datasets.Image(decode=False))
            for number, row in enumerate(rows):
                yield Item(
                    split, f"{number:08d}", _label(row[columns.label], classes), _image_bytes(row[columns.image])
                )

    return replace(spool_items(f"huggingface {name}", classes.infos, read, spool), understood=understood)
