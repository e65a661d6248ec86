"""Folders of images, one folder a class, as torchvision's ImageFolder reads them, and as people have them.

The folders are read first (`wds_train.conversion.sources.tree`), then `read_layout` tells splits from classes. Where two readings fit it
refuses, and names both with what to type.

```
CLASS/1.jpg                    train/CLASS/1.jpg, val/CLASS/1.jpg, test/CLASS/1.jpg
wrapped/in/CLASS/1.jpg         CLASS/train/1.jpg, CLASS/test/1.jpg
```
"""

import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from wds_train.conversion.sources.labels import NO_LABEL, Classes, classes_of, to_classes
from wds_train.conversion.sources.names import (
    NO_SPLIT,
    OTHER_SPLITS,
    SPLIT_FOLDER,
    SPLIT_OF,
    SPLITS,
    framed_split,
    normal,
    unknown_split,
)
from wds_train.conversion.sources.scan import SplitScan
from wds_train.conversion.sources.source import Source, Understood, Wanted
from wds_train.conversion.sources.splits import from_scans
from wds_train.conversion.sources.tree import DiskFiles, Folder, read_tree
from wds_train.errors import DataError, UsageError

LAYOUT = "an ImageFolder is CLASS/IMAGE.jpg, or train/CLASS/IMAGE.jpg and val/CLASS/IMAGE.jpg"
# Folders of a data set for detection or segmentation, or of one that was cut up: what they are named for are no classes.
NO_CLASSES = re.compile(
    r"(?:jpeg)?(images?|imgs?|labels?|annotations?|masks?)|(?:k?fold|part|batch)[-_ ]?\d+"
    r"|.*[-_ ](?:part|images?|batch|fold|chunk)[-_ ]?\d+|images?[-_ ]?\d+"
    r"|(?:set|cv|session|camera|cam|user|patient|subject|run|round|shard|chunk)[-_ ]?(?:\d+|[a-z])|(?:19|20)\d\d"
    r"|rgb|depth|nir|thermal|inputs?|targets?|gt|lq|hq|lr|hr|originals?|augmented|raw|processed",
    re.IGNORECASE,
)
IMAGES = re.compile(r"(?:jpeg)?(?:images?|imgs?|photos?)", re.IGNORECASE)
# What lies beside images, and is made of pixels all the same: their segmentation, or what one sees of it.
MASKS = re.compile(
    r"(?:tri)?maps?|masks?|annotations?|labels?|segmentations?|(?:ground[-_ ]?truths?|gt)|depths?|overlays?|heat[-_ ]?maps?",
    re.IGNORECASE,
)
# What stands beside a data set in a repository, and holds pictures.
ASIDE = re.compile(
    r"examples?|samples?|sample[-_ ]images?|demos?|docs?|assets|figures?|figs?|static|media|screenshots?|previews?|thumbnails?"
    r"|notebooks?|src|scripts?|readme[-_ ]?(?:images|files)?|logos?|icons?|results?|outputs?|predictions?|plots?|runs|web|app",
    re.IGNORECASE,
)


# Folders of code, pages and data: one of them among class folders says that these are none.
REPOSITORY = re.compile(
    r"src|docs?|static|assets|readme[-_ ]?(?:images|files|assets)?|data[-_ ]?sets?|data|images?|imgs?|gui|screenshots?"
    r"|scripts?|notebooks?|media|public|examples?|samples?[-_ ]?(?:images|data)?|demos?|node_modules",
    re.IGNORECASE,
)
# Folders that may be classes, and rarely are.
ODD_CLASS = re.compile(
    r"masks?|thumb(?:nail)?s?|cache[d]?|trash|backup|duplicates?|un(?:sorted|known|labell?ed)|to[-_ ]?sort|temp|tmp|misc|others?"
    r"|new folder.*|untitled.*|.* - copy.*|.* ?\(copy\)|.* \(\d+\)|copy of .*",
    re.IGNORECASE,
)
MOST_ASIDE = 0.5  # of the data set's images, as pictures beside it that are no part of it


