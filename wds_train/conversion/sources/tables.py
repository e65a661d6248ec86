"""Files that hold tables of labels, as rows of cells.

They are CSV and its like, JSON lines, JSON, Parquet and plain lists. `table` finds out what the
columns of such a table mean.
"""

import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wds_train.conversion.sources.names import normal
from wds_train.conversion.sources.tree import Folder
from wds_train.errors import AccessDenied, DataError

SURE = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
# These are tables only if there are few of them: thousands lie beside images as captions or boxes.
MAYBE = (".txt", ".json", ".lst")
FEW = 20  # files in a folder
DEPTH = 3  # levels of folders below the source that are searched for tables
SAMPLE = 300  # rows, from which it is decided what a column holds
MAX_TABLE = 2 << 30  # bytes; a larger one is no table of labels
MAX_JSON = 256 << 20  # bytes; a file is parsed as a whole, in memory
Line = tuple[int, list[Any]]  # the number of a row's line in the file, and its cells


@dataclass(frozen=True)
class Table:
    """A table in a file.

    Attributes:
        path: The file.
        columns: The names of its columns; 1, 2, ... if the file has no line of names.
        lines: The rows.
        named: True if the file names its columns.
    """

    path: Path
    columns: list[str]
    lines: list[Line]
    named: bool = True

    def column(self, name: str, most: int | None = None) -> list[Any]:
        """Return the cells of a column.

        Args:
            name: The column.
            most: The number of rows, from the first; None for all.
        """
        place = self.columns.index(name)
        return [cells[place] for _, cells in self.lines[:most]]


def find_tables(root: Folder) -> list[Path]:
    """Return the files below `root` that may be tables of labels, those at the top first."""
    found = []
    level = [root]
    for _ in range(DEPTH + 1):
        below = []
        for folder in level:
            for name in _table_names(folder):
                found.append(folder.path / name)
            below += folder.folders
        level = below
    return found


def _table_names(folder: Folder) -> list[str]:
    """Return the names of the files in a folder that may be tables."""
    sure = []
    maybe = []
    for name in sorted(folder.files):
        if name.lower().endswith(SURE):
            sure.append(name)
        elif name.lower().endswith(MAYBE):
            maybe.append(name)
    if len(maybe) > FEW:
        return sure
    return sure + maybe


def read_table(path: Path) -> Table | None:
    """Read a table.

    Args:
        path: The file.

    Returns:
        The table; None for a file that is no table.

    Raises:
        AccessDenied: The file may not be read.
        DataError: It is a table for certain, and damaged.
    """
    # The suffix decides on the format; anything else is a text.
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
    encoding = "utf-8-sig"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _read_text(path: Path, *, listed: bool) -> Table | None:
    """Read CSV and its like.

    Args:
        path: The file.
        listed: The file is a list without a line of names.

    Returns:
        The table; None for a file that is no table.
    """
    text = decode(path.read_bytes())
    if "\0" in text[:4096]:  # a binary file
        return None

    # Cells are separated by whatever the first line has most of.
    first = ""
    for line in text.splitlines():
        if line.strip():
            first = line
            break
    delimiter = max(",;\t|", key=first.count)
    spaced = first.count(delimiter) == 0 and (listed or " " in first.strip())
    if spaced:
        listed = True
        lines = _spaced_lines(text)
    else:
        lines = list(_csv_lines(path, text, delimiter))

    # An empty list is no table; a CSV without rows is one, and is reported.
    if not lines:
        return None if listed else Table(path, [], [])
    if listed:
        width = len(lines[0][1])
        return Table(path, _numbered_columns(width), _pad_rows(lines, width), named=False)
    # CSV begins with a line of names.
    names = list(map(str.strip, lines[0][1]))
    return Table(path, names, _pad_rows(lines[1:], len(names)))


def _numbered_columns(width: int) -> list[str]:
    """Return the names of columns that have none: 1, 2, ..."""
    return list(map(str, range(1, width + 1)))


def _spaced_lines(text: str) -> list[Line]:
    """Split lines at blanks.

    If all have the same number of words, each word is a cell. If not, the first word is one, and
    the rest of the line another: `1.jpg Boeing 707`.
    """
    filled = []
    widths = set()
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            filled.append((number, line))
            widths.add(len(line.split()))
    splits = 1
    if len(widths) == 1:
        splits = -1  # as many as there are blanks
    return [(number, line.split(None, splits)) for number, line in filled]


