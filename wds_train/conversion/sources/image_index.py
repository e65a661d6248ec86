"""The images below a folder, to be found by the names that tables give them.

A table may write a path, a name, or a name without its suffix; `label_tables` and `table` look up
each row here.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from wds_train.conversion.sources.layout import MASKS
from wds_train.conversion.sources.names import IMAGE_SUFFIXES, SPLIT_OF, normal
from wds_train.conversion.sources.tree import PICTURES, walk_files
from wds_train.errors import DataError

# The split in the name of an image: train_0001.jpg. The longest words first: else `train` would be
# found in `training`.
SPLIT_PREFIX = re.compile(
    rf"({'|'.join(sorted(SPLIT_OF, key=len, reverse=True))})[-_ ]?\d", re.IGNORECASE
)


class Match(NamedTuple):
    """An image that a table names.

    Attributes:
        image: Its place in `ImageIndex.paths`.
        parts: The number of parts of its path that agree with the table, from the end.
        whole: True if all that the table says agrees.
    """

    image: int
    parts: int
    whole: bool


class Agreement(NamedTuple):
    """The number of parts at the end of two paths that agree.

    Attributes:
        alike: Parts that agree in any case.
        exact: Parts that agree in their case, too.
    """

    alike: int
    exact: int


class Rank(NamedTuple):
    """The order in which images of one name are preferred: the largest first, field by field."""

    alike: int
    is_near: bool
    is_no_mask: bool
    is_kept: bool
    exact: int


class AmbiguousName(DataError):
    """Several images have this name."""


class ImageIndex:
    """The image files below a folder.

    Args:
        root: The folder, whose images are read now.
        splits: The split of each folder that is named for one, by its path below `root`.

    Attributes:
        root: The folder.
        paths: Each image's path below `root`, in the order of the scan.
    """

    def __init__(self, root: Path, splits: Mapping[str, str]) -> None:
        self.root = root
        self._splits = splits
        self.paths: list[str] = []
        # The images of each name, of each name without its suffix, and of each such number.
        self._by_name: dict[str, list[int]] = {}
        self._by_stem: dict[str, list[int]] = {}
        self._by_number: dict[int, list[int]] = {}
        for _, name in walk_files(root):
            if name.lower().endswith(PICTURES):
                self._add(name)
        self._split_in_name = _splits_in_names(self.paths)

    def _add(self, path: str) -> None:
        image = len(self.paths)
        self.paths.append(path)
        base = fold(path.rpartition("/")[2])
        self._by_name.setdefault(base, []).append(image)
        stem = base.rpartition(".")[0]
        self._by_stem.setdefault(stem, []).append(image)
        if stem.isdecimal():
            self._by_number.setdefault(int(stem), []).append(image)

    def __len__(self) -> int:
        return len(self.paths)

    def find(self, name: str, table: Path) -> Match:
        """Find the image that a table names.

        The path may have been right on another machine, so the longest end of it that exists here
        decides. Of several images, one next to the table, or in a folder with the table's name
        (`train.csv`, `train/`), comes first.

        Args:
            name: The cell of the table.
            table: The path of the table.

        Raises:
            DataError: There is no such image.
            AmbiguousName: There are several.
        """
        parts = normal(name).strip().replace("\\", "/").split("/")
        given = [part for part in parts if part not in ("", ".")]
        if not given:
            raise DataError("there is no such image: the cell is empty")
        found = self._called(fold(given[-1]))
        if not found:
            raise DataError("there is no such image")
        if len(found) == 1:
            return self._match(found[0], given)

        # Several have the name: the two best must differ in rank.
        near: tuple[str, ...] = (f"/{fold(table.stem)}",)
        folder = self._below(table.parent)
        if folder:
            near += (f"/{fold(folder)}",)
        ranked = sorted(found, key=lambda image: self._rank(image, given, near), reverse=True)
        best, second = ranked[:2]
        if self._rank(best, given, near) == self._rank(second, given, near):
            places = f"{self.root / self.paths[best]} or {self.root / self.paths[second]}"
            raise AmbiguousName(f"it may be {places}; write its folder, too")
        return self._match(best, given)

    def _called(self, base: str) -> Sequence[int]:
        """Return the images that the last part of a table's path, folded, may mean."""
        found = self._by_name.get(base) or self._by_stem.get(base, [])
        if not found and base.isdecimal():  # the table says 7, the file is 007.png
            found = self._by_number.get(int(base), [])
        if not found and base.endswith(PICTURES):
            # Converted since: the table says .jpg, the file is a .png.
            found = self._by_stem.get(base.rpartition(".")[0], [])
        return found

    def _match(self, image: int, given: Sequence[str]) -> Match:
        alike = self._agreement(image, given).alike
        return Match(image, alike, alike == len(given))

    def _below(self, folder: Path) -> str:
        """Return the path of `folder` below the root; empty for the root and folders elsewhere."""
        if folder == self.root or not folder.is_relative_to(self.root):
            return ""
        return folder.relative_to(self.root).as_posix()

    def _agreement(self, image: int, given: Sequence[str]) -> Agreement:
        """Count the last parts of the image's path that agree with `given`."""
        # macOS may write a path decomposed; `given` is composed.
        parts = normal(self.paths[image]).split("/")
        given = list(given)

        # Found by its name without a suffix: that is what agrees.
        if fold(parts[-1]) != fold(given[-1]):
            parts[-1] = parts[-1].rpartition(".")[0]
            if fold(given[-1]).endswith(PICTURES):
                given[-1] = given[-1].rpartition(".")[0]
            if parts[-1].isdecimal() and given[-1].isdecimal():
                given[-1] = str(int(parts[-1]))
                parts[-1] = given[-1]

        # Compare from the end: folders above may differ from machine to machine.
        alike = 0
        exact = 0
        same_case = True
        for mine, other in zip(reversed(parts), reversed(given), strict=False):
            if fold(mine) != fold(other):
                break
            same_case = same_case and mine == other
            alike += 1
            exact += same_case
        return Agreement(alike, exact)

    def has_name(self, text: str) -> bool:
        """Return True if an image has this name, with or without a suffix.

        A number without a suffix may be anything, and is no name.
        """
        base = fold(text)
        return base in self._by_name or (base in self._by_stem and not base.isdecimal())

    def split_of(self, image: int) -> str:
        """Return the split that the folders of an image say; empty if none does."""
        # The innermost folder decides: test/train/1.jpg is of train.
        pieces = self.paths[image].split("/")
        for depth in range(len(pieces) - 1, 0, -1):
            split = self._splits.get("/".join(pieces[:depth]))
            if split is not None:
                return split
        return self._split_in_name.get(image, "")

    def _rank(self, image: int, given: Sequence[str], near: tuple[str, ...]) -> Rank:
        """Rank an image that a table may mean.

        Args:
            image: The image.
            given: The parts of the path that the table says.
            near: The ends, folded, of paths of folders whose images are preferred.
        """
        alike, exact = self._agreement(image, given)
        path = self.paths[image]
        parts = path.split("/")
        # The folders above the part that agrees.
        above = ""
        if alike:
            above = "/".join(parts[:-alike])
        return Rank(
            alike,
            is_near=f"/{fold(above)}".endswith(near),
            is_no_mask=not any(map(MASKS.fullmatch, parts[:-1])),
            is_kept=path.lower().endswith(IMAGE_SUFFIXES),
            exact=exact,
        )


def _splits_in_names(paths: Sequence[str]) -> dict[int, str]:
    """Return the splits of images that are named for them: train_0001.jpg, test_0001.jpg.

    Returns:
        image -> split; empty unless all images are named so, for train and for another split.
    """
    found: dict[int, str] = {}
    for image, path in enumerate(paths):
        word = SPLIT_PREFIX.match(path.rpartition("/")[2])
        if word is None:
            return {}
        found[image] = SPLIT_OF[word[1].lower()]
    splits = set(found.values())
    if "train" in splits and len(splits) > 1:
        return found
    return {}


def fold(name: str) -> str:
    """Return the form in which names are compared.

    Tables from Windows write IMG_1.JPG as img_1.jpg.
    """
    return normal(name).casefold()
