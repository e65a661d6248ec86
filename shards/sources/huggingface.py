"""Hugging Face datasets: a hub id as a stream, a folder written by `save_to_disk`, Parquet or arrow files.

Images are the encoded bytes of the Image feature ({"bytes", "path"}; huggingface.co/docs/datasets, "Image"), never
decoded. Arrow files hold them uncompressed, so a sample is a place in the file; Parquet compresses pages, so it is read
as a stream.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.sources.base import ANYTHING, Source, Wanted
from shards.sources.labels import classes_of, label_text
from shards.sources.names import choose_splits, split_word
from shards.sources.scan import SplitScan
from shards.sources.splits import from_scans, to_classes
from shards.sources.spool import Spool
from shards.sources.stream import Item, spooled
from wds_train.errors import AccessDenied, DataError, UsageError
from wds_train.format.manifest import ClassInfo

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
NO_LABEL = {None, -1}
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")


@dataclass(frozen=True)
class Columns:
    """Which column is the image, which the label; and the labels' names in their order, if the features say."""

    image: str
    label: str
    names: list[str] | None


def find_columns(features: dict[str, Any], where: str, wanted: Wanted) -> Columns:
    """The columns that `datasets` features name, given as JSON: name -> {"_type": ...}."""
    kinds = {name: kind.get("_type") if isinstance(kind, dict) else None for name, kind in features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"] or [n for n in IMAGE_COLUMNS if n in kinds]
    labels = [name for name in LABEL_COLUMNS if name in kinds] or [
        n for n, kind in kinds.items() if kind == "ClassLabel"
    ]
    images = [name for name in (wanted.image,) if name in kinds] if wanted.image else images
    labels = [name for name in (wanted.label,) if name in kinds] if wanted.label else labels
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
    return Columns(images[0], labels[0], names)


def local(root: Path, spool: Spool, wanted: Wanted) -> Source:
    """The arrow or Parquet files below the folder `root`, or the one file."""
    files = _files(root)
    columns = _columns(root, files[0][1], wanted)
    classes, labels = _classes(columns, files, str(root))
    description = f"huggingface {root.name}"
    if files[0][1].suffix == ".arrow":
        scans = {split: SplitScan(split) for split, _ in files}
        for split, path in files:
            _scan_arrow(scans[split], path, columns, labels, len(classes))
        return from_scans(description, classes, [*scans.values()])
    return spooled(description, classes, lambda: _parquet_items(files, columns, labels), spool)


def _files(root: Path) -> list[tuple[str, Path]]:
    """Yields (split, path) of every data file, arrow before Parquet, in the order of their names."""
    for suffix in (".arrow", ".parquet"):
        paths = [root] if root.is_file() else sorted(p for p in root.rglob(f"*{suffix}") if _is_data(p))
        base = root.parent if root.is_file() else root
        words = {path: split_word(path.relative_to(base).as_posix()) for path in paths if path.suffix == suffix}
        chosen = choose_splits(words.values())
        if words:
            return sorted((chosen[word], path) for path, word in words.items() if word in chosen)
    raise UsageError(f"{root} holds neither .arrow nor .parquet files")


def _is_data(path: Path) -> bool:
    """Whether the file is data: `save_to_disk` leaves results of `map` beside the data; its state.json tells them
    apart.
    """
    state = path.with_name("state.json")
    return not state.is_file() or path.name in {e["filename"] for e in json.loads(state.read_text())["_data_files"]}


def _columns(root: Path, path: Path, wanted: Wanted) -> Columns:
    with _reading(path):
        schema = pq.read_schema(path) if path.suffix == ".parquet" else next(_arrow_batches(_mapped(path))).schema
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        features = {name: {} for name in schema.names} | info.get("features", {})
    except (
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ):  # not written by `datasets`: the columns alone count
        features = {name: {} for name in schema.names}
    columns = find_columns({name: features[name] for name in schema.names}, str(root), wanted)
    for name, fits, what in (
        (columns.image, _holds_bytes, "encoded images (bytes) are"),
        (columns.label, _holds_labels, "a name or a whole number is"),
    ):
        if not fits(schema.field(name).type):
            raise DataError(f"{path}: the column {name!r} holds {schema.field(name).type}; {what} needed")
    return columns


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_labels(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_labels(kind.value_type)
    return any(
        is_it(kind)
        for is_it in (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    )


def _classes(
    columns: Columns, files: list[tuple[str, Path]], where: str
) -> tuple[tuple[ClassInfo, ...], dict[str, int]]:
    """The feature's names, or else what follows from the labels that occur; and the label of each text."""
    if columns.names is not None:
        return to_classes(columns.names), {str(label): label for label in range(len(columns.names))}
    found, samples = set[str](), 0
    for _, path in files:
        for batch in _batches(path, [columns.label]):
            samples += batch.num_rows
            for value in set(batch[columns.label].to_pylist()) - NO_LABEL:
                with contextlib.suppress(DataError):  # it is named with its sample
                    found.add(label_text(value))
    return classes_of(found, samples, where)


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


def _label(value: Any, labels: dict[str, int]) -> int:
    """The label's number; -1, which no class has, for a missing one, as HF marks test images, and -2 for one that is
    none of `labels`.
    """
    if value in NO_LABEL:
        return -1
    return labels.get(str(value).strip(), value if isinstance(value, int) else -2)


def _parquet_items(files: list[tuple[str, Path]], columns: Columns, labels: dict[str, int]) -> Iterator[Item]:
    counts = dict.fromkeys((split for split, _ in files), 0)
    for split, path in files:
        for batch in _batches(path, [columns.image, columns.label]):
            for image, label in zip(batch[columns.image].to_pylist(), batch[columns.label].to_pylist(), strict=True):
                yield Item(split, f"{counts[split]:08d}", _label(label, labels), _image_bytes(image))
                counts[split] += 1


def _image_bytes(image: Any) -> bytes:
    return (image.get("bytes") if isinstance(image, dict) else image) or b""


def _scan_arrow(found: SplitScan, path: Path, columns: Columns, labels: dict[str, int], classes: int) -> None:
    """Add every row of the file by the place of its bytes in it."""
    found.stamp.add(path.name, path.stat())
    with _reading(path):
        whole = _mapped(path)
        for batch in _arrow_batches(whole):
            values = [_label(value, labels) for value in batch[columns.label].to_pylist()]
            for label, (offset, length) in zip(values, _places(batch[columns.image], whole, path), strict=True):
                name = f"{found.seen:08d}"
                found.seen += 1
                if not 0 <= label < classes:
                    found.note_label(f"{path}: row {name}", label, classes)
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


def hub(name: str, spool: Spool, wanted: Wanted) -> Source:
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

    chosen = choose_splits(splits)
    first = splits[next(iter(chosen))]
    if first.features is None:
        raise DataError(f"{name} does not say its features; give its Parquet files instead")
    columns = find_columns(first.features.to_dict(), name, wanted)
    if columns.names is None:
        raise DataError(f"{name} does not name its classes; give its Parquet files instead")

    numbers = {str(label): label for label in range(len(columns.names))}

    def read() -> Iterator[Item]:
        for word, split in chosen.items():
            rows = splits[word].cast_column(columns.image, datasets.Image(decode=False))
            for number, row in enumerate(rows):
                yield Item(
                    split, f"{number:08d}", _label(row[columns.label], numbers), _image_bytes(row[columns.image])
                )

    return spooled(f"huggingface {name}", to_classes(columns.names), read, spool)
