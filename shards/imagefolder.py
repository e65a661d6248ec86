"""Folders of images, one folder a class, as torchvision's ImageFolder reads them: `train/` and `val/` of such folders, or
just the folders. Labels are the places of the class folders' names in sorted order.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from shards.source import IMAGE_SUFFIXES, LITTER, VAL_NAMES, Source, SplitScan, from_scans, scan, to_classes
from wds_train.errors import DataError


def image_folder(root: Path) -> Source:
    folders = _split_folders(root)
    classes = _class_ids(folders["train"])
    scans = [scan_split(split, folder, classes) for split, folder in folders.items()]
    for entry in scan(root):
        if root not in folders.values() and Path(entry.path) not in folders.values():
            scans[0].note(entry.path, "ignored", "beside the folders of the splits")
    return from_scans(f"imagefolder {root.name}", to_classes(classes, imagenet_names(classes)), scans)


def scan_split(split: str, folder: Path, classes: list[str]) -> SplitScan:
    found = SplitScan(split)
    for entry in scan(folder):
        if _is_class(entry):
            _add_class(found, classes, Path(entry.path))
        else:
            is_image = Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and not LITTER.fullmatch(entry.name)
            found.note(entry.path, "left out" if is_image else "ignored", "outside the class folders")
    return found


def _split_folders(root: Path) -> dict[str, Path]:
    if not (root / "train").is_dir():
        return {"train": root}
    val = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    return {"train": root / "train"} | ({"val": val} if val else {})


def _class_ids(folder: Path) -> list[str]:
    ids = [entry.name for entry in scan(folder) if _is_class(entry)]
    if not ids:
        raise DataError(f"{folder} holds no class folders; ImageFolder is CLASS/IMAGE.jpg, or train/CLASS/IMAGE.jpg")
    return ids


def _is_class(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not LITTER.fullmatch(entry.name)


def _add_class(found: SplitScan, classes: list[str], folder: Path) -> None:
    if folder.name not in classes:
        raise DataError(f"the class {folder.name!r} is in {folder.parent} but not in train; add it there, or remove it")
    label = classes.index(folder.name)
    if not sum([found.add_file(label, path, f"{folder.name}/{name}") for path, name in _files(folder, "")]):
        raise DataError(f"the class folder {folder} holds no images; add some, or remove the folder")


def _files(folder: Path, prefix: str, above: frozenset[Path] = frozenset()) -> Iterator[tuple[Path, str]]:
    """Every file under `folder` and its name below it; links are followed, one that leads back up is an error."""
    here = folder.resolve()
    if here in above:
        raise DataError(f"{folder} is a link to a folder that holds it; remove the link")
    for entry in scan(folder):
        name = f"{prefix}{entry.name}"
        if entry.is_dir():
            yield from _files(Path(entry.path), f"{name}/", above | {here})
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