class AmbiguousLayout(DataError):
    """Folders that can be read in several ways."""


class Files(Protocol):
    """Adds the images of folders to a scan: those of a disk, or those in tars."""

    def note_outside(self, found: SplitScan, folder: Folder) -> None:
        """Note the files that lie directly in `folder`, outside the class folders."""

    def add(
        self, found: SplitScan, label: int, folder: Folder, key: str, without: Collection[Path] = ()
    ) -> int:
        """Add every image below `folder` but those in the folders `without`, with keys that begin with `key`; return how
        many were.
        """


@dataclass(frozen=True)
class ClassFolder:
    """Images of one class in one split. `key` is what their keys begin with; the folders `without` are no part of it."""

    split: str
    name: str
    folder: Folder
    key: str
    without: tuple[Path, ...] = ()


@dataclass
class Layout:
    """How folders of images are read.

    Attributes:
        parts: The folders of images, by split and class.
        flat: The folders of splits that hold images without class folders.
        ignored: Folders and files that are no part of it, and why.
        outside: Pictures that lie beside the class folders.
        text: The layout in words.
        said: What else was decided.
        doubtful: What may be otherwise than it was read.
    """

    parts: list[ClassFolder] = field(default_factory=list)
    flat: dict[str, Folder] = field(default_factory=dict)
    ignored: list[tuple[Path, str]] = field(default_factory=list)
    outside: list[Folder] = field(default_factory=list)
    text: str = ""
    said: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    origin: Folder | None = None
    """Where the levels of --class-level count from."""
    lies_below: bool = False
    """Whether the class folders, without splits, lie below the source's own folder."""
    masked: set[Path] = field(default_factory=set)
    """Folders of images that lie beside folders of masks."""

    @property
    def splits(self) -> list[str]:
        return [split for split in SPLITS if split in {part.split for part in self.parts}]


def image_folder(root: Path, wanted: Wanted) -> Source:
    """Read the classes below the folder `root` of a disk, by split."""
    return folder_source(read_layout(read_tree(root), wanted), root.name, DiskFiles(), wanted)


def folder_source(layout: Layout, name: str, files: Files, wanted: Wanted) -> Source:
    """Return the source that `layout` says, with the images that `files` brings.

    Raises:
        DataError: A split has no classes, or a class no images.
    """
    for split, folder in layout.flat.items():
        if split == "val":
            raise DataError(
                f"{folder.path} holds no class folders: sort its images into folders called as those of train, or move it "
                "away, and a tenth of train is held out; or name the table of its labels: --table FILE"
            )
    classes = folder_classes(layout, wanted)
    scans = {split: SplitScan(split, foreign=wanted.reencode) for split in layout.splits}
    for part in layout.parts:
        add_class(scans[part.split], classes.numbers[normal(part.name)], part, files)
    first = next(iter(scans.values()))
    note_layout(layout, first, files)
    understood = Understood(
        layout.text, "the folders' names", [*layout.said, *classes.said], layout.doubtful
    )
    return from_scans(f"imagefolder {name}", classes.infos, [*scans.values()], understood)


def note_layout(layout: Layout, found: SplitScan, files: Files) -> None:
    """Note what lies beside the folders that are used."""
    for folder in layout.flat.values():
        found.note(folder.path, "ignored", "no class folders: images without labels")
    for path, cause in layout.ignored:
        found.note(path, "ignored", cause)
    for outside in layout.outside:
        files.note_outside(found, outside)


