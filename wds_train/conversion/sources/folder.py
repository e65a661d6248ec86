"""A folder of images: read by its class folders, by a table that labels the images, or by both.

A table that labels nearly all images decides, wherever they lie. Otherwise the class folders do. A
table may then label the images of a split that has none (`val_annotations.txt` of Tiny ImageNet),
or say which image belongs to which split (`meta/train.txt` of Food-101).

`open_folder` is called for a path that no other format claims.
"""

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from wds_train.conversion.sources.image_index import ImageIndex
from wds_train.conversion.sources.imagefolder import (
    add_class,
    begin_scans,
    folder_classes,
    folder_source,
    note_layout,
)
from wds_train.conversion.sources.label_tables import (
    NEARLY_ALL,
    choose_tables,
    named_images,
    read_tables,
    trainable_images,
)
from wds_train.conversion.sources.labels import plain_number
from wds_train.conversion.sources.layout import AmbiguousLayout, ClassFolder, Layout, read_layout
from wds_train.conversion.sources.names import SPLITS, in_order
from wds_train.conversion.sources.source import Source, Understood, Wanted
from wds_train.conversion.sources.split_folders import folder_splits
from wds_train.conversion.sources.splits import from_scans
from wds_train.conversion.sources.table import NO_COLUMN, LabelTable, split_of_row
from wds_train.conversion.sources.table_source import Contents, source_of_tables
from wds_train.conversion.sources.tables import decode, find_tables
from wds_train.conversion.sources.tree import DiskFiles, Folder, read_tree
from wds_train.errors import DataError, UsageError

# Names of files that may list the images of splits: train_test_split.txt, list_patition_label.txt,
# split_zhou.json, train.lst, setid.mat.
SPLIT_FILE = re.compile(
    r"(?:^|[-_ .])"
    r"(?:splits?|part?itions?|setid|train|training|test|testing|val|validation)"
    r"(?:[-_ .]|list|$)",
    re.IGNORECASE,
)
# Of these, the names that mean nothing else. A file called train must also name images.
SURE_SPLIT_FILE = re.compile(
    r"(?:^|[-_ .])(?:splits?|part?itions?|setid)(?:[-_ .]|$)", re.IGNORECASE
)
SPLIT_SUFFIXES = (".txt", ".lst", ".list", ".json", ".mat", ".csv", ".tsv", ".npy", ".npz")
NAMED = 3  # images that a file called train or test must name, to be a list of them
MOST_READ = 4 << 20  # bytes of such a file
# Tables that nothing here reads, and that may hold the labels: a refusal mentions them.
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

Refusal = DataError | UsageError


class Relation(Enum):
    """The relation of tables' labels to class folders."""

    SAME = "the same classes and splits"
    SAME_CLASSES = "the same classes in other splits"
    CROSSES = "labels that cross the folders"
    OTHERWISE = "something else"


def open_folder(root: Path, wanted: Wanted) -> Source:
    """Read a folder of images, by whatever says their labels (`--source folder`).

    Args:
        root: The folder.
        wanted: The flags that a person gave.

    Raises:
        DataError, UsageError: Nothing says the labels, or two things do and differ.
    """
    # Class folders may be missing: their refusal counts only if no table labels the images.
    tree = read_tree(root)
    layout: Layout | None = None
    refusal: Refusal | None = None
    try:
        layout = read_layout(tree, wanted)
    except (DataError, UsageError) as error:
        refusal = error

    # Without tables the class folders decide alone.
    paths = _tables_outside(_table_files(tree, wanted), layout)
    outside = _files_outside(tree, layout)
    if layout is None and (not paths or not tree.total):
        raise _with_hint(refusal, tree)
    if layout is not None and not paths and not any(map(_may_say_splits, outside)):
        _refuse_columns(wanted, root)
        return folder_source(layout, root.name, DiskFiles(), wanted)

    # A table decides if the folders are no classes. The folders decide if it says the same as they,
    # or nothing certain.
    images = ImageIndex(root, folder_splits(tree, wanted))
    names = set[str]()
    if layout is not None:
        names = layout.class_texts
    tables = read_tables(paths, images, wanted, names)
    contents = Contents(root, images, tables, layout, wanted, tuple(outside))
    chosen = choose_tables(tables, images, wanted)
    if layout is not None:
        return _by_both(chosen, contents, layout)
    return _by_tables_alone(chosen, contents, refusal, tree)


