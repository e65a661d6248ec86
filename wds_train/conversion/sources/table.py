"""Images that a table labels: its columns of files, labels and splits, and the rows that are read.

Nothing is taken for a label because it stands in the right place. The column of the files is the
one whose cells name images that are here, the column of the labels one with a usual name. Any other
that could be one is refused by name. `label_tables` reads the tables of a folder with this.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

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
)
from wds_train.conversion.sources.source import Wanted
from wds_train.conversion.sources.tables import SAMPLE, Table, cell_text, texts, without_names
from wds_train.errors import DataError, UsageError

# Usual names of columns, in small letters; the first that is there comes first.
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
# Cells that say yes or no, in small letters.
TRUTHS = {"1": True, "0": False, "1.0": True, "0.0": False, "true": True, "false": False}
# A column that is true for the images of one split: is_train, valid_set.
IS_SPLIT = re.compile(
    rf"(?:is|in|for)?[-_ ]?({'|'.join(chain.from_iterable(SPLITS.values()))})(?:ing)?"
    r"(?:[-_ ]?(?:set|image|img|split|flag))?",
    re.IGNORECASE,
)
NAMES_IMAGES = 0.5  # of a column's cells, above which it is the column of the files
# list_eval_partition.txt
SPLIT_LIST = re.compile(r"(?:^|[-_ ])(?:split|partition|fold)s?(?:[-_ .]|$)", re.IGNORECASE)
# Kaggle's sample_submission.csv: every label in it is made up.
SUBMISSION = re.compile(r".*submission.*", re.IGNORECASE)
NO_COLUMN = "none"  # the value of --split-column for a table without splits


class OddRow(NamedTuple):
    """A row that cannot be used.

    Attributes:
        line: Its line in the file.
        name: Its cell in the column of the files.
        label: Its label as it stands there.
        split: The split that it says; empty if none.
        cause: Why it cannot be used.
    """

    line: int
    name: str
    label: str
    split: str
    cause: str


class SplitColumn(NamedTuple):
    """The column of a table that says splits.

    Attributes:
        name: Its name; None if there is no such column.
        meanings: cell -> split.
        said: Sentences for the person about other columns that look like one.
    """

    name: str | None
    meanings: dict[str, str]
    said: tuple[str, ...] = ()


class _LabelColumns(NamedTuple):
    """The columns of the labels; see `Columns`."""

    label: str | None
    label_name: str | None = None
    onehot: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read.

    Attributes:
        image: The column of the files.
        label: The column of the labels; None if there are `onehot` columns instead.
        label_name: A column that says the same in words, if `label` holds numbers.
        onehot: Several columns of 0 and 1, each for a class.
        sure: True if the column of the labels has a usual name, and is not just the other one of
            two.
        split_name: The column of the splits, if there is one.
        split: Its cells -> split.
        said: Sentences for the person about other columns.
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
    """A row that labels an image.

    Attributes:
        match: The image.
        text: Its label.
        split: Its split; empty if the row does not say one.
        line: The row's line in the file.
        name: The image's name in the table.
    """

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
        table: The table.
        columns: The columns that were read.
        rows: The rows that label an image, in their order.
        names: The human name of each label, if a column says it.
        odd: The rows that cannot be used.
    """

    table: Table
    columns: Columns
    rows: list[Row] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    odd: list[OddRow] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The file."""
        return self.table.path

    @property
    def images(self) -> set[int]:
        """The images that have a row."""
        return {row.image for row in self.rows}

    @property
    def word(self) -> str:
        """The split's word in the name of the table or of its folder; empty if there is none."""
        return _split_word(self.path)


def _split_word(path: Path) -> str:
    """Return the word of a split in the name of a file or of its folder; empty without one."""
    words = SPLIT_WORD.findall(path.stem) or SPLIT_FOLDER.findall(path.parent.name)
    if words:
        return words[-1].lower()
    framed = framed_split(path.stem)
    if framed is None:
        return ""
    return framed.split


