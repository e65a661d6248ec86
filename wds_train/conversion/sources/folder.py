"""A folder of images: read by its class folders, by a table that labels the images, or by both.

A table that labels nearly all images decides, wherever they lie. Otherwise the class folders do, and a table may label the
images of a split that has none (`val_annotations.txt` of Tiny ImageNet) or say which image belongs to which split.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wds_train.conversion.sources.image_index import ImageIndex
from wds_train.conversion.sources.imagefolder import (
    AmbiguousLayout,
    Layout,
    add_class,
    folder_classes,
    folder_source,
    folder_splits,
    note_layout,
    read_layout,
)
from wds_train.conversion.sources.label_tables import (
    NEARLY_ALL,
    Tables,
    choose_tables,
    named_images,
    read_tables,
    trainable_images,
)
from wds_train.conversion.sources.labels import (
    NO_LABEL,
    NO_TEXT,
    ONE_LABEL,
    Classes,
    classes_of,
    plain_number,
    to_classes,
)
from wds_train.conversion.sources.names import NO_SPLIT, SPLIT_OF, SPLITS, normal
from wds_train.conversion.sources.scan import UNLABELED, SplitScan
from wds_train.conversion.sources.source import Grouping, Source, Understood, Wanted
from wds_train.conversion.sources.splits import from_scans
from wds_train.conversion.sources.table import NO_COLUMN, LabelTable, Row, split_of_row
from wds_train.conversion.sources.tables import decode, find_tables
from wds_train.conversion.sources.tree import DiskFiles, Folder, read_tree
from wds_train.errors import DataError, UsageError

MANY = 10  # images with several labels, and their share, above which these are no slips
SEVERAL_LABELS = 0.05
# train_test_split.txt, list_patition_label.txt, split_zhou.json, train.lst, setid.mat.
SPLIT_FILE = re.compile(
    r"(?:^|[-_ .])(?:splits?|part?itions?|setid|train|training|test|testing|val|validation)(?:[-_ .]|list|$)",
    re.IGNORECASE,
)
SURE_SPLIT_FILE = re.compile(
    r"(?:^|[-_ .])(?:splits?|part?itions?|setid)(?:[-_ .]|$)", re.IGNORECASE
)
SPLIT_SUFFIXES = (".txt", ".lst", ".list", ".json", ".mat", ".csv", ".tsv", ".npy", ".npz")
NAMED = 3  # images that a file called train or test names, to be a list of them
MOST_READ = 4 << 20  # bytes of such a file
UNREAD_TABLES = (
    ".xlsx",
    ".xls",
    ".ods",
    ".mat",
    ".pkl",
    ".h5",
    ".hdf5",
    ".npy",
    ".npz",
    ".db",
    ".sqlite",
)


@dataclass(frozen=True)
class Contents:
    """What lies in a folder of images.

    Attributes:
        root: The folder.
        images: The images below it.
        tables: The tables below it.
        layout: How its class folders are read; None where it has none.
        wanted: What a person said.
        beside: Files that lie beside the class folders.
    """

    root: Path
    images: ImageIndex
    tables: Tables
    layout: Layout | None
    wanted: Wanted
    beside: tuple[Path, ...] = ()

    def path(self, image: int) -> Path:
        """Return the path of an image."""
        return self.root / self.images.paths[image]

    def name(self, path: Path) -> str:
        """Return how a message calls a file of the folder."""
        return (
            path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)
        )


@dataclass(frozen=True)
class Labelled:
    """What a table says of one image."""

    image: int
    text: str
    split: str
    origin: str


def folder(root: Path, wanted: Wanted) -> Source:
    """Read the folder `root`, by whatever says the labels of its images.

    Raises:
        DataError, UsageError: Nothing does, or two things do and differ.
    """
    tree = read_tree(root)
    layout: Layout | None = None
    refusal: DataError | UsageError | None = None
    try:
        layout = read_layout(tree, wanted)
    except (DataError, UsageError) as error:
        refusal = error

    # Without tables the class folders decide alone.
    paths = _outside_classes(_table_files(tree, wanted), layout)
    beside = _files_beside(tree, layout)
    if layout is None and (not paths or not tree.total):
        raise _with_hint(refusal, tree)
    if layout is not None and not paths and not any(map(_may_say_splits, beside)):
        _refuse_columns(wanted, root)
        return folder_source(layout, root.name, DiskFiles(), wanted)

    # A table decides where the folders are no classes; the folders do where it says the same, or nothing certain.
    images = ImageIndex(root, folder_splits(tree, wanted))
    names = {normal(part.name) for part in layout.parts} if layout else set[str]()
    tables = read_tables(paths, images, wanted, names)
    contents = Contents(root, images, tables, layout, wanted, tuple(beside))
    chosen = choose_tables(tables, images, wanted)
    if layout is not None:
        return _by_both(chosen, contents, layout)
    unclear = isinstance(refusal, AmbiguousLayout)
    poor = sum(len(each.rows) for each in chosen) < sum(len(each.odd) for each in chosen)
    if chosen and (chosen[0].rows or len(tables.usable) == 1) and not (unclear and poor):
        return _from_tables(chosen, contents)
    raise tables.refusals[0] if tables.refusals and not poor else _with_hint(refusal, tree)


def _by_both(chosen: Sequence[LabelTable], contents: Contents, layout: Layout) -> Source:
    """Read a folder that has class folders and tables: by the one that says the classes.

    Raises:
        UsageError: Both may.
    """
    if contents.wanted.table and chosen:
        return _from_tables(chosen, contents)
    sure = [each for each in chosen if each.columns.sure]
    if not sure:
        return _beside_unsure_tables(chosen, contents, layout)

    # Labels that go with the folders are the folders' names; labels that cross them are the classes, and the folders are not.
    trainable = trainable_images(contents.images)
    named = named_images(sure)
    nearly_all = bool(named) and len(named & trainable) >= NEARLY_ALL * len(trainable)
    relation = _relation(sure, contents, layout)
    if relation == SAME and not (
        layout.lies_below and nearly_all
    ):  # keys are then paths, as they were before
        layout.said.append(f"{sure[0].path.name} labels the images as their folders do")
        return _from_folders(layout, contents)
    if relation == SAME_CLASSES and not nearly_all:
        _add_splits(sure, contents)
        return _from_folders(layout, contents)
    if nearly_all or (relation == CROSSES and _names_all_it_touches(sure, contents)):
        return _from_tables(sure, contents)
    ambiguous = any("it may be" in row[-1] for each in sure for row in each.odd)
    if relation == CROSSES or ambiguous:
        shown = contents.name(sure[0].path)
        raise UsageError(
            f"{contents.root} has class folders, and {shown} labels {len(named):,} of their {len(contents.images):,} images otherwise"
            + (", by names that several images have" if ambiguous else "")
            + f"; say which is right: --table {shlex.quote(str(sure[0].path))}, or --source imagefolder"
        )
    return _from_folders(layout, contents)


def _beside_unsure_tables(
    chosen: Sequence[LabelTable], contents: Contents, layout: Layout
) -> Source:
    """Read a folder by its class folders, beside tables whose columns may be anything."""
    if chosen and _relation(chosen, contents, layout) == SAME_CLASSES:
        _add_splits(chosen, contents)  # train.txt and test.txt with a label in each line
        return _from_folders(layout, contents)
    _refuse_columns(contents.wanted, contents.root)
    contents.tables.ignored += [(each.path, _not_called(each)) for each in chosen]
    return _from_folders(layout, contents)


def _refuse_columns(wanted: Wanted, root: Path) -> None:
    """Raise `UsageError` where columns of a table are named, and the class folders are read."""
    if wanted.label or wanted.image or wanted.split not in (None, NO_COLUMN):
        raise UsageError(
            f"{root} is read by its class folders, and not by a table; leave --label-column, --image-column and --split-column out, "
            "or name the table: --table FILE"
        )


def _not_called(table: LabelTable) -> str:
    """Return why a table is not read where class folders are."""
    return f"its column {table.columns.label!r} is not called as labels are, and the folders say the classes; --table takes it"


SAME = "the same classes and splits"
SAME_CLASSES = "the same classes in other splits"
CROSSES = "labels that cross the folders"
OTHERWISE = "something else"


def _relation(tables: Sequence[LabelTable], contents: Contents, layout: Layout) -> str:
    """Compare what tables say with what the class folders say."""
    places = _places(layout, contents.images)
    pairs = set()
    same_splits = True
    for each in tables:
        for row in each.rows:
            if row.image not in places:
                same_splits = False  # an image of a split that the folders do not label, perhaps
                continue
            split, name = places[row.image]
            try:
                of_row = split_of_row(
                    row, each, contents.images, contents.tables.listed, contents.wanted
                )
            except DataError:
                of_row = ""
            same_splits = same_splits and split == of_row
            pairs.add((row.text, name))
    labels = {text for text, _ in pairs}
    names = {name for _, name in pairs}
    if not pairs:
        return OTHERWISE
    if len(pairs) == len(labels) == len(names):
        return SAME if same_splits else SAME_CLASSES
    return CROSSES


def _names_all_it_touches(tables: Sequence[LabelTable], contents: Contents) -> bool:
    """Tell whether tables name nearly all images of the folders that hold some of theirs."""
    named = named_images(tables)
    folders = {contents.images.paths[image].rpartition("/")[0] for image in named}
    touched = [path for path in contents.images.paths if path.rpartition("/")[0] in folders]
    return len(named) >= NEARLY_ALL * len(touched)


def _add_splits(tables: Sequence[LabelTable], contents: Contents) -> None:
    """Take tables that label images as their folders do for lists of splits."""
    for each in tables:
        for row in each.rows:
            split = split_of_row(row, each, contents.images, {}, contents.wanted)
            contents.tables.listed.setdefault(row.image, split)
        contents.tables.lists.append(each.path)


def table(root: Path, wanted: Wanted) -> Source:
    """Read the folder `root` by its tables alone (`--source table`)."""
    tree = read_tree(root)
    images = ImageIndex(root, folder_splits(tree, wanted))
    paths = _table_files(tree, wanted)
    tables = read_tables(paths, images, wanted, set())
    chosen = choose_tables(tables, images, wanted)
    if not chosen:
        if tables.refusals:
            raise tables.refusals[0]
        raise UsageError(
            f"{root} holds no table that labels its images, such as a labels.csv with the columns file and label"
        )
    return _from_tables(chosen, Contents(root, images, tables, None, wanted))


def _may_say_splits(path: Path) -> bool:
    """Tell whether a file is called as one that says which images are to train on."""
    return path.suffix.lower() in SPLIT_SUFFIXES and SPLIT_FILE.search(path.stem) is not None


def _says_splits(path: Path, images: ImageIndex) -> bool:
    """Tell whether a file says which images are to train on: by its name alone, or by its name and the images that it names."""
    if not _may_say_splits(path):
        return False
    if SURE_SPLIT_FILE.search(path.stem):
        return True
    try:
        text = decode(path.read_bytes()[:MOST_READ])
    except OSError:
        return False
    words = {word.rpartition("/")[2] for word in re.findall(r"[^\s,;:\"'\[\]{}]+", text)}
    named = sum(images.has_name(word) for word in words)
    return named >= min(NAMED, len(images) / 4)


def _files_beside(tree: Folder, layout: Layout | None) -> list[Path]:
    """Return the files that lie outside of class folders."""
    inside = {part.folder.path for part in layout.parts} if layout else set[Path]()
    folders = [
        each
        for each in tree.walk()
        if each.path not in inside and not inside.intersection(each.path.parents)
    ]
    return [each.path / name for each in folders for name in each.files]


def _table_files(tree: Folder, wanted: Wanted) -> list[Path]:
    """Return the files that may be tables, and the one that a person named, wherever it lies."""
    found = find_tables(tree)
    return found if wanted.table is None or wanted.table in found else [*found, wanted.table]


def _outside_classes(paths: Sequence[Path], layout: Layout | None) -> list[Path]:
    """Return those of `paths` that do not lie in class folders, where files stand beside single images."""
    if layout is None:
        return list(paths)
    inside = {part.folder.path for part in layout.parts}
    return [path for path in paths if not inside.intersection(path.parents)]


def _with_hint(refusal: DataError | UsageError | None, tree: Folder) -> DataError | UsageError:
    """Return the `refusal`, with a word on files that may hold the labels and are not read."""
    assert refusal is not None, "without a layout there is a refusal"
    unread = sorted(
        name
        for folder in (tree, *tree.folders)
        for name in folder.files
        if name.lower().endswith(UNREAD_TABLES)
    )
    if not unread:
        return refusal
    return type(refusal)(
        f"{refusal}; if {unread[0]} holds the labels, save it as CSV with the columns file and label"
    )


def _places(layout: Layout, images: ImageIndex) -> dict[int, tuple[str, str]]:
    """Return the split and the class of each image that lies in a class folder."""
    parts = {part.folder.path.relative_to(images.root).as_posix(): part for part in layout.parts}
    found = {}
    for image, path in enumerate(images.paths):
        pieces = path.split("/")
        for depth in range(len(pieces) - 1, 0, -1):
            part = parts.get("/".join(pieces[:depth]))
            if part is not None:
                found[image] = part.split, normal(part.name)
                break
    return found


def _from_tables(chosen: Sequence[LabelTable], contents: Contents) -> Source:
    """Return the source that the `chosen` tables label."""
    root, images, wanted = contents.root, contents.images, contents.wanted
    if wanted.class_level:
        raise UsageError(
            f"{contents.name(chosen[0].path)} labels the images of {root}, and --class-level is of class folders; leave it out, or read the "
            "folders: --source imagefolder"
        )
    scans = {split: SplitScan(split, foreign=wanted.reencode) for split in SPLITS}
    _refuse_several_labels(chosen)
    labelled = {each.path: list(_resolve(each, contents, scans)) for each in chosen}
    _refuse_two_splits(labelled)

    # All texts together decide what the classes are.
    counts = Counter(row.text for rows in labelled.values() for row in rows)
    classes = _with_names(classes_of(counts, str(root), wanted.labels), chosen, wanted)
    if len(classes.infos) == 1:
        raise DataError(
            f"the tables of {root} know one label, {classes.infos[0].id!r}: there is nothing to tell apart"
        )

    for each in chosen:
        scans["train"].stamp.add(each.path.name, each.path.stat())
        for row in labelled[each.path]:
            label = classes.numbers[row.text]
            if label == NO_LABEL:
                scans[row.split].note(row.origin, "ignored", UNLABELED)
            else:
                scans[row.split].add_file(label, contents.path(row.image), images.paths[row.image])
    for path, cause in contents.tables.ignored:
        scans["train"].note(path, "ignored", cause)
    if count := len(images) - len(named_images(chosen)):
        scans["train"].note(
            root, "ignored", f"{count} images that no table names{_where_most(chosen, images)}"
        )
    found = [
        each
        for each in scans.values()
        if each.rows.table().num_rows or each.notes or each.split == "train"
    ]
    understood = _understood(chosen, classes.said, contents)
    return _grouped(
        from_scans(f"table {root.name}", classes.infos, found, understood), chosen, contents
    )


def _refuse_several_labels(chosen: Sequence[LabelTable]) -> None:
    """Raise `UsageError` where many images have several labels: they are no slips, the task is another one."""
    for each in chosen:
        texts: dict[int, set[str]] = {}
        for row in each.rows:
            texts.setdefault(row.image, set()).add(row.text)
        several = [image for image, found in texts.items() if len(found - {NO_TEXT}) > 1]
        odd = [name for _, name, _, _, cause in each.odd if ONE_LABEL in cause]
        count = len(several) + len(odd)
        if count >= MANY and count > SEVERAL_LABELS * (len(texts) + len(odd)):
            example = (
                odd[0] if odd else next(row.name for row in each.rows if row.image == several[0])
            )
            raise UsageError(
                f"{each.path} gives several labels to {count:,} images, such as {example}; {ONE_LABEL}. Keep one row for each image, or "
                "name a column that holds one: --label-column NAME"
            )


def _where_most(chosen: Sequence[LabelTable], images: ImageIndex) -> str:
    """Return where most of the images lie that no table names."""
    named = named_images(chosen)
    folders = Counter(
        path.rpartition("/")[0] for image, path in enumerate(images.paths) if image not in named
    )
    name, count = folders.most_common(1)[0]
    return f", {count} of them in {name}/" if name else ""


def _with_names(classes: Classes, chosen: Sequence[LabelTable], wanted: Wanted) -> Classes:
    """Return the `classes` with the names that a second column gives to numbers."""
    names = {text: name for each in chosen for text, name in each.names.items()}
    if wanted.labels.classes or not names:
        return classes
    by_id = {
        classes.infos[number].id: names[text]
        for text, number in classes.numbers.items()
        if text in names
    }
    return replace(classes, infos=to_classes([entry.id for entry in classes.infos], by_id))


def _understood(chosen: Sequence[LabelTable], said: list[str], contents: Contents) -> Understood:
    names = ", ".join(contents.name(each.path) for each in chosen)
    columns = chosen[0].columns
    label = (
        f"the column {columns.label!r}"
        if columns.label
        else f"the {len(columns.onehot)} columns of 0 and 1"
    )
    splits = "names of tables and folders, where these are splits' names"
    if contents.tables.listed:
        splits = ", ".join(map(contents.name, contents.tables.lists))
    if columns.split_name:
        splits = f"the column {columns.split_name!r}"
    found = Understood(
        f"images named in the column {columns.image!r} of {names}; splits by {splits}",
        f"{label} of {names}",
        said,
        [sentence for each in chosen for sentence in each.columns.said],
    )
    if contents.layout is not None:
        shown = ", ".join(sorted({part.name for part in contents.layout.parts})[:4])
        found.doubtful.append(
            f"the folders ({shown}, ...) are not the classes, the table is; --source imagefolder takes the folders"
        )
    return found


def _resolve(
    table: LabelTable, contents: Contents, scans: dict[str, SplitScan]
) -> Iterator[Labelled]:
    """Yield what `table` says of each image once; what cannot be used is noted."""
    images, wanted = contents.images, contents.wanted
    _note_odd(table, scans, wanted)
    deepest = _deepest(table)
    texts: dict[int, dict[str, int]] = {}
    for row in table.rows:
        if _is_meant(row, deepest) and row.text != NO_TEXT:
            texts.setdefault(row.image, {}).setdefault(row.text, row.line)
    seen: set[int] = set()
    left_out: Counter[str] = Counter()
    for row in table.rows:
        path = images.paths[row.image]
        origin = f"{table.path}, line {row.line}: {row.name}"
        try:
            split = split_of_row(row, table, images, contents.tables.listed, wanted)
        except DataError as error:
            scans["train"].note(origin, "left out", str(error))
            continue
        if split == NO_SPLIT:
            left_out[path.rpartition("/")[0]] += 1
            continue
        cause = _cause(row, split, deepest, texts.get(row.image, {}), seen)
        if cause is not None:
            scans[split].note(origin, *cause)
        else:
            seen.add(row.image)
            yield Labelled(row.image, row.text, split, origin)
    for name, count in left_out.items():
        cause = (
            "ignored",
            f"{count} rows of images in {name or 'the source'}, which are left out of every split",
        )
        scans["train"].note(table.path, *cause)


def _note_odd(table: LabelTable, scans: dict[str, SplitScan], wanted: Wanted) -> None:
    """Note the rows that name no image, or hold no label. Test images are often listed without one."""
    said = wanted.splits.get(table.word) or SPLIT_OF.get(table.word, "")
    for line, name, label, split, cause in table.odd:
        found = scans.get(split or said or "train", scans["train"])
        is_test = found.split == "test" and not label.strip()
        found.note(
            f"{table.path}, line {line}: {name}", "ignored" if is_test else "left out", cause
        )


def _deepest(table: LabelTable) -> dict[int, int]:
    """Return how many parts of each image's path agree with the row that names it best."""
    deepest: dict[int, int] = {}
    for row in table.rows:
        deepest[row.image] = max(row.match.parts, deepest.get(row.image, 0))
    return deepest