def folder_classes(layout: Layout, wanted: Wanted) -> Classes:
    """Return the classes that the folders of `layout` name, and the label of each name."""
    train = {normal(part.name) for part in layout.parts if part.split == "train"}
    counts: dict[str, int] = {}
    for part in layout.parts:
        counts[normal(part.name)] = counts.get(normal(part.name), 0) + max(1, part.folder.total)
    where = layout.parts[0].folder.path.parent
    found = classes_of(counts, str(where), wanted.labels, sure=True)
    known = {found.numbers[name] for name in train}
    for part in layout.parts:
        if found.numbers[normal(part.name)] not in known and not wanted.labels.classes:
            raise DataError(
                f"the class {part.name!r} is in {part.folder.path.parent} but not in train; add it there, or remove it"
            )
    names = imagenet_names([entry.id for entry in found.infos])
    if not names or wanted.labels.classes:
        return found
    infos = to_classes([entry.id for entry in found.infos], names)
    return Classes(infos, found.numbers, found.said)


def add_class(found: SplitScan, label: int, part: ClassFolder, files: Files) -> None:
    """Add the images of a class folder; `DataError` when there are none."""
    if label == NO_LABEL:
        found.note(part.folder.path, "ignored", "no class: --no-label says so")
        return
    if not files.add(found, label, part.folder, part.key, part.without):
        raise DataError(
            f"the class folder {part.folder.path} holds no images; add some, or remove the folder"
        )


def read_layout(root: Folder, wanted: Wanted) -> Layout:
    """Tell splits from classes in the folders below `root`.

    Raises:
        DataError: They are no classes, or can be read in two ways.
        UsageError: A folder looks like a split, and it is not known which.
    """
    layout = Layout()
    base, splits = find_splits(root, wanted, layout)
    if splits:
        for split, folder in splits.items():
            if split != NO_SPLIT:
                _read_split(layout, split, folder, wanted)
        _ignore_neighbours(layout, base, splits, wanted)
        folders = ", ".join(
            f"{folder.name}/" + (f" ({split})" if folder.name != split else "")
            for split, folder in splits.items()
        )
        layout.text = f"class folders in {folders}"
    else:
        layout.origin = root
        layout.lies_below = base is not root
        read_classes(layout, "train", base, wanted)
        layout.text = layout.text or "class folders"
    if base is not root:
        layout.text += f", below {base.path.relative_to(root.path).as_posix()}/"
    return layout


def _read_split(layout: Layout, split: str, folder: Folder, wanted: Wanted) -> None:
    """Read the class folders of one split."""
    inner = _unwrapped(folder)
    alone = inner.filled[0] if len(inner.filled) == 1 and not inner.images else None
    if split != "train" and alone is not None and alone.name.casefold() == folder.name.casefold():
        inner = alone  # test/test/1.jpg, as an archive that was packed twice leaves it
    if not inner.filled and (inner.images or not inner.folders) and split != "train":
        layout.flat[split] = inner
    else:
        layout.origin = inner
        read_classes(layout, split, inner, wanted, in_split=True)


def _unwrapped(folder: Folder) -> Folder:
    """Return where the classes of a split are: seg_train/seg_train, as archives that were packed twice leave it."""
    inner = folder.filled
    while len(inner) == 1 and not folder.images and inner[0].filled:
        folder = inner[0]
        inner = folder.filled
    if len(inner) == 1 and not folder.images and NO_CLASSES.fullmatch(inner[0].name):
        return inner[0]  # test/images/*.jpg
    return folder


def find_splits(root: Folder, wanted: Wanted, layout: Layout) -> tuple[Folder, dict[str, Folder]]:
    """Find the folder of the splits, which may lie below `root`.

    Returns:
        That folder, and the folder of each split; without any, the folder of the classes alone.
    """
    base = root
    while True:
        if splits := splits_in(base, wanted):
            return base, splits
        inner = [folder for folder in base.filled if "train" in splits_in(folder, wanted)]
        if len(inner) > 1:
            raise DataError(
                f"{base.path} holds several data sets: {', '.join(f.name for f in inner)}; give the path of one"
            )
        alone = inner or _without_asides(base)
        few = len(alone) == 1 and base.images <= alone[0].total * MOST_ASIDE
        if not few or not alone[0].filled or wanted.class_level:
            return base, {}
        if base.images:
            layout.ignored.append(
                (base.path, f"{base.images} images beside the data set {alone[0].name}")
            )
        for folder in base.filled:
            if folder is not alone[0]:
                layout.ignored.append(
                    (folder.path, f"{folder.total} images beside the data set {alone[0].name}")
                )
        base = alone[0]