def read_labels(
    table: Table, images: ImageIndex, wanted: Wanted, classes: Collection[str] = ()
) -> LabelTable:
    """Read the labels of images from a table.

    Args:
        table: The table.
        images: The images that it may name.
        wanted: The flags.
        classes: The names of the classes, if they are known: a column of these holds the labels.

    Raises:
        UsageError: It is not clear which columns to read.
    """
    # Find the columns.
    table = _with_header_as_row(table, images)
    columns = find_columns(table, images, wanted, classes)
    image = table.columns.index(columns.image)
    label = _place(table, columns.label)
    label_name = _place(table, columns.label_name)
    split = _place(table, columns.split_name)
    onehot = list(map(table.columns.index, columns.onehot))

    # Read the rows.
    found = LabelTable(table, columns)
    for line, cells in table.lines:
        name = cell_text(cells[image])
        word = ""
        if split is not None:
            word = cell_text(cells[split])
        of_split = columns.split.get(word, "")
        if label is not None:
            raw = cells[label]
        else:
            raw = _hot_columns(cells, onehot, columns.onehot)
        try:
            match = images.find(name, table.path)
            text = label_text(raw)
        except DataError as error:
            shown = ""
            if raw is not None:
                shown = str(raw)
            found.odd.append(OddRow(line, name, shown, of_split, str(error)))
            continue
        if label_name is not None and text:
            found.names.setdefault(text, cell_text(cells[label_name]))
        found.rows.append(Row(match, text, of_split, line, name))
    return found


def _place(table: Table, name: str | None) -> int | None:
    """Return the place of a column; None for no column."""
    if name is None:
        return None
    return table.columns.index(name)


def _with_header_as_row(table: Table, images: ImageIndex) -> Table:
    """Return the table with its first line as a row, if that names an image and no columns."""
    if not table.named:
        return table
    for name in table.columns:
        if name.lower() in (*FILE_COLUMNS, *LABEL_COLUMNS):
            return table
    for name in table.columns:
        # A bare word may be the name of a column, and of an image without its suffix, too.
        if ("." in name or "/" in name) and _is_image(name, images, table.path):
            return without_names(table)
    return table


def _is_image(text: str, images: ImageIndex, path: Path) -> bool:
    """Return True if a text in the table at `path` names exactly one image."""
    try:
        images.find(text, path)
    except DataError:
        return False
    return True


def find_columns(
    table: Table, images: ImageIndex, wanted: Wanted, classes: Collection[str] = ()
) -> Columns:
    """Find the columns of a table that say the file, the label and the split.

    Args:
        table: The table.
        images: The images that it may name.
        wanted: The flags.
        classes: The names of the classes, if they are known.

    Raises:
        UsageError: It is not clear which columns these are.
    """
    image = _image_column(table, images, wanted)
    label, label_name, onehot = _label_columns(table, image, wanted, classes)
    has_labels = label is not None or bool(onehot)
    if image is None or not has_labels or image == label:
        flag = "--label-column"
        if image is None or image == label:
            flag = "--image-column"
        names = ", ".join(table.columns) or "(none)"
        raise UsageError(f"{table.path} has the columns {names}; say which one it is: {flag} NAME")
    sure = label is None or _is_sure(table, label, wanted, classes)

    # The column of the splits is one of the others.
    used = [image, *onehot]
    if label:
        used = [image, label]
    split_name, split, said = find_split_column(table, used, wanted)
    return Columns(image, label, label_name, onehot, sure, split_name, split, said)


def _is_sure(table: Table, label: str, wanted: Wanted, classes: Collection[str]) -> bool:
    """Return True if a column holds labels for certain."""
    if wanted.label is not None or label.lower().strip() in LABEL_COLUMNS:
        return True
    return {*texts(table.column(label))} <= {*classes}


def _find_named(table: Table, name: str, flag: str) -> str:
    """Return the column that a person named with a flag, in any case.

    Raises:
        UsageError: There is none.
    """
    for column in table.columns:
        if fold(column) == fold(name):
            return column
    raise UsageError(
        f"{table.path} has no column {name!r}; it has {', '.join(table.columns)}: correct {flag}"
    )


