"""Refuse lists and tables in tars of class folders, or in the folders of such tars.

They may say splits or labels, and are not read there.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    inside = [file for of_tar in files.values() for file in of_tar]
    known = _Known([file.name for file in inside if is_image(file.name)])
    for file in inside:
        text = b""
        if file.name.lower().endswith(TEXTS):
            text = read_bytes(file.tar, file.offset, min(file.size, READ))
        if _may_be_list(file.name) or known.are_listed(text):
            raise _refusal(root, file.name, "inside a tar")
    # Anything may lie in the folder of a single tar: a file that names none of its images is not
    # about it.
    for path in _beside(files):
        is_named = root.is_dir() and path.suffix.lower() != ".parquet" and _may_be_list(path.name)
        if is_named or known.are_listed(_beginning(path)):
            raise _refusal(root, path.name, "beside a tar of class folders")


def _beside(tars: Iterable[Path]) -> Iterator[Path]:
    """Yield the tables and texts that lie in the folders of the tars."""
    for folder in sorted({tar.parent for tar in tars}):
        for path in sorted(folder.iterdir()):
            is_list = path.name.lower().endswith(TABLES + TEXTS)
            if is_list and path.is_file() and not is_litter(path.name):
                yield path


def _beginning(path: Path) -> bytes:
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


class _Known:
    """The names of images, which lists may contain."""

    def __init__(self, images: Sequence[str]) -> None:
        self._names = {name.rpartition("/")[2] for name in images}
        self._stems = {Path(name).stem for name in images}
        self._stems |= {re.sub(r"^\./|\.\w+$", "", name) for name in images}

    def are_listed(self, text: bytes) -> bool:
        """Return whether a text names some of the images.

        A file name may stand anywhere, a stem only at the beginning of a line.
        """
        begins = 0
        for line in text.decode("utf-8", "replace").splitlines():
            parts = [part.strip(" \t\"'[]{}:") for part in re.split(r"[,;\t]|\s+(?=\S+$)|: ", line)]
            tokens = [*parts, *re.split(r"[\s\"',;:]+", line)]
            if any(token.rpartition("/")[2] in self._names for token in tokens):
                return True
            word = line.split(maxsplit=1)[0] if line.strip() else ""
            first = {parts[0], word, line.strip(" \t\"',")}
            begins += not self._stems.isdisjoint(first)
        return begins >= FEW


def _refusal(root: Path, name: str, where: str) -> DataError:
    return DataError(
        f"{root} holds images in folders, and a table that may label them or say their splits, "
        f"{name}, which is not read {where}; unpack the tar, and give the folder, "
        f"or move {name.rpartition('/')[2]} away"
    )
