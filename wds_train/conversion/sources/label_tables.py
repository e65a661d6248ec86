"""The tables in a folder of images: those that label the images, and those that belong together.

`folder` reads a source with this: `read_tables` reads all files that may be tables, `choose_tables`
then picks the ones to use.
"""

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wds_train.conversion.sources.image_index import ImageIndex
from wds_train.conversion.sources.names import NO_SPLIT, SPLIT_OF, framed_split
from wds_train.conversion.sources.source import Wanted
from wds_train.conversion.sources.table import (
    LabelTable,
    is_submission,
    read_labels,
    read_splits,
    say_the_same,
)
from wds_train.conversion.sources.tables import Table, read_table
from wds_train.errors import UsageError

NEARLY_ALL = 0.95  # of the images, above which a table is the one that labels them
PLACEHOLDERS = 3  # rows; more test images that all have one label were never labelled
# Files of these suffixes may be anything: those that are no tables are not worth a note.
QUIET = (".txt", ".lst", ".json")


@dataclass
class Tables:
    """The tables of a source.

    Attributes:
        usable: Those that label images that are here.
        listed: image -> split, from tables that hold no labels.
        lists: Those tables.
        ignored: The others, and why.
        refusals: Why it is not clear what the columns of some tables are.
    """

    usable: list[LabelTable] = field(default_factory=list)
    listed: dict[int, str] = field(default_factory=dict)
    lists: list[Path] = field(default_factory=list)
    ignored: list[tuple[Path, str]] = field(default_factory=list)
    refusals: list[UsageError] = field(default_factory=list)


@dataclass(frozen=True)
class _TableReader:
    """Reads the tables of a source, one by one, into `found`.

    Attributes:
        images: The images that they may name.
        wanted: The flags.
        classes: The names of class folders: a column that holds them is that of the labels.
        found: The tables that were read so far.
    """

    images: ImageIndex
    wanted: Wanted
    classes: Collection[str]
    found: Tables = field(default_factory=Tables)

    def read_named(self, path: Path) -> None:
        """Read a table that a person named.

        Raises:
            UsageError: It is no table, or labels no images that are here.
        """
        # A person named it: anything that it is not is an error.
        content = read_table(path)
        if content is None:
            raise UsageError(
                f"{path} is no table; give CSV, TSV, JSON lines, or a list of file and label"
            )
        try:
            labels = read_labels(content, self.images, self.wanted, self.classes)
        except UsageError:
            if not self._add_list(content):
                raise
            return
        if not labels.rows:
            cause = labels.odd[0].cause if labels.odd else "it has no rows"
            raise UsageError(
                f"{path} names no image below {self.images.root}: {cause}; "
                "name another table, or another SOURCE"
            )
        self.found.usable.append(labels)

    def read_any(self, path: Path) -> None:
        """Read a file that may be a table; keep it as what it is, or note why not."""
        content = read_table(path)
        if content is None:
            return
        is_quiet = path.suffix.lower() in QUIET
        try:
            labels = read_labels(content, self.images, self.wanted, self.classes)
        except UsageError as error:
            # No labels, but perhaps splits.
            if self._add_list(content):
                return
            if is_quiet and "--label-column" not in str(error):
                return  # a list of something else
            if not is_quiet:
                columns = ", ".join(content.columns[:6])
                if len(content.columns) > 6:
                    columns += ", ..."
                cause = f"none of its columns ({columns}) is known to be the labels of images here"
                self.found.ignored.append((path, cause))
            self.found.refusals.append(error)
            return
        if labels.rows or (labels.odd and not is_quiet):
            self.found.usable.append(labels)

    def read_list(self, path: Path) -> None:
        """Read a file that may say splits, and whose labels are not wanted."""
        content = read_table(path)
        if content is not None:
            self._add_list(content)

    def _add_list(self, table: Table) -> bool:
        """Keep a table that says splits alone.

        Returns:
            True if it is one.

        Raises:
            UsageError: It differs from another one.
        """
        splits = read_splits(table, self.images, self.wanted)
        if not splits:
            return False
        odd = _find_difference(splits, self.found.listed)
        if odd is None:
            self.found.listed |= splits
            self.found.lists.append(table.path)
        elif _is_trainval(table.path):
            cause = "train and val together; the lists of each are used"
            self.found.ignored.append((table.path, cause))
        else:
            raise UsageError(
                f"{self.images.paths[odd]} is of the split {self.found.listed[odd]} "
                f"by {' or '.join(map(str, self.found.lists))}, "
                f"and of {splits[odd]} by {table.path}; name the lists to use by one of them: "
                f"--table {shlex.quote(str(table.path))}"
            )
        return True