def _is_meant(row: Row, deepest: dict[int, int]) -> bool:
    """Tell whether a row means the image that was found: cat/0.jpg does not mean dog/0.jpg, which another row names."""
    return row.match.whole or row.match.parts == deepest[row.image]


def _cause(
    row: Row, split: str, deepest: dict[int, int], texts: dict[str, int], seen: set[int]
) -> tuple[str, str] | None:
    """Return why a row is not used, as a note says it: (what, cause)."""
    if not _is_meant(row, deepest):
        return "left out", "there is no such image"
    if len(texts) > 1:
        lines = " and ".join(f"{text!r} in line {line}" for text, line in texts.items())
        return "left out", f"it is labelled {lines}; one label for each image is what is trained on"
    if row.image in seen or (row.text == NO_TEXT and texts):
        return "ignored", "the same row once more"
    if row.text == NO_TEXT and split == "test":
        return "ignored", "a test image without a label"
    return None


def _refuse_two_splits(labelled: dict[Path, list[Labelled]]) -> None:
    """Raise `DataError` for an image that two tables name, in two splits or with two labels."""
    seen: dict[int, Labelled] = {}
    for rows in labelled.values():
        for row in rows:
            other = seen.setdefault(row.image, row)
            if other is not row:
                raise DataError(
                    f"one image is named twice: {other.origin} ({other.split}, {other.text!r}) and {row.origin} ({row.split}, "
                    f"{row.text!r}); keep one of the rows, or name one table: --table FILE"
                )


