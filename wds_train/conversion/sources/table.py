"""Images that a table labels: which columns say the file, the label and the split, and what each row says.

Nothing is taken for a label because it stands in the right place: the column of the files is the one whose cells name
images that are here, the column of the labels one that is called so, and whatever else could be one is refused by name.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wds_train.conversion.sources.image_index import AmbiguousName, ImageIndex, Match, fold
from wds_train.conversion.sources.labels import label_text
from wds_train.conversion.sources.names import (
    SPLIT_FOLDER,
    SPLIT_OF,
    SPLIT_WORD,
    SPLITS,
    UNLABELED,
    assign_splits,
    framed_split,
    normal,
)
from wds_train.conversion.sources.source import Wanted
from wds_train.conversion.sources.tables import Table, texts, without_names
from wds_train.errors import DataError, UsageError

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
    "image index",
    "img",
    "img_path",
    "img_name",
    "img_file",
    "image_file",
    "photo",
    "picture",
    "id",
    "name",
    "uuid",
)
LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "classes",
    "class_name",
    "classname",
    "class_id",
    "classid",
    "category",
    "category_name",
    "category_id",
    "target",
    "species",
    "breed",
    "dx",
    "diagnosis",
    "finding labels",
    "emotion",
    "expression",
    "tags",
    "fine_label",
    "label_name",
    "label_id",
)
SPLIT_COLUMNS = (
    "split",
    "set",
    "subset",
    "fold",
    "data set",
    "dataset",
    "partition",
    "usage",
    "phase",
    "data_split",
    "mode",
)
SURE_SPLITS = ("split", "partition", "data_split")  # whatever such a column holds, it is a split
TRUTHS = {"1": True, "0": False, "1.0": True, "0.0": False, "true": True, "false": False}
IS_SPLIT = re.compile(
    rf"(?:is|in|for)?[-_ ]?({'|'.join(word for words in SPLITS.values() for word in words)})(?:ing)?(?:[-_ ]?(?:set|image|img|split|flag))?",
    re.IGNORECASE,
)
NAMES_IMAGES = 0.5  # of a column's cells, above which it is the column of the files
SPLIT_LIST = re.compile(
    r"(?:^|[-_ ])(?:split|partition|fold)s?(?:[-_ .]|$)", re.IGNORECASE
)  # list_eval_partition.txt
SUBMISSION = re.compile(
    r".*submission.*", re.IGNORECASE
)  # Kaggle's sample_submission.csv: every label is made up
NO_COLUMN = "none"


@dataclass(frozen=True)
class Columns:
    """Which columns of a table say what.

    Attributes:
        image: That of the files.
        label: That of the labels; None where `onehot` are several, of 0 and 1, each for a class.
        label_name: One that says the same in words, where `label` holds numbers.
        sure: Whether the column of the labels is called so, and not just the other one of two.
        split_name: That of the splits, if there is one.
        split: What each of its cells means.
        said: What is to be said of other columns.
    """

    image: str
    label: str | None
    label_name: str | None = None
    onehot: tuple[str, ...] = ()
    sure: bool = True
    split_name: str | None = None
    split: Mapping[str, str] = field(default_factory=dict)
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """What a row says of an image. `split` is empty where the row does not say one."""

    match: Match
    text: str
    split: str
    line: int
    name: str

    @property
    def image(self) -> int:
        """The image's place in `ImageIndex.paths`."""
        return self.match.image


