"""Files that hold tables of labels, as rows of cells: CSV and its like, JSON lines, JSON, Parquet, plain lists."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wds_train.conversion.sources.names import normal
from wds_train.conversion.sources.tree import Folder
from wds_train.errors import AccessDenied, DataError

SURE = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
# These are tables only where there are few of them: thousands lie beside images as captions or boxes.
MAYBE = (".txt", ".json", ".lst")
FEW = 20
DEPTH = 3  # levels below the source that are looked through for tables
SAMPLE = 300  # rows that columns are told from
MAX_TABLE = 2 << 30  # bytes; a larger one is no table of labels
MAX_JSON = 256 << 20


@dataclass(frozen=True)
class Table:
    """A table in a file.

    Attributes:
        path: The file.
        columns: The names of its columns; 1, 2, ... where it has no line of names.
        lines: Where it is from: the number of each row's line, and its cells.
        named: Whether the file names its columns.
    """

    path: Path
    columns: list[str]
    lines: list[tuple[int, list[Any]]]
    named: bool = True

    @property
    def sample(self) -> list[list[Any]]:
        """The cells of the first rows."""
        return [cells for _, cells in self.lines[:SAMPLE]]

    def column(self, name: str) -> list[Any]:
        """Return the cells of a column."""
        place = self.columns.index(name)
        return [cells[place] for _, cells in self.lines]


def find_tables(root: Folder) -> list[Path]:
    """Return the files below `root` that may be tables of labels, those at the top first."""
    found = []
    level = [root]
    for _ in range(DEPTH + 1):
        for folder in level:
            names = sorted(name for name in folder.files if name.lower().endswith(SURE))
            maybe = sorted(name for name in folder.files if name.lower().endswith(MAYBE))
            if len(maybe) <= FEW:
                names += maybe
            found += [folder.path / name for name in names]
        level = [inner for folder in level for inner in folder.folders]
    return found


def read_table(path: Path) -> Table | None:
    """Read the table at `path`.

    Returns:
        The table, or None for a file that is none.

    Raises:
        AccessDenied: The file may not be read.
        DataError: It is a table for certain, and damaged.
    """
    suffix = path.suffix.lower()
    try:
        if path.stat().st_size > MAX_TABLE:
            return None
        if suffix == ".parquet":
            return _read_parquet(path)
        if suffix in (".jsonl", ".ndjson"):
            return _read_json_lines(path)
        if suffix == ".json":
            return _read_json(path)
        return _read_text(path, listed=suffix in (".txt", ".lst"))
    except PermissionError as error:
        raise AccessDenied(f"no permission to read {path}; check its owner and mode") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; restore it, or move it away"
        ) from error


def decode(data: bytes) -> str:
    """Return the text in `data`: UTF-8, UTF-16 with its mark, or else Latin-1."""
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _read_text(path: Path, *, listed: bool) -> Table | None:
    """Read CSV and its like, with a line of names; or a list without one (`listed`)."""
    text = decode(path.read_bytes())
    if "\0" in text[:4096]:
        return None
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t|", key=first.count)
    spaced = first.count(delimiter) == 0 and (listed or " " in first.strip())
    listed = listed or spaced
    if spaced:
        lines = _spaced_lines(text)
    else:
        lines = list(_csv_lines(path, text, delimiter))
    if not lines:
        return None if listed else Table(path, [], [])
    if listed:
        width = len(lines[0][1])
        return Table(path, [str(n + 1) for n in range(width)], _padded(lines, width), named=False)
    names = [str(name).strip() for name in lines[0][1]]
    return Table(path, names, _padded(lines[1:], len(names)))


def _spaced_lines(text: str) -> list[tuple[int, list[Any]]]:
    """Split lines at blanks: into as many cells as all of them have, else into the first one and the rest (`1.jpg Boeing 707`)."""
    filled = [
        (number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.startswith("#")
    ]
    widths = {len(line.split()) for _, line in filled}
    most = -1 if len(widths) == 1 else 1
    return [(number, line.split(None, most)) for number, line in filled]


def _csv_lines(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        number = 0
        for number, row in enumerate(reader, 1):
            if any(cell.strip() for cell in row):
                yield number, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}, cannot be read: {error}") from error


def _padded(lines: Sequence[tuple[int, list[Any]]], width: int) -> list[tuple[int, list[Any]]]:
    """Give every row `width` cells: the rows of people's tables end early, or in a comma too many."""
    return [(number, [*cells, *[""] * (width - len(cells))][:width]) for number, cells in lines]


def without_names(table: Table) -> Table:
    """Return the `table` with its first line as a row: it has no line of names."""
    if not table.named:
        return table
    columns = [str(n + 1) for n in range(len(table.columns))]
    return Table(table.path, columns, [(1, list(table.columns)), *table.lines], named=False)


def _read_json_lines(path: Path) -> Table:
    rows = []
    for number, line in enumerate(decode(path.read_bytes()).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}, is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(
                f'{path}, line {number}, is no JSON object, such as {{"file_name": "1.jpg", "label": "cat"}}'
            )
        rows.append((number, row))
    return _from_objects(path, rows)


def _read_json(path: Path) -> Table | None:
    """Read a JSON list of objects, or an object of file -> label."""
    if path.stat().st_size > MAX_JSON:
        return None
    try:
        content = json.loads(decode(path.read_bytes()))
    except (ValueError, RecursionError):
        return None
    if isinstance(content, list) and content and all(isinstance(row, dict) for row in content):
        return _from_objects(path, list(enumerate(content, 1)))
    if isinstance(content, dict) and content:
        values = list(content.values())
        if all(isinstance(value, str | int | list) for value in values):
            lines = [
                (number, [name, value]) for number, (name, value) in enumerate(content.items(), 1)
            ]
            return Table(path, ["1", "2"], lines, named=False)
    return None


def _from_objects(path: Path, rows: Sequence[tuple[int, dict[str, Any]]]) -> Table:
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    return Table(
        path, columns, [(number, [row.get(name) for name in columns]) for number, row in rows]
    )


def _read_parquet(path: Path) -> Table | None:
    """Read a Parquet file whose columns hold no images: their paths perhaps."""
    try:
        file = pq.ParquetFile(path)
        plain = [field.name for field in file.schema_arrow if not holds_bytes(field.type)]
        if len(plain) < len(file.schema_arrow.names):
            return None
        rows = file.read(plain).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; download or write it again") from error
    return Table(
        path, plain, [(number, [row[name] for name in plain]) for number, row in enumerate(rows, 1)]
    )


def holds_bytes(kind: pa.DataType) -> bool:
    """Tell whether a column of this type holds bytes, encoded images perhaps."""
    if pa.types.is_struct(kind):
        return any(holds_bytes(kind.field(n).type) for n in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def texts(cells: Sequence[Any], most: int = SAMPLE) -> list[str]:
    """Return the first cells that are not empty, as texts."""
    filled = (normal(str(cell)).strip() for cell in cells if cell is not None)
    return list(islice((cell for cell in filled if cell), most))
