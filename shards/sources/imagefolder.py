"""Folders of images, one folder a class, as torchvision's ImageFolder reads them: `train/`, `val/` and `test/` of such
folders, whatever people call these, or just the class folders. Labels are the places of the class folders' names in sorted
order.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from shards.sources.base import Source, Wanted
from shards.sources.names import IMAGE_SUFFIXES, LITTER, SPLIT_FOLDER, SPLITS, choose_splits
from shards.sources.scan import SplitScan, scan
from shards.sources.splits import from_scans, to_classes
from wds_train.errors import DataError

LAYOUT = "an ImageFolder is CLASS/IMAGE.jpg, or train/CLASS/IMAGE.jpg and val/CLASS/IMAGE.jpg"
# Folders of a data set for detection or segmentation, or of one that was cut up: what they are named for are no classes.
NO_CLASSES = re.compile(
    r"(?:jpeg)?(images?|imgs?|labels?|annotations?|masks?)|(?:k?fold|part|batch)[-_ ]?\d+", re.IGNORECASE
)
WRAPPINGS = 2  # folders that hold nothing but the next one: archive/data/train


def image_folder(root: Path, wanted: Wanted) -> Source:
    """The classes below `root`, by split."""
    base, splits = find_splits(root)
    folders = {split: folder if folder == base else _unwrapped(folder) for split, folder in splits.items()}
    classes = class_ids(folders["train"])
    infos = to_classes(classes, imagenet_names(classes))  # before the scan: it refuses names that nothing could hold
    scans: list[SplitScan] = []
    for split, folder in folders.items():
        if split == "val" and not _subfolders(folder):
            raise DataError(
                f"{folder} holds no class folders: sort its images into folders called as those of train, or move it away, "
                "and a tenth of train is held out"
            )
        if split == "test" and not _subfolders(folder):
            scans[0].note(folder, "ignored", "no class folders: images without labels")
        else:
            scans.append(scan_split(split, folder, classes, foreign=wanted.reencode))
    if base not in splits.values():
        for entry in scan(base):
            if Path(entry.path) not in splits.values():
                scans[0].note(entry.path, "ignored", "beside the folders of the splits")
    return from_scans(f"imagefolder {root.name}", infos, scans)


def scan_split(split: str, folder: Path, classes: list[str], *, foreign: bool = False) -> SplitScan:
    """The images in the class folders of `folder`."""
    found = SplitScan(split, foreign=foreign)
    for entry in scan(folder):
        if _is_class(entry):
            _add_class(found, classes, Path(entry.path))
        else:
            is_image = Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and not LITTER.fullmatch(entry.name)
            found.note(entry.path, "left out" if is_image else "ignored", "outside the class folders")
    return found


def find_splits(root: Path) -> tuple[Path, dict[str, Path]]:
    """The folder of the splits, which may lie a little below `root`, and theirs; without any, the folder of the classes
    alone, as `train`.
    """
    base = root
    for _ in range(WRAPPINGS + 1):
        if splits := _splits_in(base):
            return base, splits
        inner = [folder for folder in _subfolders(base) if "train" in _splits_in(folder)]
        alone = inner or _subfolders(base)
        if len(inner) > 1:
            raise DataError(f"{base} holds several data sets: {', '.join(f.name for f in inner)}; give the path of one")
        if len(alone) != 1 or not (inner or _subfolders(alone[0])):
            break
        base = alone[0]
    return base, {"train": base}


def _splits_in(folder: Path) -> dict[str, Path]:
    """The folders train, val and test as far as they are folders in `folder`; empty where there is no train that holds
    class folders.
    """
    words: dict[str, list[Path]] = {}
    for each in _subfolders(folder):
        if found := SPLIT_FOLDER.fullmatch(each.name):
            split = next(iter(choose_splits([found[1].lower()]).values()))
            words.setdefault(split, []).append(each)
    if not any(_subfolders(each) for each in words.get("train", ())):  # else it may be a class: train, bus, car
        return {}
    for split, folders in words.items():
        if len(folders) > 1:
            raise DataError(
                f"{folder} holds {' and '.join(each.name for each in folders)}, which are all names of the split "
                f"{split}; keep one of them, or move the others away"
            )
    return {split: words[split][0] for split in SPLITS if split in words}


def _unwrapped(folder: Path) -> Path:
    """Where the classes of the split `folder` are: seg_train/seg_train, as archives that were packed twice leave it."""
    inner = _subfolders(folder)
    return inner[0] if len(inner) == 1 and _subfolders(inner[0]) else folder


def _subfolders(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in scan(folder) if _is_class(entry)]


def class_ids(folder: Path) -> list[str]:
    """The names of the class folders; `DataError` when they are none, or the layout was plainly meant otherwise."""
    ids = [entry.name for entry in scan(folder) if _is_class(entry)]
    if not ids:
        raise DataError(f"{folder} holds no class folders; {LAYOUT}")
    told = f"the classes would be {', '.join(ids[:5])}{', ...' if ids[5:] else ''}"
    if all(NO_CLASSES.fullmatch(id) for id in ids):
        raise DataError(
            f"{folder} is no folder of classes: {told}; {LAYOUT}, or put a labels.csv with the columns file and label there"
        )
    if all(SPLIT_FOLDER.fullmatch(id) for id in ids):
        raise DataError(f"{folder} is no folder of classes: {told}, which are names of splits; {LAYOUT}")
    if len(ids) == 1:
        raise DataError(f"{folder} holds one class folder, {ids[0]!r}: there is nothing to tell apart; {LAYOUT}")
    return ids


def _is_class(entry: os.DirEntry[str]) -> bool:
    return is_folder(entry) and not LITTER.fullmatch(entry.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether `path` is a folder or leads to one. A link to itself is neither: it is noted like any file that cannot be
    read.
    """
    try:
        return entry.is_dir()
    except OSError:
        return False


def _add_class(found: SplitScan, classes: list[str], folder: Path) -> None:
    if folder.name not in classes:
        raise DataError(f"the class {folder.name!r} is in {folder.parent} but not in train; add it there, or remove it")
    label = classes.index(folder.name)
    if not sum([found.add_file(label, path, f"{folder.name}/{name}") for path, name in walk(folder, "")]):
        raise DataError(f"the class folder {folder} holds no images; add some, or remove the folder")


def walk(folder: Path, prefix: str, above: frozenset[Path] = frozenset()) -> Iterator[tuple[Path, str]]:
    """Every file under `folder` and its name below it; links are followed, one that leads back up is an error. What the
    operating system keeps in a folder of its own stays there.
    """
    here = folder.resolve()
    if here in above:
        raise DataError(f"{folder} is a link to a folder that holds it; remove the link")
    for entry in scan(folder):
        name = f"{prefix}{entry.name}"
        if is_folder(entry) and not LITTER.fullmatch(entry.name):
            yield from walk(Path(entry.path), f"{name}/", above | {here})
        else:
            yield Path(entry.path), name


def imagenet_names(ids: list[str]) -> dict[str, str]:
    """Human names of those `ids` that are WordNet ids of ImageNet, from the table that timm carries."""
    import importlib.util

    if not all(len(id) == 9 and id[0] == "n" and id[1:].isdigit() for id in ids):
        return {}
    spec = importlib.util.find_spec("timm")  # finds the files without importing timm, which would bring in torch
    if spec is None or not spec.submodule_search_locations:
        return {}
    table = Path(spec.submodule_search_locations[0]) / "data" / "_info" / "imagenet_synset_to_lemma.txt"
    pairs = (line.split("\t", 1) for line in table.read_text().splitlines()) if table.is_file() else ()
    return dict(pairs)