def _csv_lines(path: Path, text: str, delimiter: str) -> Iterator[Line]:
    """Yield the rows of a CSV file that are not empty."""
    # newline="": line breaks inside a quoted cell stay as they are.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for number, row in enumerate(reader, 1):
            # Spreadsheets write empty rows as commas.
            if any(map(str.strip, row)):
                yield number, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}, cannot be read: {error}") from error


def _pad_rows(lines: Sequence[Line], width: int) -> list[Line]:
    """Give every row `width` cells: people's rows end early, or in a comma too many."""
    padded = []
    for number, cells in lines:
        missing = [""] * (width - len(cells))
        padded.append((number, [*cells, *missing][:width]))
    return padded


def without_names(table: Table) -> Table:
    """Return the `table` with its first line as a row: it has no line of names."""
    if not table.named:
        return table
    columns = _numbered_columns(len(table.columns))
    return Table(table.path, columns, [(1, list(table.columns)), *table.lines], named=False)


def _read_json_lines(path: Path) -> Table:
    """Read a file with a JSON object a line."""
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
                f"{path}, line {number}, is no JSON object, "
                'such as {"file_name": "1.jpg", "label": "cat"}'
            )
        rows.append((number, row))
    return _from_objects(path, rows)


def _read_json(path: Path) -> Table | None:
    """Read a JSON list of objects, or an object of file -> label."""
    # Files of other programs are JSON, too: what is not understood is no table.
    if path.stat().st_size > MAX_JSON:
        return None
    try:
        content = json.loads(decode(path.read_bytes()))
    except (ValueError, RecursionError):
        return None
    if not content:
        return None
    # [{"file": "1.jpg", "label": "cat"}, ...]
    if isinstance(content, list) and _are_all(content, dict):
        return _from_objects(path, list(enumerate(content, 1)))
    # {"1.jpg": "cat", ...}
    if isinstance(content, dict) and _are_all(content.values(), str, int, list):
        lines: list[Line] = []
        for number, (name, value) in enumerate(content.items(), 1):
            lines.append((number, [name, value]))
        return Table(path, _numbered_columns(2), lines, named=False)
    return None


def _are_all(values: Iterable[Any], *kinds: type) -> bool:
    return all(isinstance(value, kinds) for value in values)


def _from_objects(path: Path, rows: Sequence[tuple[int, dict[str, Any]]]) -> Table:
    """Return a table of JSON objects, with a column for each field that one of them has.

    Args:
        path: The file.
        rows: The number of each object's line, and the object.
    """
    columns: dict[str, None] = {}
    for _, row in rows:
        columns |= dict.fromkeys(row)
    return Table(path, list(columns), _to_lines(rows, columns))


def _to_lines(rows: Iterable[tuple[int, dict[str, Any]]], columns: Collection[str]) -> list[Line]:
    """Return the cells of objects in the order of the columns."""
    return [(number, list(map(row.get, columns))) for number, row in rows]


def _read_parquet(path: Path) -> Table | None:
    """Read a Parquet file whose columns hold no images, but perhaps their paths."""
    try:
        file = pq.ParquetFile(path)
        # Check the schema before anything is read: images may take gigabytes.
        columns = file.schema_arrow.names
        for field in file.schema_arrow:
            if holds_bytes(field.type):
                return None
        rows = file.read(columns).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; download or write it again") from error
    return Table(path, columns, _to_lines(enumerate(rows, 1), columns))


def holds_bytes(kind: pa.DataType) -> bool:
    """Return True if a column of this type holds bytes, which may be encoded images."""
    if pa.types.is_struct(kind):
        for number in range(kind.num_fields):
            if holds_bytes(kind.field(number).type):
                return True
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def cell_text(cell: Any) -> str:
    """Return a cell as a text without blanks around it; empty for None."""
    if cell is None:
        return ""
    return normal(str(cell)).strip()


def texts(cells: Iterable[Any], most: int = SAMPLE) -> list[str]:
    """Return the first `most` cells that are not empty, as texts."""
    found: list[str] = []
    for cell in cells:
        if len(found) == most:
            break
        text = cell_text(cell)
        if text:
            found.append(text)
    return found