def open_table(root: Path, wanted: Wanted) -> Source:
    """Read a folder of images by its tables alone (`--source table`).

    Args:
        root: The folder.
        wanted: The flags that a person gave.

    Raises:
        DataError, UsageError: No table labels the images, or two do and differ.
    """
    tree = read_tree(root)
    images = ImageIndex(root, folder_splits(tree, wanted))
    tables = read_tables(_table_files(tree, wanted), images, wanted, set())
    chosen = choose_tables(tables, images, wanted)
    if chosen:
        return source_of_tables(chosen, Contents(root, images, tables, None, wanted))
    if tables.refusals:
        raise tables.refusals[0]
    raise UsageError(
        f"{root} holds no table that labels its images, "
        "such as a labels.csv with the columns file and label"
    )


def _by_tables_alone(
    chosen: Sequence[LabelTable], contents: Contents, refusal: Refusal | None, tree: Folder
) -> Source:
    """Read a folder without class folders.

    Args:
        chosen: The tables that label the images.
        contents: The folder.
        refusal: The error of its class folders.
        tree: Its folders.

    Raises:
        DataError, UsageError: No table labels the images.
    """
    # More rows that cannot be used than rows that can: it may be no table of labels at all.
    usable = 0
    odd = 0
    for each in chosen:
        usable += len(each.rows)
        odd += len(each.odd)
    is_poor = usable < odd

    tables = contents.tables
    is_unclear = isinstance(refusal, AmbiguousLayout)
    if chosen and (chosen[0].rows or len(tables.usable) == 1) and not (is_unclear and is_poor):
        return source_of_tables(chosen, contents)
    if tables.refusals and not is_poor:
        raise tables.refusals[0]
    raise _with_hint(refusal, tree)


def _by_both(chosen: Sequence[LabelTable], contents: Contents, layout: Layout) -> Source:
    """Read a folder that has class folders and tables, by the one that says the classes.

    Raises:
        UsageError: Both may say them.
    """
    if contents.wanted.table and chosen:
        return source_of_tables(chosen, contents)
    sure = [each for each in chosen if each.columns.sure]
    if not sure:
        return _despite_unsure_tables(chosen, contents, layout)

    # Labels that go with the folders are the folders' names. Labels that cross them are the
    # classes, and the folders are not.
    trainable = trainable_images(contents.images)
    named = named_images(sure)
    nearly_all = bool(named) and len(named & trainable) >= NEARLY_ALL * len(trainable)
    relation = _relate(sure, contents, layout)
    if relation is Relation.SAME and not (layout.lies_below and nearly_all):
        layout.said.append(f"{sure[0].path.name} labels the images as their folders do")
        return _from_folders(layout, contents)
    if relation is Relation.SAME_CLASSES and not nearly_all:
        _add_splits(sure, contents)
        return _from_folders(layout, contents)

    # If the class folders lie below the source, a table of the same labels decides, too: keys of
    # such datasets have always been paths, and stay so.
    crosses = relation is Relation.CROSSES
    if nearly_all or (crosses and _names_all_it_touches(sure, contents)):
        return source_of_tables(sure, contents)

    is_ambiguous = _has_ambiguous_names(sure)
    if crosses or is_ambiguous:
        cause = ", by names that several images have" if is_ambiguous else ""
        raise UsageError(
            f"{contents.root} has class folders, and {contents.name(sure[0].path)} labels "
            f"{len(named):,} of their {len(contents.images):,} images otherwise{cause}; "
            f"say which is right: --table {shlex.quote(str(sure[0].path))}, "
            "or --source imagefolder"
        )
    return _from_folders(layout, contents)


def _has_ambiguous_names(tables: Sequence[LabelTable]) -> bool:
    """Return True if a row's name is that of several images; see `ImageIndex.find`."""
    for each in tables:
        for *_, cause in each.odd:
            if "it may be" in cause:
                return True
    return False


