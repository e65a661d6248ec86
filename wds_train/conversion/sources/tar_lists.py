"""Refuse lists and tables in tars of class folders, or in the folders of such tars.

They may say splits or labels, and are not read there.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from wds_train.conversion.sources.litter import is_litter
from wds_train.conversion.sources.names import SPLIT_WORD
from wds_train.conversion.sources.scan import read_bytes
from wds_train.conversion.sources.tar_samples import is_image
from wds_train.conversion.sources.tree import TarFile
from wds_train.errors import DataError

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".lst", ".list", ".xlsx", ".xls")
TEXTS = (".txt", ".json", ".yaml", ".yml")  # which may as well be a licence, or a page
READ = 1 << 20  # bytes of a text, in which a list names images
FEW = 2  # fewer lines that begin with the stem of an image may be chance


def refuse_lists(root: Path, files: Mapping[Path, Sequence[TarFile]]) -> None:
    """Raise `DataError` if a file in the tars, or in their folder, may say labels or splits.

    Args:
        root: The source: a tar, or the folder of tars.
        files: The files in each tar.
    """
    inside = list(chain.from_iterable(files.values()))
    known = _ImageNames(inside)
    for file in inside:
        text = b""
        if file.name.lower().endswith(TEXTS):
            text = read_bytes(file.tar, file.offset, min(file.size, READ))
        if _may_be_list(file.name) or known.are_listed(text):
            raise _refusal(root, file.name, "inside a tar")
    # Anything may lie in the folder of a single tar: a file that names none of its images has
    # nothing to do with it.
    for path in _beside(files):
        is_named = root.is_dir() and path.suffix.lower() != ".parquet" and _may_be_list(path.name)
        if is_named or known.are_listed(_beginning(path)):
            raise _refusal(root, path.name, "beside a tar of class folders")


def _beside(tars: Iterable[Path]) -> Iterator[Path]:
    """Yield the tables and texts that lie in the folders of the tars."""
    folders = {tar.parent for tar in tars}
    for folder in sorted(folders):
        for path in sorted(folder.iterdir()):
            is_list = path.name.lower().endswith(TABLES + TEXTS)
            if is_list and path.is_file() and not is_litter(path.name):
                yield path


def _beginning(path: Path) -> bytes:
    """Return the first `READ` bytes of a file."""
    with path.open("rb") as file:
        return file.read(READ)


def _may_be_list(name: str) -> bool:
    """Return whether the name alone says that a file may hold labels or splits."""
    return _is_table(name) or _says_splits(name)


def _is_table(name: str) -> bool:
    return name.lower().endswith(TABLES) and not is_litter(name)


def _says_splits(name: str) -> bool:
    """Return whether a text has the name of a list of splits: train.txt, splits.json."""
    base = name.rpartition("/")[2]
    if not base.lower().endswith(TEXTS) or is_litter(name):
        return False
    if SPLIT_WORD.search(base):
        return True
    return re.search(r"split|partition|fold", base, re.IGNORECASE) is not None


class _ImageNames:
    """The names of images, which lists may contain.

    Args:
        files: The files of the tars; those that are no images are passed over.
    """

    def __init__(self, files: Iterable[TarFile]) -> None:
        self._names = set()
        self._stems = set()
        for file in files:
            if is_image(file.name):
                self._names.add(file.name.rpartition("/")[2])
                self._stems.add(Path(file.name).stem)
                self._stems.add(re.sub(r"^\./|\.\w+$", "", file.name))

    def are_listed(self, text: bytes) -> bool:
        """Return whether a text names some of the images.

        A file name may stand anywhere, a stem only at the beginning of a line.
        """
        begins = 0
        for line in text.decode("utf-8", "replace").splitlines():
            # Cells of CSV, JSON and YAML; and words, for names without blanks.
            parts = [part.strip(" \t\"'[]{}:") for part in re.split(r"[,;\t]|\s+(?=\S+$)|: ", line)]
            for token in [*parts, *re.split(r"[\s\"',;:]+", line)]:
                if token.rpartition("/")[2] in self._names:
                    return True
            # A stem has blanks perhaps: it is the first cell, the first word, or the line.
            begin = {parts[0], line.strip(" \t\"',"), *line.split(maxsplit=1)[:1]}
            begins += not self._stems.isdisjoint(begin)
        return begins >= FEW


def _refusal(root: Path, name: str, where: str) -> DataError:
    """Return the error for a list.

    Args:
        root: The source.
        name: The list.
        where: Where it lies, as a part of a sentence.
    """
    return DataError(
        f"{root} holds images in folders, and a table that may label them or say their splits, "
        f"{name}, which is not read {where}; unpack the tar, and give the folder, "
        f"or move {name.rpartition('/')[2]} away"
    )