def read_tables(
    paths: Sequence[Path], images: ImageIndex, wanted: Wanted, classes: Collection[str]
) -> Tables:
    """Read the tables among the files of a source.

    Args:
        paths: The files that may be tables.
        images: The images that they may name.
        wanted: The flags.
        classes: The names of class folders: a column that holds them is that of the labels.

    Raises:
        UsageError: The table that a person named is none, or two lists of splits differ.
    """
    reader = _TableReader(images, wanted, classes)
    found = reader.found
    # trainval.txt last: it repeats the lists of train and val, which are read by then.
    paths = sorted(paths, key=_is_trainval)
    family = []
    if wanted.table:
        family = _find_family(wanted.table, paths)
    for path in family:
        reader.read_named(path)
    for path in paths:
        if path in family:
            continue
        if is_submission(path):
            found.ignored.append((path, "answers to be filled in, as its name says: no labels"))
        elif not wanted.table:
            reader.read_any(path)
        elif not found.lists:
            # The table that was named says the labels; a list may still say the splits.
            reader.read_list(path)
    # The first refusal is the one that a person reads: one about a table, rather than a text.
    found.refusals.sort(key=_names_quiet_file)
    return found


def _names_quiet_file(error: UsageError) -> bool:
    return any(suffix in str(error) for suffix in QUIET)


def _find_difference(splits: Mapping[int, str], listed: Mapping[int, str]) -> int | None:
    """Return the first image of `splits` that has another split in `listed`; None without one."""
    for image, split in splits.items():
        if listed.get(image, split) != split:
            return image
    return None


def _is_trainval(path: Path) -> bool:
    return path.stem.lower() == "trainval"


def _find_family(named: Path, paths: Sequence[Path]) -> list[Path]:
    """Return the table that a person named, and those of other splits with the same name.

    Such as style_train.csv and style_val.csv.
    """
    # --table style_train.csv means the tables of all splits.
    framed = framed_split(named.stem)
    if framed is None:
        return [named]
    family = {named}
    for path in paths:
        if path.parent == named.parent and path.suffix == named.suffix:
            other = framed_split(path.stem)
            if other is not None and other.frame == framed.frame:
                family.add(path)
    return sorted(family, key=lambda path: (_is_trainval(path), path))


def trainable_images(images: ImageIndex) -> set[int]:
    """Return the images outside folders of test images and of images without labels."""
    trainable = set()
    for image in range(len(images)):
        if images.split_of(image) not in ("test", NO_SPLIT):
            trainable.add(image)
    return trainable


def choose_tables(tables: Tables, images: ImageIndex, wanted: Wanted) -> list[LabelTable]:
    """Choose the tables that label the images, and note that the others are ignored.

    Args:
        tables: The tables; `ignored` gets those that are not chosen.
        images: The images.
        wanted: The flags.

    Raises:
        UsageError: Two tables label the same images differently.
    """
    # Tables with the same columns belong together: one a split perhaps.
    alike: dict[tuple[str, str], list[LabelTable]] = {}
    for each in tables.usable:
        if each.rows:
            signature = each.columns.image, str(each.columns.label or each.columns.onehot)
            alike.setdefault(signature, []).append(each)
    if not alike:  # no image that is named is here: the rows will say so, one by one
        return tables.usable[:1]
    groups = []
    for group in alike.values():
        kept = _keep_distinct(group, tables, images, wanted)
        if kept:
            groups.append(kept)
    if not groups:  # placeholders alone
        return []

    # The group that labels most comes first; others may add the tables of more splits.
    trainable = trainable_images(images)
    groups.sort(key=lambda group: _rank(group, trainable), reverse=True)
    chosen = groups[0]
    for group in groups[1:]:
        for other in group:
            if _adds_split(other, chosen):
                chosen = [*chosen, other]
                continue
            _refuse_second(chosen, other)
            cause = (
                f"it labels {len(other.images):,} of {len(images):,} images; "
                f"{chosen[0].path.name} is used"
            )
            tables.ignored.append((other.path, cause))
    return chosen