def _image_column(table: Table, images: ImageIndex, wanted: Wanted) -> str | None:
    """Return the column of the files; None if there is none."""
    if wanted.image is not None:
        return _find_named(table, wanted.image, "--image-column")

    # Prefer a column with a usual name whose cells name images.
    shares = {}
    for name in table.columns:
        shares[name] = _share_of_images(table, name, images)
    usual = []
    for known in FILE_COLUMNS:
        for name in table.columns:
            if name.lower() == known:
                usual.append(name)
    for name in usual:
        if shares[name] > NAMES_IMAGES:
            return name

    # Otherwise take any that names images. Numbers come last: they may name images (1.jpg), or be
    # labels.
    others = [name for name in table.columns if shares[name] > NAMES_IMAGES]
    if others:
        return min(
            others,
            key=lambda name: (_are_digits(texts(table.column(name), 20)), -shares[name]),
        )
    if usual:
        return usual[0]
    return None


def _are_digits(cells: Sequence[str]) -> bool:
    return all(map(str.isdigit, cells))


def _share_of_images(table: Table, name: str, images: ImageIndex) -> float:
    """Return the share of a column's first cells that name an image, ambiguously or not."""
    cells = texts(table.column(name, SAMPLE))
    if not cells:
        return 0.0
    found = 0
    for cell in cells:
        try:
            images.find(cell, table.path)
            found += 1
        except AmbiguousName:
            found += 1
        except DataError:
            continue
    return found / len(cells)


def _label_columns(
    table: Table, image: str | None, wanted: Wanted, classes: Collection[str]
) -> _LabelColumns:
    """Return the columns that say the labels.

    Args:
        table: The table.
        image: The column of the files.
        wanted: The flags.
        classes: The names of the classes, if they are known.

    Raises:
        UsageError: Two columns may be the labels, and differ.
    """
    # A flag decides.
    if wanted.label is not None:
        return _LabelColumns(_find_named(table, wanted.label, "--label-column"))

    rest = [name for name in table.columns if name != image]
    usual = _usual_label_columns(rest)
    if not usual and classes:
        usual = [name for name in rest if _holds_classes(table, name, classes)]
    if not usual and image is not None and len(table.columns) == 2:
        usual = [name for name in rest if _may_be_label(table, name, wanted)]
    if not usual:
        return _LabelColumns(None, onehot=_onehot_columns(table, rest))

    # Several are fine if they say the same, one in numbers and one in words perhaps.
    first = usual[0]
    for other in usual[1:]:
        if not say_the_same(table.column(first), table.column(other)):
            raise UsageError(
                f"{table.path} has the columns {first} and {other}, "
                "which both may be the labels, and differ; say which one it is: "
                f"--label-column {first}, or --label-column {other}"
            )
    if _are_digits(texts(table.column(first))):
        for other in usual[1:]:
            if not _are_digits(texts(table.column(other))):
                return _LabelColumns(first, other)
    return _LabelColumns(first)


def _usual_label_columns(names: list[str]) -> list[str]:
    """Return the names that are usual for labels, the most usual first."""
    found = []
    for known in LABEL_COLUMNS:
        for name in names:
            if name.lower().strip() == known:
                found.append(name)
    return found


def _holds_classes(table: Table, name: str, classes: Collection[str]) -> bool:
    """Return True if all cells of a column are `classes`, and some are filled."""
    cells = {*texts(table.column(name))}
    return bool(cells) and cells <= {*classes}


def _may_be_label(table: Table, name: str, wanted: Wanted) -> bool:
    """Return True if the other one of two columns may hold the labels.

    It must not hold splits, nor a number or a name of its own for each image.
    """
    if _looks_like_split(table, name, wanted) or SPLIT_LIST.search(table.path.stem):
        return False
    # Labels repeat; numbers and names of images do not.
    cells = texts(table.column(name), len(table.lines))
    return len(cells) <= 2 or len({*cells}) < len(cells)


def say_the_same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Return True if two lists of labels name the same classes, each in its own words.

    Then every label of one has a single partner in the other.

    Args:
        one: The labels of some images.
        other: Labels of the same images, in the same order.
    """
    pairs = set(zip(map(str, one), map(str, other), strict=True))
    return len(pairs) == len(set(map(str, one))) == len(set(map(str, other)))


def _onehot_columns(table: Table, rest: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of 0 and 1, if there are several classes among them."""
    # Columns without names cannot name classes.
    if not table.named:
        return ()
    marks = []
    for name in rest:
        if not IS_SPLIT.fullmatch(name) and _holds_truths(table, name):
            marks.append(name)
    classes = [name for name in marks if name.lower() not in UNLABELED]
    if len(classes) > 1:
        return tuple(marks)
    return ()


