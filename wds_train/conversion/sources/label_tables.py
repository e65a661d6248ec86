"""The tables in a folder of images: which of them label the images, and which belong together."""

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wds_train.conversion.sources.image_index import ImageIndex
from wds_train.conversion.sources.names import NO_SPLIT, SPLIT_OF, framed_split
from wds_train.conversion.sources.source import Wanted
from wds_train.conversion.sources.table import LabelTable, is_submission, read_labels, read_splits
from wds_train.conversion.sources.tables import read_table
from wds_train.errors import UsageError

NEARLY_ALL = 0.95  # of the images, above which a table is the one that labels them
PLACEHOLDERS = 3  # rows; more that all have one label, of test images, are no answers
QUIET = (
    ".txt",
    ".lst",
    ".json",
)  # files that may be anything: what is no table among them is not worth a word


@dataclass
class Tables:
    """The tables of a source.

    Attributes:
        usable: Those whose columns label images that are here.
        listed: image -> split, as tables say that hold no labels.
        lists: Those tables.
        ignored: The others, and why.
        refusals: Why the columns of some cannot be told.
    """

    usable: list[LabelTable] = field(default_factory=list)
    listed: dict[int, str] = field(default_factory=dict)
    lists: list[Path] = field(default_factory=list)
    ignored: list[tuple[Path, str]] = field(default_factory=list)
    refusals: list[UsageError] = field(default_factory=list)


def read_tables(
    paths: Sequence[Path], images: ImageIndex, wanted: Wanted, classes: Collection[str]
) -> Tables:
    """Read those of the files `paths` that are tables.

    Args:
        classes: The names of class folders: a column that holds them is that of the labels.

    Raises:
        UsageError: The table that a person named is none, or two lists differ.
    """
    found = Tables()
    paths = sorted(
        paths, key=_is_trainval
    )  # stable: its lists are those of train and val once more
    family = _family(wanted.table, paths) if wanted.table else []
    for path in family:
        _read_one(path, images, wanted, classes, found, named=True)
    for path in paths:
        if path in family:
            continue
        if is_submission(path):
            found.ignored.append((path, "answers to be filled in, as its name says: no labels"))
        elif not wanted.table:
            _read_one(path, images, wanted, classes, found, named=False)
        elif (
            not found.lists
        ):  # the table that was named says the labels; a list may still say the splits
            content = read_table(path)
            splits = read_splits(content, images, wanted) if content else {}
            if splits:
                _add_list(found, path, splits, images)
    found.refusals.sort(key=lambda error: any(suffix in str(error) for suffix in QUIET))
    return found


def _is_trainval(path: Path) -> bool:
    return path.stem.lower() == "trainval"


def _family(named: Path, paths: Sequence[Path]) -> list[Path]:
    """Return the table that a person named, and those called as it is but for the split: style_train.csv, style_val.csv."""
    framed = framed_split(named.stem)
    if framed is None:
        return [named]
    alike = [path for path in paths if path.parent == named.parent and path.suffix == named.suffix]
    frames = {path: framed_split(path.stem) for path in alike}
    same = [
        path for path, other in frames.items() if other is not None and other.frame == framed.frame
    ]
    return sorted({named, *same}, key=lambda path: (_is_trainval(path), path))


def _read_one(
    path: Path,
    images: ImageIndex,
    wanted: Wanted,
    classes: Collection[str],
    found: Tables,
    *,
    named: bool,
) -> None:
    """Read one table, and keep it as what it is."""
    content = read_table(path)
    if content is None:
        if named:
            raise UsageError(
                f"{path} is no table; give CSV, TSV, JSON lines, or a list of file and label"
            )
        return
    try:
        labels = read_labels(content, images, wanted, classes)
    except UsageError as error:
        splits = read_splits(content, images, wanted)
        if splits:
            _add_list(found, path, splits, images)
            return
        if named:
            raise
        if path.suffix.lower() in QUIET and "--label-column" not in str(error):
            return  # a list of something else
        if path.suffix.lower() not in QUIET:
            columns = ", ".join(content.columns[:6]) + (", ..." if content.columns[6:] else "")
            found.ignored.append(
                (path, f"none of its columns ({columns}) is known to be the labels of images here")
            )
        found.refusals.append(error)
        return
    if named and not labels.rows:
        cause = labels.odd[0][-1] if labels.odd else "it has no rows"
        raise UsageError(
            f"{path} names no image below {images.root}: {cause}; name another table, or another SOURCE"
        )
    if labels.rows or (labels.odd and path.suffix.lower() not in QUIET):
        found.usable.append(labels)


def _add_list(found: Tables, path: Path, splits: dict[int, str], images: ImageIndex) -> None:
    """Keep a table that says splits alone; `UsageError` where it differs from another one."""
    odd = next(
        (image for image, split in splits.items() if found.listed.get(image, split) != split), None
    )
    if odd is not None and _is_trainval(path):
        found.ignored.append((path, "train and val together; the lists of each are used"))
        return
    if odd is not None:
        raise UsageError(
            f"{images.paths[odd]} is of the split {found.listed[odd]} by {' or '.join(map(str, found.lists))}, and of "
            f"{splits[odd]} by {path}; name the lists to use by one of them: --table {shlex.quote(str(path))}"
        )
    found.listed |= splits
    found.lists.append(path)


