"""Folders that are splits by their names: train/ and val/, seg_train/, leaf_train/ and leaf_test/.

`layout` looks for them before it reads classes; `folder` tells by them which split an image of a
table lies in.
"""

from wds_train.conversion.sources.names import (
    NO_SPLIT,
    SPLIT_FOLDER,
    SPLIT_OF,
    SPLITS,
    framed_split,
)
from wds_train.conversion.sources.source import Wanted
from wds_train.conversion.sources.tree import Folder, folder_names
from wds_train.errors import DataError, UsageError


def split_of_folder(name: str, wanted: Wanted) -> str | None:
    """Return the split that a folder of this name is: train, val, test or none.

    Args:
        name: The folder's name.
        wanted: The flags, which may say the split.

    Returns:
        The split; None for any other name.
    """
    said = wanted.splits.get(name.lower())
    if said is not None:
        return said
    found = SPLIT_FOLDER.fullmatch(name)
    if found is None:
        return None
    return SPLIT_OF[found[1].lower()]


def splits_in(folder: Folder, wanted: Wanted) -> dict[str, Folder]:
    """Return the folders of splits in `folder`.

    Args:
        folder: The folder that holds them.
        wanted: The flags, which may say splits.

    Returns:
        split -> its folder, in the order of `SPLITS`; {} without a train that holds class folders.

    Raises:
        DataError: Two folders are names of one split.
    """
    # Collect the folders that are named for splits; if train is not there, those of one frame.
    found: dict[str, list[Folder]] = {}
    for each in folder.folders:
        split = split_of_folder(each.name, wanted)
        if split is not None and (each.total or split != NO_SPLIT):
            found.setdefault(split, []).append(each)
    if "train" not in found:
        found = framed_folders(folder, wanted) or found
    # A train without folders may be a class: train, bus, car.
    if not any(each.folders for each in found.get("train", ())):
        return {}

    # Each split has one folder; any number of them may be left out.
    for split, folders in found.items():
        if len(folders) > 1 and split != NO_SPLIT:
            raise DataError(
                f"{folder.path} holds {' and '.join(folder_names(folders))}, "
                f"which are all names of the split {split}; keep one of them, "
                f"or say what the others are: --split {folders[-1].name}=test, or =none"
            )
    splits = {}
    for split in (*SPLITS, NO_SPLIT):
        if split in found:
            splits[split] = found[split][0]
    return splits


def framed_folders(folder: Folder, wanted: Wanted) -> dict[str, list[Folder]]:
    """Return the folders of splits in `folder` whose names have one frame: leaf_train, leaf_test.

    Args:
        folder: The folder that holds them.
        wanted: The flags. A folder that they name is no part of a frame.

    Returns:
        split -> its folders; {} without train, or if train is alone.

    Raises:
        UsageError: There are such splits of several frames.
    """
    frames: dict[str, dict[str, list[Folder]]] = {}
    for each in folder.filled:
        found = framed_split(each.name)
        if found is not None and each.name.lower() not in wanted.splits:
            frames.setdefault(found.frame, {}).setdefault(found.split, []).append(each)

    # One split alone is none: a class may be called test_tube.
    several = []
    for splits in frames.values():
        if len(splits) > 1 and "train" in splits:
            several.append(splits)
    if not several:
        return {}
    if len(several) > 1:
        names: list[str] = []
        for splits in several:
            names += names_of_splits(splits)
        raise UsageError(
            f"{folder.path} holds the splits of several data sets: {', '.join(names)}; "
            f"say which are used, as in --split {names[0]}=train, "
            "and leave the others out with =none"
        )
    return several[0]


def names_of_splits(splits: dict[str, list[Folder]]) -> list[str]:
    """Return the names of the folders, split by split."""
    names = []
    for folders in splits.values():
        names += folder_names(folders)
    return names


def folder_splits(root: Folder, wanted: Wanted) -> dict[str, str]:
    """Return the split of each folder that is named for one.

    Args:
        root: The tree of folders.
        wanted: The flags, which may say splits.

    Returns:
        The folder's path below `root` -> its split.

    Raises:
        UsageError: A folder holds the splits of several data sets.
    """
    found: dict[str, str] = {}
    for folder in root.walk():
        # A name of its own counts before one of a frame.
        framed: dict[str, str] = {}
        for split, folders in framed_folders(folder, wanted).items():
            framed |= dict.fromkeys(folder_names(folders), split)
        for each in folder.folders:
            said = split_of_folder(each.name, wanted) or framed.get(each.name)
            if said is not None:
                found[each.path.relative_to(root.path).as_posix()] = said
    return found