def _holds_truths(table: Table, name: str) -> bool:
    """Return True if every cell of a column is 0 or 1, or a truth value."""
    cells = texts(table.column(name), len(table.lines))
    if not cells or len(cells) < len(table.lines):
        return False
    return set(map(str.lower, cells)) <= TRUTHS.keys()


def _hot_columns(
    cells: Sequence[Any], places: Sequence[int], names: Sequence[str]
) -> list[str] | None:
    """Return the names of the columns that are 1 in a row; None if none is.

    Args:
        cells: The row.
        places: The places of the columns of 0 and 1.
        names: Their names.
    """
    hot = []
    for place, name in zip(places, names, strict=True):
        if TRUTHS[str(cells[place]).strip().lower()]:
            hot.append(name)
    return hot or None


def find_split_column(table: Table, used: Collection[str], wanted: Wanted) -> SplitColumn:
    """Find the column of a table that says splits.

    Args:
        table: The table.
        used: The columns of the files and labels.
        wanted: The flags.

    Raises:
        UsageError: Two columns say different splits, or it is not clear what the cells mean.
    """
    # A flag decides.
    if wanted.split == NO_COLUMN:
        return SplitColumn(None, {})
    if wanted.split is not None:
        name = _find_named(table, wanted.split, "--split-column")
        return SplitColumn(name, _cells_to_splits(table, name, wanted))

    # Otherwise look at every column that is not used yet.
    found: dict[str, dict[str, str]] = {}
    said = []
    for name in table.columns:
        if name in used:
            continue
        if _looks_like_split(table, name, wanted):
            found[name] = _cells_to_splits(table, name, wanted)
        elif _is_called_split(name):
            cells = sorted({*texts(table.column(name))})
            if cells:
                said.append(
                    f"the column {name!r} of {table.path.name} ({', '.join(cells[:5])}) "
                    f"is not read as splits; --split-column {name} would be"
                )

    if not found:
        return SplitColumn(None, {}, tuple(said))
    _refuse_second_column(table, found)
    first = next(iter(found))
    return SplitColumn(first, found[first], tuple(said))


def _refuse_second_column(table: Table, found: Mapping[str, Mapping[str, str]]) -> None:
    """Raise `UsageError` if two columns say different splits.

    Args:
        table: The table.
        found: The columns that say splits, and the meaning of their cells.
    """
    if len(found) < 2:
        return
    first, second = list(found)[:2]
    one = _translate_cells(table, first, found[first])
    other = _translate_cells(table, second, found[second])
    if one != other:
        raise UsageError(
            f"{table.path} has the columns {first} and {second}, "
            "which both look like splits, and differ; say which one it is: "
            f"--split-column {first}, or --split-column {NO_COLUMN}"
        )


def _translate_cells(table: Table, name: str, meanings: Mapping[str, str]) -> list[str]:
    """Return the split that each cell of a column says; empty if it says none."""
    return [meanings.get(cell_text(cell), "") for cell in table.column(name)]


def _is_called_split(name: str) -> bool:
    return name.lower().strip() in SPLIT_COLUMNS


def _looks_like_split(table: Table, name: str, wanted: Wanted) -> bool:
    """Return True if a column says splits, judged by its name and its cells."""
    words = set(map(str.lower, texts(table.column(name), len(table.lines))))
    if not words:
        return False
    # is_train, with 0 and 1.
    is_mark = IS_SPLIT.fullmatch(name) and name.lower() not in SPLIT_COLUMNS
    if is_mark and words <= TRUTHS.keys():
        return True
    known = words & (SPLIT_OF.keys() | wanted.splits.keys())
    if _is_called_split(name):
        is_sure = name.lower().strip() in SURE_SPLITS
        return is_sure or bool(known)
    # A column of another name that holds one word only may be anything.
    return known == words and len(words) > 1