def _rank(group: Sequence[LabelTable], trainable: set[int]) -> tuple[bool, int, int]:
    """Return the order in which groups of tables are preferred, the largest first."""
    named = named_images(group)
    return group[0].columns.sure, len(named & trainable), len(named)


def _adds_split(other: LabelTable, chosen: Sequence[LabelTable]) -> bool:
    """Return True if a table is named for a split that the `chosen` lack.

    It must label none of their images.
    """
    if not other.word or other.images & named_images(chosen):
        return False
    return all(other.word != each.word for each in chosen)


def named_images(group: Iterable[LabelTable]) -> set[int]:
    """Return the images that the tables name."""
    named: set[int] = set()
    for each in group:
        named |= each.images
    return named


def _keep_distinct(
    group: list[LabelTable], tables: Tables, images: ImageIndex, wanted: Wanted
) -> list[LabelTable]:
    """Return the tables of a group that are used, and note why the others are not.

    Args:
        group: Tables with the same columns.
        tables: All tables; `ignored` gets those that are not used.
        images: The images.
        wanted: The flags.

    Raises:
        UsageError: Two tables label the same images differently.
    """
    has_words = any(each.word for each in group)
    kept: list[LabelTable] = []
    # Those that are named for a split come first, and larger ones before smaller ones.
    for each in sorted(group, key=lambda each: (not each.word, -len(each.images), str(each.path))):
        splits = set(map(images.split_of, each.images))
        if has_words and not each.word and "" in splits and kept and not each.columns.split:
            cause = f"it names {len(each.images)} images that belong to no split"
            tables.ignored.append((each.path, cause))
            continue

        # Test images with one and the same label were given it to fill the column.
        labels = {row.text for row in each.rows}
        is_test = splits == {"test"} or SPLIT_OF.get(each.word) == "test"
        if len(labels) == 1 and len(each.rows) > PLACEHOLDERS and is_test and not wanted.table:
            cause = f"all of its rows say {labels.pop()!r}, of test images: placeholders"
            tables.ignored.append((each.path, cause))
            continue

        # Of two tables of the same images one is used, if they agree.
        twin = _find_twin(each, kept)
        if twin is None or twin.word != each.word:
            kept.append(each)
            continue
        if not _equal_labels(twin, each):
            raise UsageError(
                f"{twin.path} and {each.path} label the same images, and differ; "
                f"say which one is right: --table {shlex.quote(str(each.path))}"
            )
        tables.ignored.append((each.path, f"it says the same as {twin.path.name}"))
    # Back to the order in which they were found: the order of the rows follows from it.
    kept.sort(key=group.index)
    return kept


def _find_twin(table: LabelTable, others: Sequence[LabelTable]) -> LabelTable | None:
    """Return the first of the others that names more than half of the table's images."""
    for other in others:
        if len(other.images & table.images) > len(table.images) / 2:
            return other
    return None


def _equal_labels(one: LabelTable, other: LabelTable) -> bool:
    """Return True if two tables say the same of the images that both name."""
    texts = {row.image: row.text for row in one.rows}
    return all(texts.get(row.image, row.text) == row.text for row in other.rows)


def _refuse_second(chosen: Sequence[LabelTable], other: LabelTable) -> None:
    """Raise `UsageError` if a table labels the images of the `chosen` ones, and differs.

    The labels may be other words for the same classes: then every label of one has a single
    partner in the other.
    """
    shared = other.images & named_images(chosen)
    if not other.columns.sure or len(shared) < len(other.images) / 2:
        return
    labels = {}
    for each in chosen:
        for row in each.rows:
            labels[row.image] = row.text
    ours = []
    theirs = []
    for row in other.rows:
        if row.image in labels:
            ours.append(labels[row.image])
            theirs.append(row.text)
    if not say_the_same(ours, theirs):
        raise UsageError(
            f"{chosen[0].path} and {other.path} label the same images, and differ; "
            f"say which one is right: --table {shlex.quote(str(chosen[0].path))}, "
            f"or --table {shlex.quote(str(other.path))}"
        )