@dataclass
class LabelTable:
    """A table that labels images.

    Attributes:
        rows: What its rows say, in their order.
        odd: (line, name, label, split, cause) of rows that cannot be used.
        columns: Which columns were read.
    """

    table: Table
    columns: Columns
    rows: list[Row] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    """The human name of each label, where a column says it."""
    odd: list[tuple[int, str, str, str, str]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.table.path

    @property
    def images(self) -> set[int]:
        return {row.image for row in self.rows}

    @property
    def word(self) -> str:
        """The split that the table's name, or that of its folder, says; empty where neither does."""
        words = SPLIT_WORD.findall(self.path.stem) or SPLIT_FOLDER.findall(self.path.parent.name)
        if words:
            return words[-1].lower()
        framed = framed_split(self.path.stem)
        return framed.split if framed else ""


def read_labels(
    table: Table, images: ImageIndex, wanted: Wanted, classes: Collection[str] = ()
) -> LabelTable:
    """Read what `table` says of `images`.

    Args:
        classes: The names of the classes, where these are known: the column that holds them is that of the labels.

    Raises:
        UsageError: Its columns cannot be told.
    """
    table = _with_header_as_row(table, images)
    columns = find_columns(table, images, wanted, classes)
    found = LabelTable(table, columns)
    image = table.columns.index(columns.image)
    label = table.columns.index(columns.label) if columns.label is not None else None
    label_name = table.columns.index(columns.label_name) if columns.label_name is not None else None
    split = table.columns.index(columns.split_name) if columns.split_name is not None else None
    onehot = [table.columns.index(name) for name in columns.onehot]
    for line, cells in table.lines:
        name = normal(str(cells[image] if cells[image] is not None else "")).strip()
        word = (
            ""
            if split is None
            else normal(str(cells[split] if cells[split] is not None else "")).strip()
        )
        of_split = columns.split.get(word, "")
        raw = cells[label] if label is not None else _hot(cells, onehot, columns.onehot)
        try:
            match = images.find(name, table.path)
            text = label_text(raw)
        except DataError as error:
            found.odd.append((line, name, "" if raw is None else str(raw), of_split, str(error)))
            continue
        if label_name is not None and text:
            found.names.setdefault(text, _text(cells[label_name]))
        found.rows.append(Row(match, text, of_split, line, name))
    return found


def _with_header_as_row(table: Table, images: ImageIndex) -> Table:
    """Return the table with its first line as a row where that names an image, and is no line of names."""
    if not table.named or any(
        name.lower() in (*FILE_COLUMNS, *LABEL_COLUMNS) for name in table.columns
    ):
        return table
    if any(
        _is_image(name, images, table.path) for name in table.columns if "." in name or "/" in name
    ):
        return without_names(table)
    return table


def _is_image(text: str, images: ImageIndex, path: Path) -> bool:
    try:
        images.find(text, path)
    except DataError:
        return False
    return True


def find_columns(
    table: Table, images: ImageIndex, wanted: Wanted, classes: Collection[str] = ()
) -> Columns:
    """Tell which columns of `table` say the file, the label and the split."""
    image = _image_column(table, images, wanted)
    label, label_name, onehot = _label_column(table, image, wanted, classes)
    sure = label is None or wanted.label is not None or label.lower().strip() in LABEL_COLUMNS
    sure = sure or (label is not None and {*texts(table.column(label))} <= {*classes})
    if image is None or (label is None and not onehot) or image == label:
        flag = "--image-column" if image is None or image == label else "--label-column"
        names = ", ".join(table.columns) or "(none)"
        raise UsageError(f"{table.path} has the columns {names}; say which one it is: {flag} NAME")
    used = [image, *([label] if label else onehot)]
    split_name, split, said = find_split_column(table, used, wanted)
    return Columns(image, label, label_name, onehot, sure, split_name, split, said)


def _named(table: Table, name: str, flag: str) -> str:
    """Return the column of `table` that a person named."""
    found = next((column for column in table.columns if fold(column) == fold(name)), None)
    if found is None:
        raise UsageError(
            f"{table.path} has no column {name!r}; it has {', '.join(table.columns)}: correct {flag}"
        )
    return found


def _image_column(table: Table, images: ImageIndex, wanted: Wanted) -> str | None:
    if wanted.image is not None:
        return _named(table, wanted.image, "--image-column")
    shares = {name: _share_of_images(table, name, images) for name in table.columns}
    usual = [name for known in FILE_COLUMNS for name in table.columns if name.lower() == known]
    sound = [name for name in usual if shares[name] > NAMES_IMAGES]
    if sound:
        return sound[0]
    # Numbers may be names of images (1.jpg) or labels: only where nothing else names images are they asked.
    other = [name for name in table.columns if shares[name] > NAMES_IMAGES]
    texts_first = sorted(
        other,
        key=lambda name: (
            all(text.isdigit() for text in texts(table.column(name), 20)),
            -shares[name],
        ),
    )
    if texts_first:
        return texts_first[0]
    return usual[0] if usual else None


def _share_of_images(table: Table, name: str, images: ImageIndex) -> float:
    """Return the share of a column's first cells that name an image, ambiguously or not."""
    place = table.columns.index(name)
    cells = texts([cells[place] for cells in table.sample])
    found = 0
    for cell in cells:
        try:
            images.find(cell, table.path)
            found += 1
        except AmbiguousName:
            found += 1
        except DataError:
            continue
    return found / len(cells) if cells else 0.0


def _label_column(
    table: Table, image: str | None, wanted: Wanted, classes: Collection[str]
) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Return the column of the labels, and one of their names in words; or the columns of 0 and 1 that are a class each."""
    if wanted.label is not None:
        return _named(table, wanted.label, "--label-column"), None, ()
    rest = [name for name in table.columns if name != image]
    usual = [name for known in LABEL_COLUMNS for name in rest if name.lower().strip() == known]
    if not usual and classes:
        usual = [
            name for name in rest if (cells := texts(table.column(name))) and {*cells} <= {*classes}
        ]
    if not usual and image is not None and len(table.columns) == 2:
        usual = [name for name in rest if _may_be_label(table, name, wanted)]
    if not usual:
        return None, None, _onehot_columns(table, rest)
    first = usual[0]
    for other in usual[1:]:
        if not _say_the_same(table.column(first), table.column(other)):
            raise UsageError(
                f"{table.path} has the columns {first} and {other}, which both may be the labels, and differ; say which one it is: "
                f"--label-column {first}, or --label-column {other}"
            )
    in_words = [
        name for name in usual[1:] if not all(text.isdigit() for text in texts(table.column(name)))
    ]
    if in_words and all(text.isdigit() for text in texts(table.column(first))):
        return first, in_words[0], ()
    return first, None, ()


def _may_be_label(table: Table, name: str, wanted: Wanted) -> bool:
    """Tell whether the other one of two columns may be the labels: not splits, and not a number or a name for each image."""
    if _looks_like_split(table, name, wanted) or SPLIT_LIST.search(table.path.stem):
        return False
    cells = texts(table.column(name), len(table.lines))
    return len(cells) <= 2 or len({*cells}) < len(cells)


def _say_the_same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Tell whether two columns name the same classes, each in its own words."""
    pairs = {(str(a), str(b)) for a, b in zip(one, other, strict=True)}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def _onehot_columns(table: Table, rest: Sequence[str]) -> tuple[str, ...]:
    """Return the columns that hold 0 or 1 alone, where there are several."""
    found = []
    for name in rest:
        cells = texts(table.column(name), len(table.lines))
        if (
            cells
            and len(cells) == len(table.lines)
            and {cell.lower() for cell in cells} <= TRUTHS.keys()
        ):
            found.append(name)
    marks = [name for name in found if table.named and not IS_SPLIT.fullmatch(name)]
    classes = [name for name in marks if name.lower() not in UNLABELED]
    return tuple(marks) if len(classes) > 1 else ()


def _hot(cells: Sequence[Any], places: Sequence[int], names: Sequence[str]) -> Any:
    """Return the names of the columns that are 1."""
    hot = [
        name
        for place, name in zip(places, names, strict=True)
        if TRUTHS[str(cells[place]).strip().lower()]
    ]
    return hot or None


def find_split_column(
    table: Table, used: Collection[str], wanted: Wanted
) -> tuple[str | None, dict[str, str], tuple[str, ...]]:
    """Return the column of the splits, what its cells mean, and what is to be said of others that look like one."""
    if wanted.split == NO_COLUMN:
        return None, {}, ()
    if wanted.split is not None:
        name = _named(table, wanted.split, "--split-column")
        return name, _cells_to_splits(table, name, wanted), ()
    found: dict[str, dict[str, str]] = {}
    said = []
    for name in table.columns:
        if name in used:
            continue
        known = _looks_like_split(table, name, wanted)
        if known:
            found[name] = _cells_to_splits(table, name, wanted)
        elif known is False:
            shown = ", ".join(sorted({*texts(table.column(name))})[:5])
            said.append(
                f"the column {name!r} of {table.path.name} ({shown}) is not read as splits; --split-column {name} would be"
            )
    if len(found) > 1:
        first, second = list(found)[:2]
        one = [found[first].get(_text(cell), "") for cell in table.column(first)]
        other = [found[second].get(_text(cell), "") for cell in table.column(second)]
        if one != other:
            raise UsageError(
                f"{table.path} has the columns {first} and {second}, which both look like splits, and differ; say which one it is: "
                f"--split-column {first}, or --split-column {NO_COLUMN}"
            )
    if not found:
        return None, {}, tuple(said)
    first = next(iter(found))
    return first, found[first], tuple(said)


def _text(cell: Any) -> str:
    return normal(str(cell if cell is not None else "")).strip()


def _looks_like_split(table: Table, name: str, wanted: Wanted) -> bool | None:
    """Tell whether a column says splits: True, False for one that is called so and holds something else, None for no."""
    cells = {*texts(table.column(name), len(table.lines))}
    words = {cell.lower() for cell in cells}
    known = words & (SPLIT_OF.keys() | wanted.splits.keys())
    called = name.lower().strip() in SPLIT_COLUMNS
    if (
        IS_SPLIT.fullmatch(name)
        and name.lower() not in SPLIT_COLUMNS
        and words
        and words <= TRUTHS.keys()
    ):
        return True
    if called and (known or name.lower().strip() in SURE_SPLITS) and words:
        return True
    if known and known == words and (len(words) > 1 or called):
        return True
    return False if called and words else None


def _cells_to_splits(table: Table, name: str, wanted: Wanted) -> dict[str, str]:
    """Return what each cell of a column of splits means."""
    cells = {text for text in map(_text, table.column(name)) if text}
    where = f"the column {name!r} of {table.path}"
    mark = IS_SPLIT.fullmatch(name)
    if all(cell.lower() in wanted.splits for cell in cells):
        return assign_splits(sorted(cells), wanted.splits, where)
    if mark and {cell.lower() for cell in cells} <= TRUTHS.keys():
        split = SPLIT_OF[mark[1].lower()]
        truths = [TRUTHS[_text(cell).lower()] for cell in table.column(name) if _text(cell)]
        if split != "train" and sum(truths) > len(truths) / 2:
            true, false = (
                sorted(cells, key=lambda cell: not TRUTHS[cell.lower()])[:2]
                if len(cells) > 1
                else (*cells, "0")
            )
            raise UsageError(
                f"{where} is true for {sum(truths):,} of {len(truths):,} rows: does it say the split {split}, or that an image is sound? "
                f"--split-column {name} with --split {true}={split} --split {false}=train reads it so, --split-column {NO_COLUMN} leaves it"
            )
        other = "test" if split == "train" else "train"
        return {cell: split if TRUTHS[cell.lower()] else other for cell in cells}
    return assign_splits(sorted(cells), wanted.splits, where)


def is_submission(path: Path) -> bool:
    """Tell whether the table is one of made-up answers, as Kaggle hands them out to be filled in."""
    return SUBMISSION.fullmatch(path.stem) is not None


def read_splits(table: Table, images: ImageIndex, wanted: Wanted) -> dict[int, str]:
    """Read which split each image belongs to, of a table that says that and no label.

    It is a list of one column in a file that is called as a split is (`meta/train.txt` of Food-101), or has a column of splits
    (`list_eval_partition.csv` of CelebA).

    Returns:
        image -> split; empty where the table says no splits.

    Raises:
        UsageError: The names of its splits are not known.
    """
    image = _image_column(table, images, wanted)
    if image is None or _share_of_images(table, image, images) <= NAMES_IMAGES:
        return {}
    word = LabelTable(table, Columns(image, None)).word
    if len(table.columns) == 1:
        split = wanted.splits.get(word) or SPLIT_OF.get(word, "")
        cells = [split] * len(table.lines)
    elif len(table.columns) == 2 and SPLIT_LIST.search(table.path.stem):
        other = next(column for column in table.columns if column != image)
        by_cell = _cells_to_splits(table, other, wanted)
        cells = [by_cell.get(_text(cell), "") for cell in table.column(other)]
    else:
        name, meanings, _ = find_split_column(table, [image], wanted)
        cells = [meanings.get(_text(cell), "") for cell in table.column(name)] if name else []
    found = {}
    for name_cell, split in zip(table.column(image), cells, strict=False):
        try:
            match = images.find(_text(name_cell), table.path)
        except DataError:
            continue
        if split:
            found[match.image] = split
    return found


def split_of_row(
    row: Row, table: LabelTable, images: ImageIndex, listed: Mapping[int, str], wanted: Wanted
) -> str:
    """Return the split of a row.

    It is what the row says itself, else what its table is called, else what a list of splits says, else the folder of its image.

    Raises:
        DataError: The table is that of one split, and the image lies in the folder of another one.
    """
    said = wanted.splits.get(table.word) or SPLIT_OF.get(table.word, "")
    lies = images.split_of(row.image)
    if row.split:
        return row.split
    if not said and row.image in listed:
        return listed[row.image]
    if said and lies and said != lies:
        raise DataError(
            f"{table.path.name} is a table of {said}, and the image lies in a folder of {lies}"
        )
    return said or lies or "train"