def _without_asides(base: Folder) -> list[Folder]:
    """Return the folders in `base` that may hold its classes: of a repository, not the pictures of its README."""
    filled = base.filled
    containers = [folder for folder in filled if not folder.images and len(folder.filled) > 1]
    others = [folder for folder in filled if folder not in containers]
    aside = sum(folder.total for folder in others)
    are_asides = all(ASIDE.fullmatch(folder.name) for folder in others)
    if len(containers) == 1 and are_asides and aside < containers[0].total * MOST_ASIDE:
        return containers
    return filled


def split_of_folder(name: str, wanted: Wanted) -> str | None:
    """Return the split that a folder of this name is: train, val, test or none; None for any other name."""
    said = wanted.splits.get(name.lower())
    if said is not None:
        return said
    found = SPLIT_FOLDER.fullmatch(name)
    return SPLIT_OF[found[1].lower()] if found else None


def splits_in(folder: Folder, wanted: Wanted) -> dict[str, Folder]:
    """Return the folders of splits in `folder`; none where there is no train that holds class folders.

    Raises:
        DataError: Two folders are names of one split.
    """
    found: dict[str, list[Folder]] = {}
    for each in folder.folders:
        split = split_of_folder(each.name, wanted)
        if split is not None and (each.total or split != NO_SPLIT):
            found.setdefault(split, []).append(each)
    if "train" not in found:
        found = _framed_splits(folder, wanted) or found
    if not any(
        each.folders for each in found.get("train", ())
    ):  # else it may be a class: train, bus, car
        return {}
    for split, folders in found.items():
        if len(folders) > 1 and split != NO_SPLIT:
            raise DataError(
                f"{folder.path} holds {' and '.join(each.name for each in folders)}, which are all names of the split "
                f"{split}; keep one of them, or say what the others are: --split {folders[-1].name}=test, or =none"
            )
    order = [*SPLITS, NO_SPLIT]
    return {split: found[split][0] for split in order if split in found}


def _framed_splits(folder: Folder, wanted: Wanted) -> dict[str, list[Folder]]:
    """Return the folders of splits in `folder` that are called leaf_train and leaf_test, say: one frame, several splits."""
    frames: dict[str, dict[str, list[Folder]]] = {}
    for each in folder.filled:
        found = framed_split(each.name)
        if found is not None and each.name.lower() not in wanted.splits:
            frames.setdefault(found.frame, {}).setdefault(found.split, []).append(each)
    several = [splits for splits in frames.values() if len(splits) > 1 and "train" in splits]
    if len(several) > 1:
        names = [each.name for splits in several for folders in splits.values() for each in folders]
        raise UsageError(
            f"{folder.path} holds the splits of several data sets: {', '.join(names)}; say which are used, as in "
            f"--split {names[0]}=train, and leave the others out with =none"
        )
    return several[0] if several else {}


def folder_splits(root: Folder, wanted: Wanted) -> dict[str, str]:
    """Return the split of each folder below `root` that is called so, by its path below `root`."""
    found: dict[str, str] = {}
    for folder in root.walk():
        framed = {
            each.name: split
            for split, folders in _framed_splits(folder, wanted).items()
            for each in folders
        }
        for each in folder.folders:
            split = split_of_folder(each.name, wanted) or framed.get(each.name)
            if split is not None:
                found[each.path.relative_to(root.path).as_posix()] = split
    return found