def _grouped(source: Source, chosen: Sequence[LabelTable], contents: Contents) -> Source:
    """Return the `source` with the groups of the column that --group names, if it is one."""
    wanted = (contents.wanted.group or "").casefold()
    columns = [
        next((name for name in each.table.columns if name.casefold() == wanted), None)
        for each in chosen
    ]
    column = {}
    for each, group in zip(chosen, columns, strict=True):
        if group is None:
            return source
        cells = dict(
            zip((line for line, _ in each.table.lines), each.table.column(group), strict=True)
        )
        for row in each.rows:
            column[str(contents.path(row.image))] = str(cells[row.line])
    return replace(source, grouping=Grouping(contents.wanted.group or "", column))


def _from_folders(layout: Layout, contents: Contents) -> Source:
    """Return the source that class folders label, with what tables say of its splits."""
    images, tables, wanted = contents.images, contents.tables, contents.wanted
    if tables.listed and layout.splits == ["train"] and not layout.flat:
        return _from_lists(layout, contents)
    _refuse_unread_splits(layout, contents)
    for path in tables.lists:
        layout.doubtful.append(
            f"{contents.name(path)} says splits of images, and is not used: the folders say them"
        )

    # A table may label a split that has no class folders.
    flat: dict[str, FlatSplit] = {}
    for split in layout.flat:
        labelled = _label_flat(split, layout, contents)
        if labelled is not None:
            flat[split] = labelled
    for split in flat:
        del layout.flat[split]
    for each in tables.usable:
        if each.path not in {labelled.path for labelled in flat.values()}:
            cause = f"it labels {len(each.images):,} of {len(images):,} images, the folders all"
            tables.ignored.append((each.path, cause))
    layout.ignored += tables.ignored
    if not flat:
        return folder_source(layout, contents.root.name, DiskFiles(), wanted)

    classes = folder_classes(layout, wanted)
    scans = {split: SplitScan(split, foreign=wanted.reencode) for split in (*layout.splits, *flat)}
    for part in layout.parts:
        add_class(scans[part.split], classes.numbers[normal(part.name)], part, DiskFiles())
    said = [*layout.said, *classes.said]
    for split, labelled in flat.items():
        scans[split].stamp.add(labelled.path.name, labelled.path.stat())
        for image, text in labelled.texts.items():
            scans[split].add_file(classes.numbers[text], contents.path(image), images.paths[image])
        said.append(
            f"{split} is labelled by the column {labelled.column!r} of {labelled.path.name}"
        )
    note_layout(layout, scans["train"], DiskFiles())
    understood = Understood(layout.text, "the folders' names", said, layout.doubtful)
    return from_scans(
        f"imagefolder {contents.root.name}", classes.infos, [*scans.values()], understood
    )