def trainable_images(images: ImageIndex) -> set[int]:
    """Return the images that lie in no folder of test images or of images without labels."""
    aside = ("test", NO_SPLIT)
    return {image for image in range(len(images)) if images.split_of(image) not in aside}


def choose_tables(tables: Tables, images: ImageIndex, wanted: Wanted) -> list[LabelTable]:
    """Choose the tables that label the images, and say of the others that they are ignored.

    Raises:
        UsageError: Two tables label the same images in two ways.
    """
    with_rows = [table for table in tables.usable if table.rows]
    if not with_rows:  # nothing that is named is here: the rows say so, one by one
        return tables.usable[:1]
    trainable = trainable_images(images)
    alike: dict[tuple[str, str], list[LabelTable]] = {}
    for each in with_rows:
        signature = each.columns.image, str(each.columns.label or each.columns.onehot)
        alike.setdefault(signature, []).append(each)
    groups = [_of_one_kind(group, tables, images, wanted) for group in alike.values()]
    groups = [group for group in groups if group]
    groups.sort(key=lambda group: _rank(group, trainable), reverse=True)
    chosen = groups[0]
    for group in groups[1:]:
        for other in group:
            if (
                other.word
                and not other.images & named_images(chosen)
                and other.word not in {each.word for each in chosen}
            ):
                chosen = [*chosen, other]
                continue
            _refuse_second(chosen, other)
            tables.ignored.append(
                (
                    other.path,
                    f"it labels {len(other.images):,} of {len(images):,} images; {chosen[0].path.name} is used",
                )
            )
    return chosen


def _rank(group: Sequence[LabelTable], trainable: set[int]) -> tuple[bool, int, int]:
    """Return what tables are chosen by: whether their columns are known ones, and how many images they name."""
    named = named_images(group)
    return group[0].columns.sure, len(named & trainable), len(named)


def named_images(group: Sequence[LabelTable]) -> set[int]:
    """Return the images that the tables name."""
    return set[int]().union(*(each.images for each in group))


def _of_one_kind(
    group: list[LabelTable], tables: Tables, images: ImageIndex, wanted: Wanted
) -> list[LabelTable]:
    """Return those tables of the same columns that belong together, one a split perhaps."""
    kept: list[LabelTable] = []
    has_words = any(each.word for each in group)
    for each in sorted(group, key=lambda each: (not each.word, -len(each.images), str(each.path))):
        of_splits = {images.split_of(image) for image in each.images}
        if has_words and not each.word and "" in of_splits and kept and not each.columns.split:
            tables.ignored.append(
                (each.path, f"it names {len(each.images)} images that belong to no split")
            )
            continue
        texts = {row.text for row in each.rows}
        is_test = of_splits == {"test"} or SPLIT_OF.get(each.word) == "test"
        if len(texts) == 1 and len(each.rows) > PLACEHOLDERS and is_test and not wanted.table:
            tables.ignored.append(
                (
                    each.path,
                    f"all of its rows say {next(iter(texts))!r}, of test images: placeholders",
                )
            )
            continue
        twin = next(
            (other for other in kept if len(other.images & each.images) > len(each.images) / 2),
            None,
        )
        if twin is not None and twin.word == each.word:
            if not _equal_labels(twin, each):
                raise UsageError(
                    f"{twin.path} and {each.path} label the same images, and differ; say which one is right: --table {shlex.quote(str(each.path))}"
                )
            tables.ignored.append((each.path, f"it says the same as {twin.path.name}"))
            continue
        kept.append(each)
    order = {id(each): number for number, each in enumerate(group)}
    return sorted(kept, key=lambda each: order[id(each)])


def _equal_labels(one: LabelTable, other: LabelTable) -> bool:
    """Tell whether two tables say the same of the images that both name."""
    texts = {row.image: row.text for row in one.rows}
    return all(texts.get(row.image, row.text) == row.text for row in other.rows)


def _refuse_second(chosen: Sequence[LabelTable], other: LabelTable) -> None:
    """Raise `UsageError` when `other` labels the images that the `chosen` do, and not as they do."""
    if not other.columns.sure or len(other.images & named_images(chosen)) < len(other.images) / 2:
        return
    mine = {row.image: row.text for each in chosen for row in each.rows}
    pairs = {(mine[row.image], row.text) for row in other.rows if row.image in mine}
    if len(pairs) > len({a for a, _ in pairs}) or len(pairs) > len({b for _, b in pairs}):
        raise UsageError(
            f"{chosen[0].path} and {other.path} label the same images, and differ; say which one is right: "
            f"--table {shlex.quote(str(chosen[0].path))}, or --table {shlex.quote(str(other.path))}"
        )
