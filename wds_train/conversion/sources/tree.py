"""The tree of a source's folders, with the number of images in each.

Layouts are recognised in this tree, before any image is read. The folders lie on a disk, or in tars
(`tar cf data.tar CLASSES/`): both become the same `Folder`s. `DiskFiles` and `TarFiles` then add
the images of the folders that were chosen to a scan.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from wds_train.conversion.sources.litter import litter_origin
from wds_train.conversion.sources.names import FOREIGN_SUFFIXES, IMAGE_SUFFIXES, UNREAD_SUFFIXES
from wds_train.conversion.sources.scan import SplitScan, scan
from wds_train.errors import DataError

# A folder of such files is meant as one of images, even if none of them can be used as it is.
PICTURES = IMAGE_SUFFIXES + FOREIGN_SUFFIXES + UNREAD_SUFFIXES

OUTSIDE_CLASSES = "outside the class folders"  # the cause that a note gives


@dataclass(eq=False)
class Folder:
    """A folder of a source.

    Attributes:
        path: Its path; in tars, the source's name and then its name inside.
        images: The number of pictures directly in it, judged by their names.
        files: The names of the other files in it that are no litter.
        folders: The folders in it that are no litter, by name.
        litter: Names in it that systems and programs left.
    """

    path: Path
    images: int = 0
    files: list[str] = field(default_factory=list)
    folders: list["Folder"] = field(default_factory=list)
    litter: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.name

    @cached_property
    def total(self) -> int:
        """The number of pictures in it and below."""
        return self.images + sum(folder.total for folder in self.folders)

    @cached_property
    def is_empty(self) -> bool:
        """True if it and the folders below hold no file at all, litter aside."""
        if self.images or self.files:
            return False
        return all(folder.is_empty for folder in self.folders)

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
        # Folders that end above that level are no part of it.
        found = []
        for folder in self.filled:
            found += folder.below(depth - 1)
        return found


def folder_names(folders: Iterable[Folder]) -> list[str]:
    """Return the names of the folders, in their order."""
    return [folder.name for folder in folders]


def is_picture(name: str) -> bool:
    """Return True if a file of this name is meant as an image."""
    return name.lower().endswith(PICTURES)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder, and for a link to one.

    A link to itself is no folder: it is noted like any file that cannot be read.
    """
    try:
        return entry.is_dir()
    except OSError:
        return False


def read_tree(path: Path, above: frozenset[Path] = frozenset()) -> Folder:
    """Read the folders on the disk at `path`; links are followed.

    Args:
        path: The top folder.
        above: The folders that hold it, resolved; used to find circles of links.

    Raises:
        DataError: A link leads to a folder that holds it.
    """
    # Links are followed, so a circle of them would never end.
    here = path.resolve()
    if here in above:
        raise DataError(f"{path} is a link to a folder that holds it; remove the link")
    found = Folder(path)
    for entry in scan(path):
        # Litter comes first: a recycle bin may hold folders that look like classes.
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
    """Yield every file under `folder`, and folders of litter as if they were files.

    Args:
        folder: The top folder.
        prefix: The beginning of the names.
        without: Folders that are passed over.

    Yields:
        The path of the file, and its name below `folder`, with slashes.
    """
    for entry in scan(folder):
        name = f"{prefix}{entry.name}"
        path = Path(entry.path)
        if not is_folder(entry):
            yield path, name
        elif litter_origin(entry.name, folder=True):
            yield path, name  # not entered: the scan notes it as the litter that it is
        elif path not in without:
            yield from walk_files(path, f"{name}/", without)