def _refuse_unread_splits(layout: Layout, contents: Contents) -> None:
    """Raise `UsageError` where a file seems to say the splits, nothing else does, and it cannot be read."""
    if layout.splits != ["train"] or layout.flat or contents.wanted.table:
        return
    read = {each.path for each in contents.tables.usable if each.columns.sure}
    odd = [
        path for path in contents.beside if path not in read and _says_splits(path, contents.images)
    ]
    if odd:
        raise UsageError(
            f"{contents.root}: {contents.name(odd[0])} seems to say which images are to train on and which to test, and cannot be read; write "
            "it as CSV with the columns file and split, or train on all images all the same: --source imagefolder"
        )


@dataclass(frozen=True)
class FlatSplit:
    """The label of each image of a split without class folders, and the table and column that say it."""

    texts: dict[int, str]
    column: str | None
    path: Path


def _label_flat(split: str, layout: Layout, contents: Contents) -> FlatSplit | None:
    """Return what a table says of the images of a split without class folders, if one labels nearly all of them."""
    images = contents.images
    prefix = f"{layout.flat[split].path.relative_to(images.root).as_posix()}/"
    inside = {image for image, path in enumerate(images.paths) if path.startswith(prefix)}
    names = {
        plain_number(normal(part.name)): normal(part.name) for part in layout.parts
    }  # the folder 00014 is class 14
    for each in contents.tables.usable:
        rows = [row for row in each.rows if row.image in inside]
        texts = {row.image: names.get(plain_number(row.text), "") for row in rows}
        differ = any(texts[row.image] != names.get(plain_number(row.text), "") for row in rows)
        nearly_all = bool(inside) and len(texts) >= NEARLY_ALL * len(inside)
        if nearly_all and "" not in texts.values() and not differ:
            return FlatSplit(texts, each.columns.label, each.path)
    return None