def _ignore_neighbours(
    layout: Layout, base: Folder, splits: dict[str, Folder], wanted: Wanted
) -> None:
    """Note what lies beside the folders of the splits.

    Raises:
        UsageError: A folder there holds the classes of train: it is a split by another name.
    """
    classes = {normal(part.name) for part in layout.parts}
    used = {id(folder) for folder in splits.values()}
    for folder in base.folders:
        if split_of_folder(folder.name, wanted) == NO_SPLIT:
            layout.ignored.append(
                (folder.path, f"{folder.total} images that are left out of every split")
            )
        elif id(folder) not in used:
            named = {normal(each.name) for each in folder.filled}
            if len(named & classes) > len(named) / 2:
                raise unknown_split(folder.name, str(base.path))
            layout.ignored.append((folder.path, "beside the folders of the splits"))
    for name in [*base.files, *base.litter]:
        layout.ignored.append((base.path / name, "beside the folders of the splits"))
    if base.images:
        layout.ignored.append((base.path, f"{base.images} images beside the folders of the splits"))


def read_classes(
    layout: Layout, split: str, base: Folder, wanted: Wanted, *, in_split: bool = False
) -> None:
    """Read the class folders in `base`."""
    if wanted.class_level:
        _read_level(layout, split, base, wanted.class_level)
        return
    folders = _candidates(layout, base, wanted, in_split=in_split)
    _refuse_no_classes(
        base, [folder.name for folder in folders], in_split=in_split and split != "train"
    )
    if not in_split:
        _refuse_split_among_classes(base, folders, wanted)
    inner = {folder.name: _unwrapped_class(folder, wanted, layout) for folder in folders}
    holders = [
        folder for folder in folders if not inner[folder.name].images and inner[folder.name].filled
    ]
    if holders and _are_split_by_class([inner[folder.name] for folder in holders], wanted):
        if len(holders) < len(folders):
            other = next(folder for folder in folders if folder not in holders)
            raise DataError(
                f"{holders[0].path} holds folders of splits ({_some(each.name for each in inner[holders[0].name].filled)}), and "
                f"{other.path} does not; sort its images into such folders, too"
            )
        _read_splits_of_classes(
            layout, base, [inner[folder.name] for folder in folders], folders, wanted
        )
        return
    if holders:
        _refuse_holders(layout, base, folders, holders, inner)
    if not in_split:
        _refuse_repository(base, folders)
    odd = [folder.name for folder in folders if ODD_CLASS.fullmatch(folder.name)]
    if odd:
        layout.doubtful.append(
            f"{_some(odd)} may be no class; --split {shlex.quote(f'{odd[0]}=none')} leaves it out"
        )
    for folder in folders:
        without = _without_splits(layout, inner[folder.name], wanted)
        part = inner[folder.name] if without is None else folder
        key = folder.name if part is folder else f"{folder.name}/{part.name}"
        layout.parts.append(ClassFolder(split, folder.name, part, key, tuple(without or ())))
    layout.outside.append(base)


def _candidates(layout: Layout, base: Folder, wanted: Wanted, *, in_split: bool) -> list[Folder]:
    """Return the folders in `base` that may be classes; others are noted as ignored."""
    found = []
    for folder in base.folders:
        if split_of_folder(folder.name, wanted) == NO_SPLIT:
            layout.ignored.append(
                (folder.path, f"{folder.total} images that are left out of every split")
            )
            continue
        # An empty folder in train/ is a class whose images did not arrive; among class folders it may be anything's.
        if folder.total or (in_split and folder.is_empty):
            found.append(folder)
        else:
            layout.ignored.append((folder.path, "a folder without images"))
            if folder.is_empty:
                layout.doubtful.append(f"{folder.path} is empty; if it is a class, add its images")
    return found


def _refuse_no_classes(base: Folder, ids: Sequence[str], *, in_split: bool) -> None:
    """Raise `DataError` when folders of these names are no classes."""
    if not ids:
        raise DataError(f"{base.path} holds no class folders; {LAYOUT}")
    if in_split:
        return
    told = f"the classes would be {', '.join(ids[:5])}{', ...' if ids[5:] else ''}"
    if all(NO_CLASSES.fullmatch(id) for id in ids):
        raise DataError(
            f"{base.path} is no folder of classes: {told}; {LAYOUT}, or put a labels.csv with the columns file and label there"
        )
    if all(
        SPLIT_FOLDER.fullmatch(id) or framed_split(id) or id.lower() in OTHER_SPLITS for id in ids
    ):
        raise DataError(
            f"{base.path} is no folder of classes: {told}, which are names of splits; {LAYOUT}"
        )
    if len(ids) == 1:
        raise DataError(
            f"{base.path} holds one class folder, {ids[0]!r}: there is nothing to tell apart; {LAYOUT}"
        )