def _cells_to_splits(table: Table, name: str, wanted: Wanted) -> dict[str, str]:
    """Return the split that each cell of a column means.

    Raises:
        UsageError: The meaning of a cell is not known.
    """
    cells = set(map(cell_text, table.column(name))) - {""}
    words = set(map(str.lower, cells))
    where = f"the column {name!r} of {table.path}"
    mark = IS_SPLIT.fullmatch(name)
    if mark is None or words <= wanted.splits.keys() or not words <= TRUTHS.keys():
        return assign_splits(sorted(cells), wanted.splits, where)

    # is_train, with 0 and 1. Validation and test images are the fewer ones: else, `valid` may
    # as well say that an image is sound.
    split = SPLIT_OF[mark[1].lower()]
    filled = filter(None, map(cell_text, table.column(name)))
    truths = [TRUTHS[text.lower()] for text in filled]
    if split != "train" and sum(truths) > len(truths) / 2:
        by_truth = sorted(cells, key=lambda cell: not TRUTHS[cell.lower()])
        true, false = [*by_truth, "0"][:2]
        raise UsageError(
            f"{where} is true for {sum(truths):,} of {len(truths):,} rows: "
            f"does it say the split {split}, or that an image is sound? "
            f"--split-column {name} with --split {true}={split} --split {false}=train reads it so, "
            f"--split-column {NO_COLUMN} leaves it"
        )
    # Images that are not of this split are of its usual partner.
    other = "train"
    if split == "train":
        other = "test"
    meanings = {}
    for cell in cells:
        meanings[cell] = split if TRUTHS[cell.lower()] else other
    return meanings


def is_submission(path: Path) -> bool:
    """Return True for a table of made-up answers, as Kaggle hands them out to be filled in."""
    return SUBMISSION.fullmatch(path.stem) is not None


def read_splits(table: Table, images: ImageIndex, wanted: Wanted) -> dict[int, str]:
    """Read the split of each image from a table that says splits and no labels.

    It is a list of one column in a file that is named for a split (`meta/train.txt` of Food-101),
    or has a column of splits (`list_eval_partition.csv` of CelebA).

    Args:
        table: The table.
        images: The images that it may name.
        wanted: The flags.

    Returns:
        image -> split; empty if the table says no splits.

    Raises:
        UsageError: The names of its splits are not known.
    """
    image = _image_column(table, images, wanted)
    if image is None or _share_of_images(table, image, images) <= NAMES_IMAGES:
        return {}
    splits = _splits_of_rows(table, image, wanted)
    found = {}
    # Images that are not here are passed over: the list may be of a larger dataset.
    for name, split in zip(table.column(image), splits, strict=False):
        try:
            match = images.find(cell_text(name), table.path)
        except DataError:
            continue
        if split:
            found[match.image] = split
    return found


def _splits_of_rows(table: Table, image: str, wanted: Wanted) -> list[str]:
    """Return the split of each row; empty if the table says no splits.

    Args:
        table: The table.
        image: The column of the files.
        wanted: The flags.
    """
    # A bare list of images, in a file named for a split.
    if len(table.columns) == 1:
        word = _split_word(table.path)
        split = wanted.splits.get(word) or SPLIT_OF.get(word, "")
        return [split] * len(table.lines)
    # Image and split, in a file named for splits.
    if len(table.columns) == 2 and SPLIT_LIST.search(table.path.stem):
        first, second = table.columns
        other = second if first == image else first
        return _translate_cells(table, other, _cells_to_splits(table, other, wanted))
    name, meanings, _ = find_split_column(table, [image], wanted)
    if not name:
        return []
    return _translate_cells(table, name, meanings)


def split_of_row(
    row: Row, table: LabelTable, images: ImageIndex, listed: Mapping[int, str], wanted: Wanted
) -> str:
    """Return the split of a row.

    It is the split that the row says, else the one in its table's name, else that of a list of
    splits, else that of the image's folder.

    Args:
        row: The row.
        table: Its table.
        images: The images.
        listed: image -> split, of lists of splits.
        wanted: The flags.

    Raises:
        DataError: The table is named for one split, and the image lies in the folder of another.
    """
    # Asked even if the row says its split: `wanted.splits` keeps which words occur.
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
