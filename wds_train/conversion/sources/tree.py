"""The folders of a source, with how many images lie in each: what layouts are told from, before any image is read.

The folders lie on a disk, or in tars (`tar cf data.tar CLASSES/`): both become the same `Folder`s.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from wds_train.conversion.sources.litter import litter_origin
from wds_train.conversion.sources.names import FOREIGN_SUFFIXES, IMAGE_SUFFIXES, UNREAD_SUFFIXES
from wds_train.conversion.sources.scan import SplitScan, scan
from wds_train.errors import DataError

# A folder of such files is meant as one of images, even if none of them can be used as it is.
PICTURES = IMAGE_SUFFIXES + FOREIGN_SUFFIXES + UNREAD_SUFFIXES

OUTSIDE_CLASSES = "outside the class folders"


@dataclass(eq=False)
class Folder:
    """A folder of a source.

    Attributes:
        path: Where it is; in tars, its name inside.
        images: How many pictures lie directly in it, by their names.
        files: The names of the other files in it that are no litter.
        folders: The folders in it that are no litter, by name.
        litter: Names that systems and programs left in it.
    """

    path: Path
    images: int = 0
    files: list[str] = field(default_factory=list)
    folders: list["Folder"] = field(default_factory=list)
    litter: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def total(self) -> int:
        """How many pictures lie in it and below."""
        return self.images + sum(folder.total for folder in self.folders)

    @cached_property
    def is_empty(self) -> bool:
        """Whether not one file lies in it or below, litter aside."""
        return not (self.images or self.files) and all(folder.is_empty for folder in self.folders)

    @property
    def filled(self) -> list["Folder"]:
        """The folders in it that hold pictures somewhere."""
        return [folder for folder in self.folders if folder.total]

    def walk(self) -> Iterator["Folder"]:
        """Yield this folder and all below it, top down."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    def below(self, depth: int) -> list["Folder"]:
        """Return the folders with pictures that lie `depth` levels below this one."""
        if depth == 0:
            return [self]
        return [found for folder in self.filled for found in folder.below(depth - 1)]


def is_picture(name: str) -> bool:
    """Tell whether a file of this name is meant as an image."""
    return name.lower().endswith(PICTURES)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether `path` is a folder or leads to one. A link to itself is neither: it is noted like any file that cannot be
    read.
    """
    try:
        return entry.is_dir()
    except OSError:
        return False


def read_tree(path: Path, above: frozenset[Path] = frozenset()) -> Folder:
    """Read the folders on the disk at `path`.

    Links are followed.

    Raises:
        DataError: A link leads to a folder that holds it.
    """
    here = path.resolve()
    if here in above:
        raise DataError(f"{path} is a link to a folder that holds it; remove the link")
    found = Folder(path)
    for entry in scan(path):
        holds_files = is_folder(entry)
        if litter_origin(entry.name, folder=holds_files):
            found.litter.append(entry.name)
        elif holds_files:
            found.folders.append(read_tree(Path(entry.path), above | {here}))
        elif is_picture(entry.name):
            found.images += 1
        else:
            found.files.append(entry.name)
    return found


def walk_files(
    folder: Path, prefix: str = "", without: Collection[Path] = ()
) -> Iterator[tuple[Path, str]]:
    """Yield every file under `folder` and its name below it, without folders of litter and those in `without`."""
    for entry in scan(folder):
        name = f"{prefix}{entry.name}"
        path = Path(entry.path)
        if not is_folder(entry):
            yield path, name
        elif litter_origin(entry.name, folder=True):
            yield path, name  # noted as what it is
        elif path not in without:
            yield from walk_files(path, f"{name}/", without)


class DiskFiles:
    """Adds the images of folders on a disk to a scan."""

    def add(
        self, found: SplitScan, label: int, folder: Folder, key: str, without: Collection[Path] = ()
    ) -> int:
        """Add every image below `folder`, with keys that begin with `key`.

        Args:
            without: Folders below it that are passed over.

        Returns:
            How many samples were added.
        """
        files = walk_files(folder.path, without=without)
        return sum(found.add_file(label, path, f"{key}/{name}") for path, name in files)

    def note_outside(self, found: SplitScan, folder: Folder) -> None:
        """Note the files that lie directly in `folder`, outside the class folders."""
        for entry in scan(folder.path):
            if not is_folder(entry) or litter_origin(entry.name, folder=True):
                cause = litter_origin(entry.name, folder=is_folder(entry)) or OUTSIDE_CLASSES
                found.note(entry.path, _what_outside(entry.name), cause)


@dataclass(frozen=True)
class TarFile:
    """A plain file in a tar: its name inside, and where its bytes lie."""

    name: str
    tar: str
    offset: int
    size: int


class TarFiles:
    """Adds the images of folders in tars to a scan."""

    def __init__(self, files: Sequence[TarFile]) -> None:
        self._by_folder: dict[str, list[TarFile]] = {}
        for file in files:
            parts = [part for part in file.name.split("/")[:-1] if part != "."]
            if not any(litter_origin(part, folder=True) for part in parts):
                self._by_folder.setdefault("/".join(parts), []).append(file)

    def tree(self, root: str) -> Folder:
        """Return the folders that the files' names tell of, below one called `root`."""
        top = Folder(Path(root))
        known = {"": top}
        for name in sorted(self._by_folder):
            folder = _folder_at(name, known, root)
            for file in self._by_folder[name]:
                base = file.name.rpartition("/")[2]
                if is_picture(base):
                    folder.images += 1
                else:
                    folder.files.append(base)
        return top

    def note_outside(self, found: SplitScan, folder: Folder) -> None:
        """Note the files that lie directly in `folder`, outside the class folders."""
        for file in self._by_folder.get("/".join(folder.path.parts[1:]), ()):
            base = file.name.rpartition("/")[2]
            found.note(f"{file.tar}: {file.name}", _what_outside(base), OUTSIDE_CLASSES)

    def add(
        self, found: SplitScan, label: int, folder: Folder, key: str, without: Collection[Path] = ()
    ) -> int:
        """Add every image below `folder`, with keys that begin with `key`."""
        inside = "/".join(folder.path.parts[1:])
        added = 0
        for name, files in self._by_folder.items():
            if any(Path(folder.path.parts[0]) / name == passed for passed in without):
                continue
            if not inside or name == inside or name.startswith(f"{inside}/"):
                rest = name[len(inside) :].strip("/")
                for file in files:
                    base = file.name.rpartition("/")[2]
                    place = "/".join(part for part in (key, rest, base) if part)
                    added += found.add(label, place, file.tar, file.offset, file.size)
        return added


def _what_outside(name: str) -> str:
    """Return what a note calls a file outside the class folders: an image is missed, anything else is not."""
    is_image = name.lower().endswith(IMAGE_SUFFIXES) and not litter_origin(name)
    return "left out" if is_image else "ignored"


def _folder_at(name: str, known: dict[str, Folder], root: str) -> Folder:
    if name not in known:
        parent = _folder_at(name.rpartition("/")[0], known, root)
        known[name] = Folder(Path(root) / name)
        parent.folders.append(known[name])
    return known[name]