class DiskFiles:
    """The images of folders on a disk, to be added to a scan."""

    def add(
        self, found: SplitScan, label: int, folder: Folder, key: str, without: Collection[Path] = ()
    ) -> int:
        """Add every image below `folder`.

        Args:
            found: The scan that they are added to.
            label: Their label.
            folder: The folder.
            key: The beginning of their keys.
            without: Folders below it that are passed over.

        Returns:
            The number of samples that were added.
        """
        added = 0
        for path, name in walk_files(folder.path, without=without):
            added += found.add_file(label, path, f"{key}/{name}")
        return added

    def note_outside(self, found: SplitScan, folder: Folder) -> None:
        """Note the files that lie directly in `folder`, outside the class folders."""
        for entry in scan(folder.path):
            # Folders are classes or have a note of their own, unless they are litter.
            holds_files = is_folder(entry)
            litter = litter_origin(entry.name, folder=holds_files)
            if litter or not holds_files:
                found.note(entry.path, _fate_outside(entry.name), litter or OUTSIDE_CLASSES)


@dataclass(frozen=True)
class TarFile:
    """A plain file in a tar.

    Attributes:
        name: Its name inside.
        tar: The path of the tar.
        offset: The first of its bytes in the tar.
        size: The number of its bytes.
    """

    name: str
    tar: str
    offset: int
    size: int

    @property
    def base(self) -> str:
        """The last part of its name."""
        return self.name.rpartition("/")[2]


class TarFiles:
    """The images of folders in tars, to be added to a scan.

    Args:
        files: The files in the tars. Those in folders of litter are passed over.
    """

    def __init__(self, files: Sequence[TarFile]) -> None:
        # By the folder's name inside the tars, whichever tar it comes from.
        self._by_folder: dict[str, list[TarFile]] = {}
        for file in files:
            # tar cf data.tar . writes ./train/cat/1.jpg.
            parts = [part for part in file.name.split("/")[:-1] if part != "."]
            if not _holds_litter(parts):
                self._by_folder.setdefault("/".join(parts), []).append(file)

    def tree(self, root: str) -> Folder:
        """Return the folders that the files lie in, below one called `root`."""
        # A tar lists files alone, in any order: make each folder, and those above it, once.
        top = Folder(Path(root))
        known = {"": top}
        for name in sorted(self._by_folder):
            folder = _folder_at(name, known, root)
            for file in self._by_folder[name]:
                if is_picture(file.base):
                    folder.images += 1
                else:
                    folder.files.append(file.base)
        return top

    def note_outside(self, found: SplitScan, folder: Folder) -> None:
        """Note the files that lie directly in `folder`, outside the class folders."""
        for file in self._by_folder.get(_inside(folder), ()):
            found.note(f"{file.tar}: {file.name}", _fate_outside(file.base), OUTSIDE_CLASSES)

    def add(
        self, found: SplitScan, label: int, folder: Folder, key: str, without: Collection[Path] = ()
    ) -> int:
        """Add every image below `folder`; see `DiskFiles.add`."""
        # Any number of tars may hold a part of the folder, and of the folders below it.
        inside = _inside(folder)
        added = 0
        for name, files in self._by_folder.items():
            is_below = not inside or name == inside or name.startswith(f"{inside}/")
            if not is_below or Path(folder.path.parts[0]) / name in without:
                continue
            rest = name[len(inside) :].strip("/")  # empty for the folder itself
            for file in files:
                place = "/".join(part for part in (key, rest, file.base) if part)
                added += found.add(label, place, file.tar, file.offset, file.size)
        return added


def _holds_litter(folders: Sequence[str]) -> bool:
    """Return True if one of these names is of a folder of litter."""
    return any(litter_origin(name, folder=True) for name in folders)


def _inside(folder: Folder) -> str:
    """Return the name of a folder inside its tar, without the root that `TarFiles.tree` adds."""
    return "/".join(folder.path.parts[1:])


def _fate_outside(name: str) -> str:
    """Return what a note says of a file outside the class folders.

    A person may miss an image; anything else nobody will.
    """
    if name.lower().endswith(IMAGE_SUFFIXES) and not litter_origin(name):
        return "left out"
    return "ignored"


def _folder_at(name: str, known: dict[str, Folder], root: str) -> Folder:
    """Return the folder of a name inside the tars, after making it and those above it."""
    if name not in known:
        parent = _folder_at(name.rpartition("/")[0], known, root)
        known[name] = Folder(Path(root) / name)
        parent.folders.append(known[name])
    return known[name]