def _unwrapped_class(folder: Folder, wanted: Wanted, layout: Layout) -> Folder:
    """Return where the images of a class are: n01443537/images, as in Tiny ImageNet; beside masks, those that are none."""
    while not folder.images and folder.filled:
        inner = folder.filled
        images = [each for each in inner if IMAGES.fullmatch(each.name)]
        masks = [each for each in inner if MASKS.fullmatch(each.name)]
        if len(images) == 1 and len(images) + len(masks) == len(inner) and masks:
            layout.ignored += [
                (each.path, f"{each.total} images in a folder of {each.name}") for each in masks
            ]
            layout.masked.add(images[0].path)
            return images[0]
        if len(inner) > 1 or split_of_folder(inner[0].name, wanted) is not None:
            return folder
        folder = inner[0]
    return folder


def _without_splits(layout: Layout, folder: Folder, wanted: Wanted) -> list[Path] | None:
    """Return the folders in a class folder that hold no images of the class to train on; None for images beside masks.

    Raises:
        UsageError: A class folder holds images, and a folder that is called as a split is.
    """
    if folder.path in layout.masked:
        return None
    without = []
    for each in folder.filled if folder.images else ():
        split = split_of_folder(each.name, wanted)
        if split == NO_SPLIT:
            layout.ignored.append(
                (each.path, f"{each.total} images that are left out of every split")
            )
            without.append(each.path)
        elif split in ("val", "test"):
            raise UsageError(
                f"{folder.path} holds images, and a folder {each.name} that may be a split; move its images, or leave them out: "
                f"--split {each.name}=none"
            )
    return without


def _refuse_repository(base: Folder, folders: Sequence[Folder]) -> None:
    """Raise `DataError` for folders of a repository, which hold pictures and are no classes."""
    odd = [folder.name for folder in folders if REPOSITORY.fullmatch(folder.name)]
    if odd:
        raise DataError(
            f"{base.path} is no folder of classes, by the names of its folders: {_some(folder.name for folder in folders)}. Give the "
            f"path of the one that holds the class folders, or the table that labels the images: --table FILE; to take each for a "
            f"class, {odd[0]} as well: --class-level 1"
        )


def _refuse_split_among_classes(base: Folder, folders: Sequence[Folder], wanted: Wanted) -> None:
    """Raise `UsageError` where folders of splits, or one such, stand where class folders should."""
    framed = [each for splits in _framed_splits(base, wanted).values() for each in splits]
    exact = [each for each in folders if split_of_folder(each.name, wanted) in ("val", "test")]
    others = [each for each in folders if each.name.lower() in OTHER_SPLITS]
    odd = [*framed, *exact, *others]
    if framed or len(others) > 1 or (others and exact) or (exact and len(exact) < len(folders)):
        name = (exact or others or odd)[0].name
        raise UsageError(
            f"{base.path} holds {_some(each.name for each in folders)}; {_some({each.name for each in odd})} may be splits. "
            f"Images without class folders need a table that labels them: --table FILE. Leave out what is not to be used: "
            f"--split {name}=none; or take each folder for a class: --class-level 1"
        )


def _are_split_by_class(holders: Sequence[Folder], wanted: Wanted) -> bool:
    """Tell whether each class is split by itself: cats/train, cats/test, dogs/train."""
    inner = [each for folder in holders for each in folder.filled]
    found = {split_of_folder(each.name, wanted) for each in inner}
    return "train" in found and None not in found


