"""The images below a folder, found by what tables call them: a path, a name, or a name without its suffix."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from wds_train.conversion.sources.imagefolder import MASKS
from wds_train.conversion.sources.names import IMAGE_SUFFIXES, SPLIT_OF, normal
from wds_train.conversion.sources.tree import PICTURES, walk_files
from wds_train.errors import DataError

SPLIT_PREFIX = re.compile(
    rf"({'|'.join(sorted(SPLIT_OF, key=len, reverse=True))})[-_ ]?\d", re.IGNORECASE
)


class Match(NamedTuple):
    """An image that a table names.

    Attributes:
        image: Its place in `ImageIndex.paths`.
        parts: How many parts of its path agree with what the table says.
        whole: Whether all that the table says agrees.
    """

    image: int
    parts: int
    whole: bool


class AmbiguousName(DataError):
    """A name that several images have."""


class ImageIndex:
    """The image files below `root`.

    Attributes:
        root: The folder.
        paths: Each image's path below `root`, in the order of the scan.
    """

    def __init__(self, root: Path, splits: Mapping[str, str]) -> None:
        """Read the images below `root`; `splits` are the splits of folders that are called so, by their paths below it."""
        self.root = root
        self._splits = splits
        self.paths: list[str] = []
        self._split_in_name: dict[int, str] = {}
        self._by_name: dict[str, list[int]] = {}
        self._by_stem: dict[str, list[int]] = {}
        self._by_number: dict[int, list[int]] = {}
        for _, name in walk_files(root):
            if name.lower().endswith(PICTURES):
                base = fold(name.rpartition("/")[2])
                self._by_name.setdefault(base, []).append(len(self.paths))
                stem = base.rpartition(".")[0]
                self._by_stem.setdefault(stem, []).append(len(self.paths))
                if stem.isdecimal():
                    self._by_number.setdefault(int(stem), []).append(len(self.paths))
                self.paths.append(name)
        self._read_splits_in_names()

    def __len__(self) -> int:
        return len(self.paths)

    def _read_splits_in_names(self) -> None:
        """Read the splits of images that are called so: train_0001.jpg, test_0001.jpg. All of them must be."""
        found: dict[int, str] = {}
        for image, path in enumerate(self.paths):
            word = SPLIT_PREFIX.match(path.rpartition("/")[2])
            if word is None:
                return
            found[image] = SPLIT_OF[word[1].lower()]
        if "train" in found.values() and len({*found.values()}) > 1:
            self._split_in_name = found

    def find(self, name: str, table: Path) -> Match:
        """Return the image that the file `table` calls `name`.

        The path may have been right on another machine: the longest end of it that is here decides. Of several, one beside the
        table, or in a folder that is called as the table is, comes first (`train.csv`, `train/`).

        Raises:
            DataError: There is none, or there are several.
        """
        given = [
            part
            for part in normal(name).strip().replace("\\", "/").split("/")
            if part not in ("", ".")
        ]
        if not given:
            raise DataError("there is no such image: the cell is empty")
        base = fold(given[-1])
        found = self._by_name.get(base, []) or self._by_stem.get(base, [])
        if not found and base.isdecimal():  # the table says 7, the file is 007.png
            found = self._by_number.get(int(base), [])
        if not found and base.endswith(
            PICTURES
        ):  # converted since: the table says .jpg, the file is a .png
            found = self._by_stem.get(base.rpartition(".")[0], [])
        if not found:
            raise DataError("there is no such image")
        if len(found) == 1:
            return self._match(found[0], given)
        near = [folder for folder in (self._below(table.parent), normal(table.stem)) if folder]
        ranked = sorted(found, key=lambda image: self._rank(image, given, near), reverse=True)
        best, second = (self._rank(image, given, near) for image in ranked[:2])
        if best == second:
            places = " or ".join(str(self.root / self.paths[image]) for image in ranked[:2])
            raise AmbiguousName(f"it may be {places}; write its folder, too")
        return self._match(ranked[0], given)

    def _match(self, image: int, given: Sequence[str]) -> Match:
        alike, _ = self._agreement(image, given)
        return Match(image, alike, alike == len(given))

    def _below(self, folder: Path) -> str:
        """Return the path of `folder` below the root; nothing for the root itself, and for what lies elsewhere."""
        if folder == self.root or not folder.is_relative_to(self.root):
            return ""
        return folder.relative_to(self.root).as_posix()

    def _agreement(self, image: int, given: Sequence[str]) -> tuple[int, int]:
        """Count the last parts of the image's path that agree with `given`: in any case, and exactly."""
        parts = normal(self.paths[image]).split("/")
        given = list(given)
        if fold(parts[-1]) != fold(given[-1]):  # found by its name without a suffix
            parts[-1] = parts[-1].rpartition(".")[0]
            if fold(given[-1]).endswith(PICTURES):
                given = [*given[:-1], given[-1].rpartition(".")[0]]
            if parts[-1].isdecimal() and given[-1].isdecimal():
                parts[-1] = given[-1] = str(int(parts[-1]))
        alike = exact = 0
        same_case = True
        for mine, other in zip(reversed(parts), reversed(given), strict=False):
            if fold(mine) != fold(other):
                break
            same_case = same_case and mine == other
            alike += 1
            exact += same_case
        return alike, exact

    def has_name(self, text: str) -> bool:
        """Tell whether an image is called so, with or without a suffix; numbers alone may be anything."""
        base = fold(text)
        return base in self._by_name or (base in self._by_stem and not base.isdecimal())

    def split_of(self, image: int) -> str:
        """Return the split that the folders of an image say; empty where none does."""
        pieces = self.paths[image].split("/")
        for depth in range(len(pieces) - 1, 0, -1):
            split = self._splits.get("/".join(pieces[:depth]))
            if split is not None:
                return split
        return self._split_in_name.get(image, "")

    def _rank(
        self, image: int, given: Sequence[str], near: Sequence[str]
    ) -> tuple[int, int, bool, bool, int]:
        alike, exact = self._agreement(image, given)
        before = "/".join(self.paths[image].split("/")[:-alike]) if alike else ""
        beside = bool(near) and any(
            fold(before) == fold(folder) or fold(before).endswith(f"/{fold(folder)}")
            for folder in near
        )
        is_kept = self.paths[image].lower().endswith(IMAGE_SUFFIXES)
        is_mask = any(MASKS.fullmatch(part) for part in self.paths[image].split("/")[:-1])
        return alike, int(beside), not is_mask, is_kept, exact


def fold(name: str) -> str:
    """Return what a name is compared by: tables from Windows call IMG_1.JPG img_1.jpg."""
    return normal(name).casefold()