def _despite_unsure_tables(
    chosen: Sequence[LabelTable], contents: Contents, layout: Layout
) -> Source:
    """Read a folder by its class folders, next to tables whose columns may be anything."""
    if chosen and _relate(chosen, contents, layout) is Relation.SAME_CLASSES:
        _add_splits(chosen, contents)  # train.txt and test.txt with a label in each line
        return _from_folders(layout, contents)
    _refuse_columns(contents.wanted, contents.root)
    for each in chosen:
        cause = (
            f"its column {each.columns.label!r} is not called as labels are, "
            "and the folders say the classes; --table takes it"
        )
        contents.tables.ignored.append((each.path, cause))
    return _from_folders(layout, contents)


def _refuse_columns(wanted: Wanted, root: Path) -> None:
    """Raise `UsageError` if columns of a table are named, and the class folders are read.

    The flags would be dropped in silence.
    """
    if wanted.label or wanted.image or wanted.split not in (None, NO_COLUMN):
        raise UsageError(
            f"{root} is read by its class folders, and not by a table; "
            "leave --label-column, --image-column and --split-column out, "
            "or name the table: --table FILE"
        )


def _relate(tables: Sequence[LabelTable], contents: Contents, layout: Layout) -> Relation:
    """Compare the labels and splits of tables with those of the class folders."""
    # Pair each image's label with its class folder.
    parts = _parts_of_images(layout, contents.images)
    listed = contents.tables.listed
    pairs = set()
    labels = set()
    classes = set()
    same_splits = True
    for each in tables:
        for row in each.rows:
            part = parts.get(row.image)
            if part is None:
                same_splits = False  # an image of a split that the folders do not label, perhaps
                continue
            try:
                split = split_of_row(row, each, contents.images, listed, contents.wanted)
            except DataError:
                split = ""
            same_splits = same_splits and part.split == split
            pairs.add((row.text, part.text))
            labels.add(row.text)
            classes.add(part.text)

    # As many pairs as labels and as classes: each label is one class.
    if not pairs:
        return Relation.OTHERWISE
    if not len(pairs) == len(labels) == len(classes):
        return Relation.CROSSES
    if same_splits:
        return Relation.SAME
    return Relation.SAME_CLASSES


def _names_all_it_touches(tables: Sequence[LabelTable], contents: Contents) -> bool:
    """Return True if tables name nearly all images of the folders that hold some of theirs."""
    # Count the images of each folder, and find the folders of the named ones.
    named = named_images(tables)
    sizes: Counter[str] = Counter()
    touched = set()
    for image, path in enumerate(contents.images.paths):
        folder = path.rpartition("/")[0]
        sizes[folder] += 1
        if image in named:
            touched.add(folder)

    count = 0
    for folder in touched:
        count += sizes[folder]
    return len(named) >= NEARLY_ALL * count


def _add_splits(tables: Sequence[LabelTable], contents: Contents) -> None:
    """Use tables that label images as their folders do as lists of splits."""
    for each in tables:
        for row in each.rows:
            split = split_of_row(row, each, contents.images, {}, contents.wanted)
            contents.tables.listed.setdefault(row.image, split)
        contents.tables.lists.append(each.path)


def _may_say_splits(path: Path) -> bool:
    """Return True if a file has the name of one that lists the images of splits."""
    return path.suffix.lower() in SPLIT_SUFFIXES and SPLIT_FILE.search(path.stem) is not None


def _says_splits(path: Path, images: ImageIndex) -> bool:
    """Return True if a file lists the images of splits.

    Its name is enough if it means nothing else; otherwise the file must name images.
    """
    if not _may_say_splits(path):
        return False
    if SURE_SPLIT_FILE.search(path.stem):
        return True

    # train.txt may be a log, or a licence: count the images among its words.
    try:
        text = decode(path.read_bytes()[:MOST_READ])
    except OSError:
        return False
    words = set()
    for word in re.findall(r"[^\s,;:\"'\[\]{}]+", text):
        words.add(word.rpartition("/")[2])
    named = sum(map(images.has_name, words))
    return named >= min(NAMED, len(images) / 4)


def _class_paths(layout: Layout | None) -> set[Path]:
    """Return the paths of the class folders."""
    if layout is None:
        return set()
    return {part.folder.path for part in layout.parts}


def _files_outside(tree: Folder, layout: Layout | None) -> list[Path]:
    """Return the files that lie outside of class folders."""
    inside = _class_paths(layout)
    found = []
    for folder in tree.walk():
        if folder.path not in inside and inside.isdisjoint(folder.path.parents):
            for name in folder.files:
                found.append(folder.path / name)
    return found


