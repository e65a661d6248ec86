"""The layout of a source of folders: which folder is a split, which a class, and which neither.

`read_layout` takes the tree of folders (`tree`) and tells splits from classes. If the folders can
be read in two ways, it refuses, and names both ways with the flags that choose them.

```
CLASS/1.jpg                    train/CLASS/1.jpg, val/CLASS/1.jpg, test/CLASS/1.jpg
wrapped/in/CLASS/1.jpg         CLASS/train/1.jpg, CLASS/test/1.jpg
```

The stages are those of the file: the splits, the class folders of each, and the refusals of what
people have that is neither.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wds_train.conversion.sources.names import (
    NO_SPLIT,
    OTHER_SPLITS,
    SPLIT_FOLDER,
    framed_split,
    in_order,
    normal,
    unknown_split,
)
from wds_train.conversion.sources.source import Wanted
from wds_train.conversion.sources.split_folders import (
    framed_folders,
    names_of_splits,
    split_of_folder,
    splits_in,
)
from wds_train.conversion.sources.tree import Folder, folder_names
from wds_train.errors import DataError, UsageError

LAYOUT = "an ImageFolder is CLASS/IMAGE.jpg, or train/CLASS/IMAGE.jpg and val/CLASS/IMAGE.jpg"
# Folders of a data set for detection or segmentation, or of one that was cut up: these names are
# no classes.
NO_CLASSES = re.compile(
    r"(?:jpeg)?(images?|imgs?|labels?|annotations?|masks?)|(?:k?fold|part|batch)[-_ ]?\d+"
    r"|.*[-_ ](?:part|images?|batch|fold|chunk)[-_ ]?\d+|images?[-_ ]?\d+"
    r"|(?:set|cv|session|camera|cam|user|patient|subject|run|round|shard|chunk)[-_ ]?(?:\d+|[a-z])"
    r"|(?:19|20)\d\d"
    r"|rgb|depth|nir|thermal|inputs?|targets?|gt|lq|hq|lr|hr|originals?|augmented|raw|processed",
    re.IGNORECASE,
)
# A folder of a class's images: n01443537/images, as in Tiny ImageNet.
IMAGES = re.compile(r"(?:jpeg)?(?:images?|imgs?|photos?)", re.IGNORECASE)
# Folders next to those of images that hold pixels, too: segmentations, or renderings of them.
MASKS = re.compile(
    r"(?:tri)?maps?|masks?|annotations?|labels?|segmentations?"
    r"|(?:ground[-_ ]?truths?|gt)|depths?|overlays?|heat[-_ ]?maps?",
    re.IGNORECASE,
)
# Folders of a repository next to its data set that hold pictures, such as those of its README.
ASIDE = re.compile(
    r"examples?|samples?|sample[-_ ]images?|demos?|docs?|assets|figures?|figs?|static|media"
    r"|screenshots?|previews?|thumbnails?|notebooks?|src|scripts?|readme[-_ ]?(?:images|files)?"
    r"|logos?|icons?|results?|outputs?|predictions?|plots?|runs|web|app",
    re.IGNORECASE,
)
# Folders of code, pages and data: one of them among class folders says that these are no classes.
REPOSITORY = re.compile(
    r"src|docs?|static|assets|readme[-_ ]?(?:images|files|assets)?|data[-_ ]?sets?|data|images?"
    r"|imgs?|gui|screenshots?|scripts?|notebooks?|media|public|examples?"
    r"|samples?[-_ ]?(?:images|data)?|demos?|node_modules",
    re.IGNORECASE,
)
# Folders that may be classes, and rarely are: a person should look at them.
ODD_CLASS = re.compile(
    r"masks?|thumb(?:nail)?s?|cache[d]?|trash|backup|duplicates?|un(?:sorted|known|labell?ed)"
    r"|to[-_ ]?sort|temp|tmp|misc|others?|new folder.*|untitled.*|.* - copy.*|.* ?\(copy\)"
    r"|.* \(\d+\)|copy of .*",
    re.IGNORECASE,
)
# Share of the data set's images: fewer pictures next to it are no part of it.
MOST_ASIDE = 0.5
SHOWN = 4  # names in a message
BESIDE_SPLITS = "beside the folders of the splits"


class AmbiguousLayout(DataError):
    """Folders that can be read in several ways."""


@dataclass(frozen=True)
class ClassFolder:
    """Images of one class in one split.

    Attributes:
        split: The split.
        name: The class, as the folder is called.
        folder: The folder that holds the images; it may lie in the one called `name`.
        key: The beginning of their keys.
        without: Folders in it that are no part of the class.
    """

    split: str
    name: str
    folder: Folder
    key: str
    without: tuple[Path, ...] = ()

    @property
    def text(self) -> str:
        """The name in the form in which labels are compared, whoever wrote its `é`."""
        return normal(self.name)


@dataclass
class Layout:
    """The meaning of each folder of a source. It is filled while the folders are read.

    Attributes:
        parts: The folders of images, by split and class.
        flat: The folders of splits that hold images without class folders.
        ignored: Folders and files that are no part of the data set, and why.
        outside: Folders that hold class folders; images directly in them have no class.
        text: The layout in words.
        said: Other decisions, a sentence each.
        doubtful: Decisions that may be wrong, a sentence each.
        origin: The folder from which --class-level counts.
        lies_below: True if the class folders have no splits, and lie below the source's own folder.
        masked: Folders of images that lie next to folders of masks.
    """

    parts: list[ClassFolder] = field(default_factory=list)
    flat: dict[str, Folder] = field(default_factory=dict)
    ignored: list[tuple[Path, str]] = field(default_factory=list)
    outside: list[Folder] = field(default_factory=list)
    text: str = ""
    said: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    origin: Folder | None = None
    lies_below: bool = False
    masked: set[Path] = field(default_factory=set)

    @property
    def splits(self) -> list[str]:
        """The splits that have class folders, in the order of `SPLITS`."""
        return in_order({part.split for part in self.parts})

    @property
    def class_texts(self) -> set[str]:
        """The classes of all splits, in the form in which labels are compared."""
        return {part.text for part in self.parts}

    def ignore(self, path: Path, cause: str) -> None:
        """Record a folder or file that is no part of the data set."""
        self.ignored.append((path, cause))

    def leave_out(self, folder: Folder) -> None:
        """Record a folder that --split, or its name, excludes from every split."""
        self.ignore(folder.path, f"{folder.total} images that are left out of every split")


@dataclass(frozen=True)
class Candidate:
    """A folder that may be a class.

    Attributes:
        folder: The folder, whose name would be the class.
        inner: The folder in it that holds the images, or other folders of images.
    """

    folder: Folder
    inner: Folder

    @property
    def holds_folders(self) -> bool:
        """True if it holds no images, only folders of images: these may be the classes."""
        return not self.inner.images and bool(self.inner.filled)


def read_layout(root: Folder, wanted: Wanted) -> Layout:
    """Tell splits from classes in a tree of folders.

    Args:
        root: The tree.
        wanted: The flags that a person gave.

    Raises:
        DataError: The folders are no classes, or can be read in two ways.
        UsageError: A folder looks like a split, and it is not known which.
    """
    layout = Layout()
    base, splits = find_splits(root, wanted, layout)
    if splits:
        # What lies next to the splits is compared with the classes, so these come first.
        for split, folder in splits.items():
            if split != NO_SPLIT:
                _read_split(layout, split, folder, wanted)
        _ignore_neighbours(layout, base, splits, wanted)
        layout.text = f"class folders in {_show_splits(splits)}"
    else:
        layout.origin = root
        layout.lies_below = base is not root
        read_classes(layout, "train", base, wanted)
        layout.text = layout.text or "class folders"
    if base is not root:
        layout.text += f", below {base.path.relative_to(root.path).as_posix()}/"
    return layout


def _show_splits(splits: dict[str, Folder]) -> str:
    """Return the folders of the splits in words: "train/, valid/ (val)"."""
    shown = []
    for split, folder in splits.items():
        if folder.name == split:
            shown.append(f"{folder.name}/")
        else:
            shown.append(f"{folder.name}/ ({split})")
    return ", ".join(shown)


def _read_split(layout: Layout, split: str, folder: Folder, wanted: Wanted) -> None:
    """Read the class folders of one split."""
    inner = _unwrap(folder)
    if split != "train":
        inner = _enter_same_name(inner, folder.name)
        # Images, or nothing at all, where class folders should be: a table may label them.
        if not inner.filled and (inner.images or not inner.folders):
            layout.flat[split] = inner
            return
    layout.origin = inner
    read_classes(layout, split, inner, wanted, in_split=True)


def _unwrap(folder: Folder) -> Folder:
    """Return the folder that holds the classes of a split.

    For an archive that was packed twice it is seg_train/seg_train.
    """
    while not folder.images and len(folder.filled) == 1:
        alone = folder.filled[0]
        if alone.filled:
            folder = alone
        elif NO_CLASSES.fullmatch(alone.name):
            return alone  # test/images/*.jpg
        else:
            break
    return folder


def _enter_same_name(folder: Folder, name: str) -> Folder:
    """Return the folder in `folder` that is called `name`, if there is nothing else.

    An archive that was packed twice leaves test/test/1.jpg.
    """
    if folder.images or len(folder.filled) != 1:
        return folder
    alone = folder.filled[0]
    if alone.name.casefold() != name.casefold():
        return folder
    return alone


def find_splits(root: Folder, wanted: Wanted, layout: Layout) -> tuple[Folder, dict[str, Folder]]:
    """Find the folders of the splits, which may lie below `root`.

    Args:
        root: The tree of folders.
        wanted: The flags that a person gave.
        layout: Gets what lies next to the data set, as ignored.

    Returns:
        The folder that holds them, and the folder of each split. If there are none, the folder of
        the classes, and {}.

    Raises:
        DataError: There are several data sets, or two folders of one split.
    """
    base = root
    while True:
        splits = splits_in(base, wanted)
        if splits:
            return base, splits

        # Descend into the only folder that may be the data set, if there is one.
        inner = []
        for folder in base.filled:
            if "train" in splits_in(folder, wanted):
                inner.append(folder)
        if len(inner) > 1:
            raise DataError(
                f"{base.path} holds several data sets: {', '.join(folder_names(inner))}; "
                "give the path of one"
            )
        alone = inner or _without_asides(base)
        is_one = len(alone) == 1 and base.images <= alone[0].total * MOST_ASIDE
        if not is_one or not alone[0].filled or wanted.class_level:
            return base, {}
        _ignore_asides(layout, base, alone[0])
        base = alone[0]


def _ignore_asides(layout: Layout, base: Folder, data_set: Folder) -> None:
    """Record what lies in `base` next to the data set as ignored."""
    cause = f"images beside the data set {data_set.name}"
    if base.images:
        layout.ignore(base.path, f"{base.images} {cause}")
    for folder in base.filled:
        if folder is not data_set:
            layout.ignore(folder.path, f"{folder.total} {cause}")


def _without_asides(base: Folder) -> list[Folder]:
    """Return the folders in `base` that may hold its classes.

    In a repository these are not the folders of its README's pictures.
    """
    containers = []
    others = []
    aside = 0
    for folder in base.filled:
        if not folder.images and len(folder.filled) > 1:
            containers.append(folder)
        else:
            others.append(folder)
            aside += folder.total
    are_asides = all(map(ASIDE.fullmatch, folder_names(others)))
    if len(containers) == 1 and are_asides and aside < containers[0].total * MOST_ASIDE:
        return containers
    return base.filled


def _ignore_neighbours(
    layout: Layout, base: Folder, splits: dict[str, Folder], wanted: Wanted
) -> None:
    """Record what lies next to the folders of the splits as ignored.

    Raises:
        UsageError: A folder there holds the classes of train: it is a split by another name.
    """
    classes = layout.class_texts
    used = [*splits.values()]
    for folder in base.folders:
        if split_of_folder(folder.name, wanted) == NO_SPLIT:
            layout.leave_out(folder)
        elif folder not in used:
            # A folder of most of train's classes would be lost as a neighbour.
            named = _texts(folder.filled)
            if len(named & classes) > len(named) / 2:
                raise unknown_split(folder.name, str(base.path))
            layout.ignore(folder.path, BESIDE_SPLITS)
    for name in (*base.files, *base.litter):
        layout.ignore(base.path / name, BESIDE_SPLITS)
    if base.images:
        layout.ignore(base.path, f"{base.images} images {BESIDE_SPLITS}")


def read_classes(
    layout: Layout, split: str, base: Folder, wanted: Wanted, *, in_split: bool = False
) -> None:
    """Read the class folders in `base`.

    Args:
        layout: Gets the class folders, and what else is found.
        split: The split of the images.
        base: The folder that holds the class folders.
        wanted: The flags that a person gave.
        in_split: True if `base` is the folder of a split: its name then says that it holds classes.

    Raises:
        DataError: The folders are no classes, or can be read in two ways.
        UsageError: A folder looks like a split, and it is not known which.
    """
    if wanted.class_level:
        _read_level(layout, split, base, wanted.class_level)
        return

    # Find the folders that may be classes, and refuse what cannot be.
    folders = _find_candidates(layout, base, wanted, in_split=in_split)
    _refuse_no_classes(base, folder_names(folders), in_split=in_split and split != "train")
    if not in_split:
        _refuse_split_among_classes(base, folders, wanted)

    # Folders that hold folders may be split by class, or hold the classes.
    candidates = []
    holders = []
    for folder in folders:
        candidate = Candidate(folder, _unwrap_class(folder, wanted, layout))
        candidates.append(candidate)
        if candidate.holds_folders:
            holders.append(candidate)
    if holders and _are_split_by_class(holders, wanted):
        _refuse_unsplit(candidates, holders[0])
        _read_splits_of_classes(layout, base, candidates, wanted)
        return
    if holders:
        _refuse_holders(layout, base, folders, holders)
    if not in_split:
        _refuse_repository(base, folders)
    _doubt_odd_classes(layout, folders)

    for candidate in candidates:
        layout.parts.append(_class_folder(layout, split, candidate, wanted))
    layout.outside.append(base)


def _find_candidates(
    layout: Layout, base: Folder, wanted: Wanted, *, in_split: bool
) -> list[Folder]:
    """Return the folders in `base` that may be classes, and record the others as ignored."""
    found = []
    for folder in base.folders:
        if split_of_folder(folder.name, wanted) == NO_SPLIT:
            layout.leave_out(folder)
            continue
        # An empty folder in train/ is a class whose images did not arrive. Among class folders
        # without splits it may be anything.
        if folder.total or (in_split and folder.is_empty):
            found.append(folder)
        else:
            layout.ignore(folder.path, "a folder without images")
            if folder.is_empty:
                layout.doubtful.append(f"{folder.path} is empty; if it is a class, add its images")
    return found


def _refuse_no_classes(base: Folder, ids: Sequence[str], *, in_split: bool) -> None:
    """Raise `DataError` if folders of these names are no classes.

    Args:
        base: The folder that holds them.
        ids: Their names.
        in_split: True in val and test: their folders are compared with those of train later.
    """
    if not ids:
        raise DataError(f"{base.path} holds no class folders; {LAYOUT}")
    if in_split:
        return
    classes = f"the classes would be {', '.join(ids[:5])}"
    if len(ids) > 5:
        classes += ", ..."
    if all(map(NO_CLASSES.fullmatch, ids)):
        raise DataError(
            f"{base.path} is no folder of classes: {classes}; {LAYOUT}, "
            "or put a labels.csv with the columns file and label there"
        )
    if all(map(_may_be_split, ids)):
        raise DataError(
            f"{base.path} is no folder of classes: {classes}, which are names of splits; {LAYOUT}"
        )
    if len(ids) == 1:
        raise DataError(
            f"{base.path} holds one class folder, {ids[0]!r}: there is nothing to tell apart; "
            f"{LAYOUT}"
        )


def _may_be_split(name: str) -> bool:
    """Return True if a folder of this name may be a split of any kind."""
    if SPLIT_FOLDER.fullmatch(name) or framed_split(name):
        return True
    return name.lower() in OTHER_SPLITS


def _unwrap_class(folder: Folder, wanted: Wanted, layout: Layout) -> Folder:
    """Return the folder that holds the images of a class: n01443537/images in Tiny ImageNet.

    Folders of masks next to it are recorded as ignored.
    """
    while not folder.images and folder.filled:
        inner = folder.filled
        images = _matching(IMAGES, inner)
        masks = _matching(MASKS, inner)
        # Masks are pixels, too: as images of the class they would be trained on.
        if len(images) == 1 and len(images) + len(masks) == len(inner) and masks:
            for each in masks:
                layout.ignore(each.path, f"{each.total} images in a folder of {each.name}")
            layout.masked.add(images[0].path)
            return images[0]
        # Several folders, or one of a split, are looked at together with those of other classes.
        if len(inner) > 1 or split_of_folder(inner[0].name, wanted) is not None:
            return folder
        folder = inner[0]
    return folder


def _refuse_unsplit(candidates: Sequence[Candidate], holder: Candidate) -> None:
    """Raise `DataError` if `holder` is split by itself, and another class folder is not."""
    # The images of the other would be of no split.
    for other in candidates:
        if not other.holds_folders:
            raise DataError(
                f"{holder.folder.path} holds folders of splits "
                f"({_some(folder_names(holder.inner.filled))}), and {other.folder.path} does not; "
                "sort its images into such folders, too"
            )


def _doubt_odd_classes(layout: Layout, folders: Sequence[Folder]) -> None:
    """Record as doubtful that folders of some names rarely are classes."""
    odd = folder_names(_matching(ODD_CLASS, folders))
    if odd:
        layout.doubtful.append(
            f"{_some(odd)} may be no class; --split {shlex.quote(f'{odd[0]}=none')} leaves it out"
        )


def _class_folder(layout: Layout, split: str, candidate: Candidate, wanted: Wanted) -> ClassFolder:
    """Return the class folder of a candidate.

    Raises:
        UsageError: It holds images, and a folder that is called as a split is.
    """
    folder = candidate.folder
    inner = candidate.inner
    # Next to masks the folder of the images alone counts, and its name is part of the keys.
    if inner.path in layout.masked:
        return ClassFolder(split, folder.name, inner, f"{folder.name}/{inner.name}")
    without = _leave_out_splits(layout, inner, wanted)
    return ClassFolder(split, folder.name, folder, folder.name, without)


def _leave_out_splits(layout: Layout, folder: Folder, wanted: Wanted) -> tuple[Path, ...]:
    """Return the folders next to the images of a class that belong to no split.

    Raises:
        UsageError: One there may be val or test.
    """
    if not folder.images:
        return ()
    without = []
    for each in folder.filled:
        split = split_of_folder(each.name, wanted)
        if split == NO_SPLIT:
            layout.leave_out(each)
            without.append(each.path)
        elif split in ("val", "test"):
            raise UsageError(
                f"{folder.path} holds images, and a folder {each.name} that may be a split; "
                f"move its images, or leave them out: --split {each.name}=none"
            )
    return tuple(without)


def _refuse_repository(base: Folder, folders: Sequence[Folder]) -> None:
    """Raise `DataError` for folders of a repository, which hold pictures and are no classes."""
    odd = _matching(REPOSITORY, folders)
    if odd:
        raise DataError(
            f"{base.path} is no folder of classes, by the names of its folders: "
            f"{_some(folder_names(folders))}. Give the path of the one that holds the class "
            "folders, or the table that labels the images: --table FILE; "
            f"to take each for a class, {odd[0].name} as well: --class-level 1"
        )


def _refuse_split_among_classes(base: Folder, folders: Sequence[Folder], wanted: Wanted) -> None:
    """Raise `UsageError` if some folders that should be classes may be splits."""
    framed = names_of_splits(framed_folders(base, wanted))
    exact = []
    others = []
    for each in folders:
        if split_of_folder(each.name, wanted) in ("val", "test"):
            exact.append(each.name)
        if each.name.lower() in OTHER_SPLITS:
            others.append(each.name)
    # A single odd name may be a class. Several hardly are, nor is val next to other folders.
    is_split = framed or len(others) > 1 or (others and exact)
    is_mixed = exact and len(exact) < len(folders)
    if is_split or is_mixed:
        name = (exact or others or framed)[0]
        raise UsageError(
            f"{base.path} holds {_some(folder_names(folders))}; "
            f"{_some({*framed, *exact, *others})} may be splits. "
            "Images without class folders need a table that labels them: --table FILE. "
            f"Leave out what is not to be used: --split {name}=none; "
            "or take each folder for a class: --class-level 1"
        )


def _are_split_by_class(holders: Sequence[Candidate], wanted: Wanted) -> bool:
    """Return True if each class is split by itself: cats/train, cats/test, dogs/train."""
    found = set()
    for holder in holders:
        for each in holder.inner.filled:
            found.add(split_of_folder(each.name, wanted))
    return "train" in found and None not in found


def _read_splits_of_classes(
    layout: Layout, base: Folder, candidates: Sequence[Candidate], wanted: Wanted
) -> None:
    """Read splits that lie in the folders of the classes.

    Raises:
        DataError: Two folders of a class are names of one split.
    """
    words: set[str] = set()
    for candidate in candidates:
        name = candidate.folder.name
        used: dict[str, Folder] = {}
        for each in candidate.inner.filled:
            words.add(each.name)
            split = split_of_folder(each.name, wanted)
            assert split is not None, "_are_split_by_class looked"
            if split == NO_SPLIT:
                layout.leave_out(each)
                continue
            if split in used:
                raise DataError(
                    f"{candidate.inner.path} holds {used[split].name} and {each.name}, "
                    f"which are both names of the split {split}; "
                    f"say what one of them is: --split {each.name}=test, or =none"
                )
            used[split] = each
            layout.parts.append(ClassFolder(split, name, each, name))
    layout.text = f"class folders with {', '.join(sorted(words))} in each"
    layout.outside.append(base)


def _refuse_holders(
    layout: Layout, base: Folder, folders: Sequence[Folder], holders: Sequence[Candidate]
) -> None:
    """Raise `AmbiguousLayout`: folders of folders may be the classes, or hold them."""
    # Several data sets have the same classes in each; one level too many has different ones.
    below = [_texts(holder.inner.filled) for holder in holders]
    shared = set[str]().union(*below)
    common = set[str]()
    if len(below) > 1:
        common = below[0].intersection(*below)

    # Say the two levels as --class-level counts them: from the split's folder, or the source's.
    origin = layout.origin or base
    depth = len(origin.path.parts) - 1
    inner = holders[0].inner.path
    first = len(base.path.parts) - depth
    level = len(inner.parts) - depth
    ways = [f"the folders {_some(folder_names(folders))} are the classes: --class-level {first}"]
    if common:
        ways.append(
            f"each of them holds the classes {_some(common)}: give the path of one, such as "
            f"{inner}, or --class-level {level} for all of them together"
        )
    else:
        ways.append(f"the folders in them, {_some(shared)}, are the classes: --class-level {level}")
        if len(holders) == 1:
            ways.append(f"{inner} is the data set: give its path")
    raise AmbiguousLayout(f"{base.path} can be read in {len(ways)} ways: {'; or '.join(ways)}")


def _read_level(layout: Layout, split: str, base: Folder, level: int) -> None:
    """Read the folders `level` levels below `base` as the classes, whatever lies between.

    Raises:
        UsageError: There are none.
        DataError: All of them have one name.
    """
    found = base.below(level)
    if not found:
        raise UsageError(
            f"{base.path} holds no folders with images {level} levels below; "
            "--class-level says which"
        )
    # The key holds the folders between, where two classes of one name may lie.
    for folder in found:
        key = folder.path.relative_to(base.path).as_posix()
        layout.parts.append(ClassFolder(split, folder.name, folder, key))
    if len(set(folder_names(found))) < 2:
        raise DataError(
            f"{base.path} holds one class {level} levels below, {found[0].name!r}: "
            "there is nothing to tell apart"
        )
    # Files on any level above the classes have no class.
    for depth in range(level):
        layout.outside += base.below(depth)
    levels = "levels" if level > 1 else "level"
    layout.text = f"class folders {level} {levels} below {base.name}"


def _matching(pattern: re.Pattern[str], folders: Iterable[Folder]) -> list[Folder]:
    """Return the folders whose whole names match."""
    return [folder for folder in folders if pattern.fullmatch(folder.name)]


def _texts(folders: Iterable[Folder]) -> set[str]:
    """Return the folders' names in the form in which labels are compared."""
    return set(map(normal, folder_names(folders)))


def _some(names: Iterable[str]) -> str:
    """Return a few of the names, sorted, and their number if there are more."""
    listed = sorted(names)
    shown = ", ".join(listed[:SHOWN])
    if len(listed) > SHOWN:
        shown += f", ... ({len(listed)})"
    return shown