def _read_splits_of_classes(
    layout: Layout, base: Folder, inner: Sequence[Folder], folders: Sequence[Folder], wanted: Wanted
) -> None:
    """Read splits that lie in the folders of the classes."""
    for folder, holder in zip(folders, inner, strict=True):
        used: dict[str, Folder] = {}
        for each in holder.filled:
            split = split_of_folder(each.name, wanted)
            assert split is not None, "_are_split_by_class looked"
            if split == NO_SPLIT:
                layout.ignored.append(
                    (each.path, f"{each.total} images that are left out of every split")
                )
                continue
            if split in used:
                raise DataError(
                    f"{holder.path} holds {used[split].name} and {each.name}, which are both names of the split {split}; say "
                    f"what one of them is: --split {each.name}=test, or =none"
                )
            used[split] = each
            layout.parts.append(ClassFolder(split, folder.name, each, folder.name))
    words = sorted({each.name for holder in inner for each in holder.filled})
    layout.text = f"class folders with {', '.join(words)} in each"
    layout.outside.append(base)


def _refuse_holders(
    layout: Layout,
    base: Folder,
    folders: Sequence[Folder],
    holders: Sequence[Folder],
    inner: dict[str, Folder],
) -> None:
    """Raise `DataError`: folders that hold only folders may be classes, or hold the classes."""
    below = {
        folder.name: {normal(each.name) for each in inner[folder.name].filled} for folder in holders
    }
    shared = set.union(*below.values())
    common = set.intersection(*below.values()) if len(below) > 1 else set[str]()
    origin = layout.origin or base
    first = len(base.path.parts) - len(origin.path.parts) + 1
    level = len(inner[holders[0].name].path.parts) - len(origin.path.parts) + 1
    ways = [
        f"the folders {_some(folder.name for folder in folders)} are the classes: --class-level {first}"
    ]
    if common:
        ways.append(
            f"each of them holds the classes {_some(common)}: give the path of one, such as "
            f"{inner[holders[0].name].path}, or --class-level {level} for all of them together"
        )
    else:
        ways.append(f"the folders in them, {_some(shared)}, are the classes: --class-level {level}")
        if len(holders) == 1:
            ways.append(f"{inner[holders[0].name].path} is the data set: give its path")
    raise AmbiguousLayout(f"{base.path} can be read in {len(ways)} ways: {'; or '.join(ways)}")


def _read_level(layout: Layout, split: str, base: Folder, level: int) -> None:
    """Read the folders that lie `level` levels below `base` as the classes, whatever they lie in."""
    found = base.below(level)
    if not found:
        raise UsageError(
            f"{base.path} holds no folders with images {level} levels below; --class-level says which"
        )
    for folder in found:
        key = folder.path.relative_to(base.path).as_posix()
        layout.parts.append(ClassFolder(split, folder.name, folder, key))
    if len({part.name for part in layout.parts if part.split == split}) < 2:
        raise DataError(
            f"{base.path} holds one class {level} levels below, {found[0].name!r}: there is nothing to tell apart"
        )
    layout.text = f"class folders {level} level{'s' * (level > 1)} below {base.name}"
    for depth in range(level):
        layout.outside += base.below(depth)


def _some(names: object) -> str:
    """Name a few of `names`."""
    listed = sorted(names)  # type: ignore[call-overload]
    return ", ".join(listed[:4]) + (f", ... ({len(listed)})" if listed[4:] else "")


def imagenet_names(ids: list[str]) -> dict[str, str]:
    """Human names of those `ids` that are WordNet ids of ImageNet, from the table that timm carries."""
    import importlib.util

    if not all(len(id) == 9 and id[0] == "n" and id[1:].isdigit() for id in ids):
        return {}
    spec = importlib.util.find_spec(
        "timm"
    )  # finds the files without importing timm, which would bring in torch
    if spec is None or not spec.submodule_search_locations:
        return {}
    table = (
        Path(spec.submodule_search_locations[0]) / "data" / "_info" / "imagenet_synset_to_lemma.txt"
    )
    pairs = (
        (line.split("\t", 1) for line in table.read_text().splitlines()) if table.is_file() else ()
    )
    return dict(pairs)