def _table_files(tree: Folder, wanted: Wanted) -> list[Path]:
    """Return the files that may be tables, and the one that a person named, wherever it lies."""
    found = find_tables(tree)
    if wanted.table is not None and wanted.table not in found:
        found = [*found, wanted.table]
    return found


def _tables_outside(paths: Sequence[Path], layout: Layout | None) -> list[Path]:
    """Return the `paths` outside of class folders: files in these belong to single images."""
    inside = _class_paths(layout)
    return [path for path in paths if inside.isdisjoint(path.parents)]


def _with_hint(refusal: Refusal | None, tree: Folder) -> Refusal:
    """Return the refusal, with a hint at a file that may hold the labels and is not read."""
    assert refusal is not None, "without a layout there is a refusal"
    unread = []
    for folder in (tree, *tree.folders):
        for name in folder.files:
            if name.lower().endswith(UNREAD_TABLES):
                unread.append(name)
    if not unread:
        return refusal
    return type(refusal)(
        f"{refusal}; if {min(unread)} holds the labels, "
        "save it as CSV with the columns file and label"
    )


def _parts_of_images(layout: Layout, images: ImageIndex) -> dict[int, ClassFolder]:
    """Return the class folder of each image that lies in one."""
    by_path = {}
    for part in layout.parts:
        by_path[part.folder.path.relative_to(images.root).as_posix()] = part
    found = {}
    for image, path in enumerate(images.paths):
        innermost = _innermost(path, by_path)
        if innermost is not None:
            found[image] = innermost
    return found


def _innermost(path: str, by_path: Mapping[str, ClassFolder]) -> ClassFolder | None:
    """Return the class folder that the image at `path` lies in, the innermost."""
    pieces = path.split("/")
    for depth in range(len(pieces) - 1, 0, -1):
        part = by_path.get("/".join(pieces[:depth]))
        if part is not None:
            return part
    return None


def _from_folders(layout: Layout, contents: Contents) -> Source:
    """Make the source that class folders label, with what tables say of its splits.

    Raises:
        DataError: The class folders cannot be read; see `folder_source`.
        UsageError: A file seems to say the splits, and cannot be read.
    """
    tables = contents.tables
    if tables.listed and layout.splits == ["train"] and not layout.flat:
        return _from_lists(layout, contents)
    _refuse_unread_splits(layout, contents)
    for path in tables.lists:
        layout.doubtful.append(
            f"{contents.name(path)} says splits of images, and is not used: the folders say them"
        )

    # A table may label a split that has no class folders: it is then not noted as unlabelled.
    flat = _label_flat_splits(layout, contents)
    used = set()
    for split, labelled in flat.items():
        del layout.flat[split]
        used.add(labelled.path)
    for each in tables.usable:
        if each.path not in used:
            named = f"{len(each.images):,} of {len(contents.images):,} images"
            tables.ignored.append((each.path, f"it labels {named}, the folders all"))
    layout.ignored += tables.ignored
    if not flat:
        return folder_source(layout, contents.root.name, DiskFiles(), contents.wanted)
    return _from_folders_and_flat(layout, flat, contents)


def _refuse_unread_splits(layout: Layout, contents: Contents) -> None:
    """Raise `UsageError` if a file seems to say the splits, cannot be read, and nothing else does.

    Otherwise test images would be trained on.
    """
    if layout.splits != ["train"] or layout.flat or contents.wanted.table:
        return
    read = {each.path for each in contents.tables.usable if each.columns.sure}
    for path in contents.outside:
        if path not in read and _says_splits(path, contents.images):
            raise UsageError(
                f"{contents.root}: {contents.name(path)} seems to say which images are to train on "
                "and which to test, and cannot be read; write it as CSV with the columns file and "
                "split, or train on all images all the same: --source imagefolder"
            )


@dataclass(frozen=True)
class FlatSplit:
    """The labels of a split without class folders.

    Attributes:
        texts: The class of each image.
        column: The column of the table that says them.
        path: The table.
    """

    texts: dict[int, str]
    column: str | None
    path: Path


