"""Folders of images, one folder a class: torchvision's ImageFolder, and what people make of it.

`layout` says what each folder is; here the images of the class folders become a source. Folders on
a disk come from `folder`, those in tars from `tars`.
"""

import importlib.util
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from wds_train.conversion.sources.labels import NO_LABEL, Classes, classes_of, to_classes
from wds_train.conversion.sources.layout import ClassFolder, Layout, read_layout
from wds_train.conversion.sources.scan import SplitScan
from wds_train.conversion.sources.source import Source, Understood, Wanted
from wds_train.conversion.sources.splits import from_scans
from wds_train.conversion.sources.tree import DiskFiles, Folder, read_tree
from wds_train.errors import DataError


class Files(Protocol):
    """Adds the images of folders to a scan: `DiskFiles` or `TarFiles`."""

    def note_outside(self, found: SplitScan, folder: Folder) -> None:
        """Note the files that lie directly in `folder`, outside the class folders."""

    def add(
        self, found: SplitScan, label: int, folder: Folder, key: str, without: Collection[Path] = ()
    ) -> int:
        """Add every image below `folder`, and return the number of samples added.

        Args:
            found: The scan that they are added to.
            label: Their label.
            folder: The folder.
            key: The beginning of their keys.
            without: Folders below it that are passed over.
        """


def open_image_folder(root: Path, wanted: Wanted) -> Source:
    """Read the class folders below a folder of the disk (`--source imagefolder`).

    Raises:
        DataError: The folders are no classes, or can be read in two ways.
        UsageError: A folder looks like a split, and it is not known which.
    """
    return folder_source(read_layout(read_tree(root), wanted), root.name, DiskFiles(), wanted)


def folder_source(layout: Layout, name: str, files: Files, wanted: Wanted) -> Source:
    """Make the source of a layout.

    Args:
        layout: The meaning of the folders.
        name: The source's name, for its description.
        files: Adds the images of the folders.
        wanted: The flags that a person gave.

    Raises:
        DataError: A split has no classes, or a class no images.
    """
    if "val" in layout.flat:
        raise DataError(
            f"{layout.flat['val'].path} holds no class folders: sort its images into folders "
            "called as those of train, or move it away, and a tenth of train is held out; "
            "or name the table of its labels: --table FILE"
        )
    # The folders' names are the classes, whatever the images turn out to be.
    classes = folder_classes(layout, wanted)
    scans = begin_scans(layout.splits, wanted)

    # Find every image, and note what is not used.
    for part in layout.parts:
        add_class(scans[part.split], classes.numbers[part.text], part, files)
    found = list(scans.values())
    note_layout(layout, found[0], files)
    understood = Understood(
        layout.text, "the folders' names", [*layout.said, *classes.said], layout.doubtful
    )
    return from_scans(f"imagefolder {name}", classes.infos, found, understood)


def begin_scans(splits: Iterable[str], wanted: Wanted) -> dict[str, SplitScan]:
    """Return an empty scan for each split, which takes the images that `wanted` asks for."""
    return {split: SplitScan(split, foreign=wanted.reencode) for split in splits}


def note_layout(layout: Layout, found: SplitScan, files: Files) -> None:
    """Note what the layout does not use.

    Args:
        layout: The meaning of the folders.
        found: The scan that gets the notes.
        files: Knows the files outside the class folders.
    """
    for folder in layout.flat.values():
        found.note(folder.path, "ignored", "no class folders: images without labels")
    for path, cause in layout.ignored:
        found.note(path, "ignored", cause)
    for outside in layout.outside:
        files.note_outside(found, outside)


def folder_classes(layout: Layout, wanted: Wanted) -> Classes:
    """Return the classes that the folders name, and the label of each name.

    Raises:
        DataError: A class is in another split and not in train.
    """
    # A class folder counts even if its images did not arrive.
    counts: dict[str, int] = {}
    for part in layout.parts:
        counts[part.text] = counts.get(part.text, 0) + max(1, part.folder.total)
    where = layout.parts[0].folder.path.parent
    found = classes_of(counts, str(where), wanted.labels, sure=True)
    if wanted.labels.classes:
        return found

    # Nothing could be learnt of a class that train lacks.
    known = set()
    for part in layout.parts:
        if part.split == "train":
            known.add(found.numbers[part.text])
    for part in layout.parts:
        if found.numbers[part.text] not in known:
            raise DataError(
                f"the class {part.name!r} is in {part.folder.path.parent} but not in train; "
                "add it there, or remove it"
            )

    # WordNet ids get names that people can read.
    ids = [entry.id for entry in found.infos]
    names = imagenet_names(ids)
    if not names:
        return found
    return Classes(to_classes(ids, names), found.numbers, found.said)


def add_class(found: SplitScan, label: int, part: ClassFolder, files: Files) -> None:
    """Add the images of a class folder.

    Args:
        found: The scan that they are added to.
        label: The number of the class; `NO_LABEL` notes the folder as ignored.
        part: The class folder.
        files: Adds the images.

    Raises:
        DataError: There are none.
    """
    if label == NO_LABEL:
        found.note(part.folder.path, "ignored", "no class: --no-label says so")
        return
    if not files.add(found, label, part.folder, part.key, part.without):
        # Without images the class could be neither trained nor recognised.
        raise DataError(
            f"the class folder {part.folder.path} holds no images; add some, or remove the folder"
        )


def imagenet_names(ids: Sequence[str]) -> dict[str, str]:
    """Return the names of ImageNet's classes, from the table that timm carries.

    Args:
        ids: The classes.

    Returns:
        WordNet id -> name; {} unless all of `ids` are WordNet ids, and if timm has no such table.
    """
    if not all(map(_is_wordnet_id, ids)):
        return {}
    # Find the file without importing timm, which would bring in torch.
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(spec.submodule_search_locations[0]) / "data" / "_info"
    table = folder / "imagenet_synset_to_lemma.txt"
    if not table.is_file():
        return {}
    names = {}
    for line in table.read_text().splitlines():
        wordnet_id, name = line.split("\t", 1)
        names[wordnet_id] = name
    return names


def _is_wordnet_id(text: str) -> bool:
    """Return True for a text like n01440764."""
    return len(text) == 9 and text[0] == "n" and text[1:].isdigit()
