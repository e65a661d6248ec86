"""The source of a folder whose images are labelled by tables.

`folder` chooses the tables; `source_of_tables` then resolves their rows to one label and one split
for each image, and notes every row that cannot be used.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wds_train.conversion.sources.image_index import ImageIndex
from wds_train.conversion.sources.imagefolder import begin_scans
from wds_train.conversion.sources.label_tables import Tables, named_images
from wds_train.conversion.sources.labels import (
    NO_LABEL,
    NO_TEXT,
    ONE_LABEL,
    Classes,
    classes_of,
    to_classes,
)
from wds_train.conversion.sources.layout import Layout
from wds_train.conversion.sources.names import NO_SPLIT, SPLIT_OF, SPLITS, in_any_case
from wds_train.conversion.sources.scan import UNLABELED, SplitScan
from wds_train.conversion.sources.source import Grouping, Source, Understood, Wanted
from wds_train.conversion.sources.splits import from_scans
from wds_train.conversion.sources.table import LabelTable, Row, split_of_row
from wds_train.errors import DataError, UsageError

# Images with several labels, and their share of all: more are no slips, the task is another one.
MANY = 10
SEVERAL_LABELS = 0.05
SHOWN_FOLDERS = 4  # in a sentence


@dataclass(frozen=True)
class Contents:
    """The contents of a folder of images.

    Attributes:
        root: The folder.
        images: The images below it.
        tables: The tables below it.
        layout: The meaning of its class folders; None if it has none.
        wanted: The flags that a person gave.
        outside: Files that lie outside the class folders.
    """

    root: Path
    images: ImageIndex
    tables: Tables
    layout: Layout | None
    wanted: Wanted
    outside: tuple[Path, ...] = ()

    def path(self, image: int) -> Path:
        """Return the path of an image."""
        return self.root / self.images.paths[image]

    def name(self, path: Path) -> str:
        """Return the name of a file for messages: its path below the folder, if it lies there."""
        if path.is_relative_to(self.root):
            return path.relative_to(self.root).as_posix()
        return str(path)


@dataclass(frozen=True)
class Labelled:
    """A row of a table that labels an image.

    Attributes:
        image: The image's place in `ImageIndex.paths`.
        text: Its label.
        split: Its split.
        origin: The row, for notes and messages.
    """

    image: int
    text: str
    split: str
    origin: str


def source_of_tables(chosen: Sequence[LabelTable], contents: Contents) -> Source:
    """Make the source that tables label.

    Args:
        chosen: The tables.
        contents: The folder that they lie in.

    Raises:
        UsageError: --class-level was given, or many images have several labels.
        DataError: The tables contradict each other, or know one label alone.
    """
    root = contents.root
    wanted = contents.wanted
    if wanted.class_level:
        raise UsageError(
            f"{contents.name(chosen[0].path)} labels the images of {root}, "
            "and --class-level is of class folders; leave it out, or read the folders: "
            "--source imagefolder"
        )
    _refuse_several_labels(chosen)

    # Find the rows that can be used; the others are noted.
    scans = begin_scans(SPLITS, wanted)
    labelled: dict[Path, list[Labelled]] = {}
    for each in chosen:
        labelled[each.path] = list(_resolve(each, contents, scans))
    _refuse_second_rows(labelled)

    # All texts together decide what the classes are.
    counts: Counter[str] = Counter()
    for rows in labelled.values():
        for row in rows:
            counts[row.text] += 1
    classes = _with_names(classes_of(counts, str(root), wanted.labels), chosen, wanted)
    if len(classes.infos) == 1:
        raise DataError(
            f"the tables of {root} know one label, {classes.infos[0].id!r}: "
            "there is nothing to tell apart"
        )

    # Add the images. The tables are part of the source: other ones make another dataset.
    for each in chosen:
        scans["train"].stamp.add(each.path.name, each.path.stat())
        for row in labelled[each.path]:
            _add_image(scans[row.split], row, classes, contents)
    _note_unused(chosen, contents, scans["train"])

    # A split that no row names is no split of this source.
    found = []
    for scan in scans.values():
        if scan.split == "train" or scan.notes or scan.rows.table().num_rows:
            found.append(scan)
    understood = _understand(chosen, classes.said, contents)
    source = from_scans(f"table {root.name}", classes.infos, found, understood)
    return _with_groups(source, chosen, contents)


def _add_image(found: SplitScan, row: Labelled, classes: Classes, contents: Contents) -> None:
    """Add the image of a row, or note that it has no label."""
    label = classes.numbers[row.text]
    if label == NO_LABEL:
        found.note(row.origin, "ignored", UNLABELED)
    else:
        found.add_file(label, contents.path(row.image), contents.images.paths[row.image])


def _note_unused(chosen: Sequence[LabelTable], contents: Contents, found: SplitScan) -> None:
    """Note the tables that are not used, and the images that no table names."""
    for path, cause in contents.tables.ignored:
        found.note(path, "ignored", cause)
    count = len(contents.images) - len(named_images(chosen))
    if count:
        where = _where_most(chosen, contents.images)
        found.note(contents.root, "ignored", f"{count} images that no table names{where}")


def _refuse_several_labels(chosen: Sequence[LabelTable]) -> None:
    """Raise `UsageError` if many images of a table have several labels."""
    for each in chosen:
        names: dict[int, str] = {}
        texts: dict[int, set[str]] = {}
        for row in each.rows:
            names.setdefault(row.image, row.name)
            texts.setdefault(row.image, set()).add(row.text)

        # Several labels stand in one cell, or in several rows.
        several = []
        for _, name, _, _, cause in each.odd:
            if ONE_LABEL in cause:
                several.append(name)
        total = len(texts) + len(several)
        for image, found in texts.items():
            if len(found - {NO_TEXT}) > 1:
                several.append(names[image])
        if len(several) >= MANY and len(several) > SEVERAL_LABELS * total:
            raise UsageError(
                f"{each.path} gives several labels to {len(several):,} images, "
                f"such as {several[0]}; {ONE_LABEL}. Keep one row for each image, "
                "or name a column that holds one: --label-column NAME"
            )


def _where_most(chosen: Sequence[LabelTable], images: ImageIndex) -> str:
    """Return in words the folder that holds most of the images that no table names."""
    # A forgotten table shows as one folder with most of them.
    named = named_images(chosen)
    folders: Counter[str] = Counter()
    for image, path in enumerate(images.paths):
        if image not in named:
            folders[path.rpartition("/")[0]] += 1
    name, count = folders.most_common(1)[0]
    if not name:
        return ""
    return f", {count} of them in {name}/"


def _with_names(classes: Classes, chosen: Sequence[LabelTable], wanted: Wanted) -> Classes:
    """Return the classes with the names that a second column gives to numbers."""
    names: dict[str, str] = {}
    for each in chosen:
        names.update(each.names)
    if wanted.labels.classes or not names:
        return classes
    # Several spellings may be one class, so names go by its id.
    by_id = {}
    for text, number in classes.numbers.items():
        if text in names:
            by_id[classes.infos[number].id] = names[text]
    return replace(classes, infos=to_classes([entry.id for entry in classes.infos], by_id))


def _understand(chosen: Sequence[LabelTable], said: list[str], contents: Contents) -> Understood:
    """Describe how the tables were read.

    Args:
        chosen: The tables.
        said: Decisions about the labels, a sentence each.
        contents: The folder.
    """
    names = ", ".join(contents.name(each.path) for each in chosen)
    columns = chosen[0].columns
    label = f"the {len(columns.onehot)} columns of 0 and 1"
    if columns.label:
        label = f"the column {columns.label!r}"

    # The last that applies decides, as in `split_of_row`.
    splits = "names of tables and folders, where these are splits' names"
    if contents.tables.listed:
        splits = ", ".join(map(contents.name, contents.tables.lists))
    if columns.split_name:
        splits = f"the column {columns.split_name!r}"

    doubtful: list[str] = []
    for each in chosen:
        doubtful += each.columns.said
    if contents.layout is not None:
        folders = sorted({part.name for part in contents.layout.parts})
        doubtful.append(
            f"the folders ({', '.join(folders[:SHOWN_FOLDERS])}, ...) are not the classes, "
            "the table is; --source imagefolder takes the folders"
        )
    return Understood(
        layout=f"images named in the column {columns.image!r} of {names}; splits by {splits}",
        labels=f"{label} of {names}",
        said=said,
        doubtful=doubtful,
    )


def _resolve(
    table: LabelTable, contents: Contents, scans: Mapping[str, SplitScan]
) -> Iterator[Labelled]:
    """Yield the usable rows of a table, at most one for each image, and note the others.

    Args:
        table: The table.
        contents: The folder that it lies in.
        scans: Get the notes, by split.
    """
    images = contents.images
    wanted = contents.wanted
    _note_odd(table, scans, wanted)

    # Collect the labels of each image: several contradict each other.
    deepest = _deepest(table)
    texts: dict[int, dict[str, int]] = {}
    for row in table.rows:
        if _is_meant(row, deepest) and row.text != NO_TEXT:
            texts.setdefault(row.image, {}).setdefault(row.text, row.line)

    # Take the first usable row of each image.
    seen: set[int] = set()
    left_out: Counter[str] = Counter()
    for row in table.rows:
        origin = f"{table.path}, line {row.line}: {row.name}"
        try:
            split = split_of_row(row, table, images, contents.tables.listed, wanted)
        except DataError as error:
            scans["train"].note(origin, "left out", str(error))
            continue
        if split == NO_SPLIT:
            left_out[images.paths[row.image].rpartition("/")[0]] += 1
            continue
        fate = _fate(row, split, deepest, texts.get(row.image, {}), seen)
        if fate is not None:
            scans[split].note(origin, *fate)
        else:
            seen.add(row.image)
            yield Labelled(row.image, row.text, split, origin)

    # One note a folder: there may be a hundred thousand such rows.
    for name, count in left_out.items():
        where = name or "the source"
        cause = f"{count} rows of images in {where}, which are left out of every split"
        scans["train"].note(table.path, "ignored", cause)


def _note_odd(table: LabelTable, scans: Mapping[str, SplitScan], wanted: Wanted) -> None:
    """Note the rows that name no image, or hold no label."""
    said = wanted.splits.get(table.word) or SPLIT_OF.get(table.word, "")
    for line, name, label, split, cause in table.odd:
        found = scans.get(split or said or "train", scans["train"])
        # Test images are often listed without a label: nobody misses them.
        fate = "left out"
        if found.split == "test" and not label.strip():
            fate = "ignored"
        found.note(f"{table.path}, line {line}: {name}", fate, cause)


def _deepest(table: LabelTable) -> dict[int, int]:
    """Return how many parts of each image's path agree with the row that names it best."""
    deepest: dict[int, int] = {}
    for row in table.rows:
        deepest[row.image] = max(row.match.parts, deepest.get(row.image, 0))
    return deepest