def _label_flat_splits(layout: Layout, contents: Contents) -> dict[str, FlatSplit]:
    """Return the splits without class folders of which a table labels nearly all images."""
    # The folder 00014 is the class 14 of a table.
    names = {plain_number(part.text): part.text for part in layout.parts}
    found = {}
    for split, folder in layout.flat.items():
        prefix = f"{folder.path.relative_to(contents.images.root).as_posix()}/"
        inside = set()
        for image, path in enumerate(contents.images.paths):
            if path.startswith(prefix):
                inside.add(image)
        labelled = _label_flat(inside, names, contents)
        if labelled is not None:
            found[split] = labelled
    return found


def _label_flat(inside: set[int], names: Mapping[str, str], contents: Contents) -> FlatSplit | None:
    """Return the first table's labels of nearly all of some images; None if no table has them.

    Args:
        inside: The images.
        names: Each label that a table may hold, and its class.
        contents: The folder.
    """
    if not inside:
        return None
    for each in contents.tables.usable:
        texts = _texts_of(each, inside, names)
        if texts is not None and len(texts) >= NEARLY_ALL * len(inside):
            return FlatSplit(texts, each.columns.label, each.path)
    return None


def _texts_of(
    table: LabelTable, inside: set[int], names: Mapping[str, str]
) -> dict[int, str] | None:
    """Return the class of each image of `inside` that a table names.

    None if it names no class there, or two for one image.
    """
    texts: dict[int, str] = {}
    for row in table.rows:
        if row.image in inside:
            text = names.get(plain_number(row.text))
            if text is None or texts.setdefault(row.image, text) != text:
                return None
    return texts


def _from_folders_and_flat(
    layout: Layout, flat: Mapping[str, FlatSplit], contents: Contents
) -> Source:
    """Make the source of class folders, and of splits without them that tables label."""
    # The splits with class folders come first: they say the classes.
    classes = folder_classes(layout, contents.wanted)
    scans = begin_scans((*layout.splits, *flat), contents.wanted)
    for part in layout.parts:
        add_class(scans[part.split], classes.numbers[part.text], part, DiskFiles())

    # The table is part of the source: another one makes another dataset.
    said = [*layout.said, *classes.said]
    for split, labelled in flat.items():
        found = scans[split]
        found.stamp.add(labelled.path.name, labelled.path.stat())
        for image, text in labelled.texts.items():
            label = classes.numbers[text]
            found.add_file(label, contents.path(image), contents.images.paths[image])
        said.append(
            f"{split} is labelled by the column {labelled.column!r} of {labelled.path.name}"
        )
    note_layout(layout, scans["train"], DiskFiles())
    understood = Understood(layout.text, "the folders' names", said, layout.doubtful)
    description = f"imagefolder {contents.root.name}"
    return from_scans(description, classes.infos, [*scans.values()], understood)


def _from_lists(layout: Layout, contents: Contents) -> Source:
    """Make the source whose classes are folders and whose splits are lists.

    That is `meta/train.txt` and `meta/test.txt` of Food-101.
    """
    images = contents.images
    listed = contents.tables.listed
    lists = contents.tables.lists
    classes = folder_classes(layout, contents.wanted)
    parts = _parts_of_images(layout, images)
    used = {"train", *listed.values()}
    scans = begin_scans(in_order(used), contents.wanted)
    # The lists are part of the source: other ones make another dataset.
    for each in lists:
        scans["train"].stamp.add(each.name, each.stat())

    # With lists of val and test alone, the rest is trained on.
    rest = ""
    if "train" not in listed.values():
        rest = "train"
    unlisted = 0
    for image, path in enumerate(images.paths):
        # An image outside the class folders has a split, perhaps, and no class.
        split = listed.get(image, rest)
        part = parts.get(image)
        if part is not None and split in SPLITS:
            scans[split].add_file(classes.numbers[part.text], contents.path(image), path)
        else:
            unlisted += 1

    # Note what is not used.
    if unlisted:
        cause = f"{unlisted} images that no list puts into a split"
        scans["train"].note(contents.root, "ignored", cause)
    layout.ignored += contents.tables.ignored
    note_layout(layout, scans["train"], DiskFiles())
    understood = Understood(
        layout=f"{layout.text}; splits by {', '.join(map(contents.name, lists))}",
        labels="the folders' names",
        said=[*layout.said, *classes.said],
        doubtful=layout.doubtful,
    )
    description = f"imagefolder {contents.root.name}"
    return from_scans(description, classes.infos, [*scans.values()], understood)