def _from_lists(layout: Layout, contents: Contents) -> Source:
    """Return the source whose classes are folders and whose splits are lists: `meta/train.txt` of Food-101."""
    images, listed, wanted = contents.images, contents.tables.listed, contents.wanted
    classes = folder_classes(layout, wanted)
    places = _places(layout, images)
    used = {"train", *listed.values()}
    scans = {split: SplitScan(split, foreign=wanted.reencode) for split in SPLITS if split in used}
    for path in contents.tables.lists:
        scans["train"].stamp.add(path.name, path.stat())
    rest = (
        "" if "train" in listed.values() else "train"
    )  # lists of val and test alone: what is left is trained on
    unlisted = 0
    for image in range(len(images)):
        split = listed.get(image, rest)
        if image in places and split in SPLITS:
            label = classes.numbers[places[image][1]]
            scans[split].add_file(label, contents.path(image), images.paths[image])
        else:
            unlisted += 1
    if unlisted:
        scans["train"].note(
            contents.root, "ignored", f"{unlisted} images that no list puts into a split"
        )
    layout.ignored += contents.tables.ignored
    note_layout(layout, scans["train"], DiskFiles())
    text = f"{layout.text}; splits by {', '.join(map(contents.name, contents.tables.lists))}"
    understood = Understood(
        text, "the folders' names", [*layout.said, *classes.said], layout.doubtful
    )
    return from_scans(
        f"imagefolder {contents.root.name}", classes.infos, [*scans.values()], understood
    )