def _is_meant(row: Row, deepest: Mapping[int, int]) -> bool:
    """Return True if a row means the image that was found for it.

    A row of cat/0.jpg does not mean dog/0.jpg if another row names that.
    """
    return row.match.whole or row.match.parts == deepest[row.image]


def _fate(
    row: Row, split: str, deepest: Mapping[int, int], texts: Mapping[str, int], seen: set[int]
) -> tuple[str, str] | None:
    """Return what becomes of a row that is not used, and why; None for a row that is used.

    Args:
        row: The row.
        split: Its split.
        deepest: See `_deepest`.
        texts: Each label that the table gives to its image, and the line that does.
        seen: The images that have a row already.
    """
    # The same name in another folder is another image.
    if not _is_meant(row, deepest):
        return "left out", "there is no such image"
    if len(texts) > 1:
        lines = " and ".join(f"{text!r} in line {line}" for text, line in texts.items())
        return "left out", f"it is labelled {lines}; one label for each image is what is trained on"
    # A row without a label says nothing more if another row has one.
    if row.image in seen or (row.text == NO_TEXT and texts):
        return "ignored", "the same row once more"
    if row.text == NO_TEXT and split == "test":
        return "ignored", "a test image without a label"
    return None


def _refuse_second_rows(labelled: Mapping[Path, Sequence[Labelled]]) -> None:
    """Raise `DataError` for an image that two tables name, in two splits or with two labels."""
    seen: dict[int, Labelled] = {}
    for rows in labelled.values():
        for row in rows:
            other = seen.setdefault(row.image, row)
            if other is not row:
                raise DataError(
                    f"one image is named twice: {other.origin} ({other.split}, {other.text!r}) "
                    f"and {row.origin} ({row.split}, {row.text!r}); "
                    "keep one of the rows, or name one table: --table FILE"
                )


def _with_groups(source: Source, chosen: Sequence[LabelTable], contents: Contents) -> Source:
    """Return the source with the groups of the column that --group names.

    Without such a column in each of the tables --group is a pattern, and the source stays as it is.
    """
    what = contents.wanted.group or ""
    groups: dict[str, str] = {}
    for each in chosen:
        column = in_any_case(what, each.table.columns)
        if column is None:
            return source
        # Rows are a part of the table's lines: find the cell of each by its line.
        cells = {}
        for (line, _), cell in zip(each.table.lines, each.table.column(column), strict=True):
            cells[line] = str(cell)
        for row in each.rows:
            groups[str(contents.path(row.image))] = cells[row.line]
    return replace(source, grouping=Grouping(what, groups))
