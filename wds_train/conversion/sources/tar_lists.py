"""Lists and tables in tars of class folders, and beside them: they may say splits or labels, and are not read there."""

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
FEW = 2  # lines that begin with the stem of an image: fewer may be chance


def refuse_lists(root: Path, files: Mapping[Path, Sequence[TarFile]]) -> None:
    """Raise `DataError` where a file in the tars, or in their folder, may say labels or splits of the images in them.

    Args:
        root: The source: a tar, or the folder of tars.
        files: The files in each tar.
    """
    images = [file.name for of_tar in files.values() for file in of_tar if is_image(file.name)]
    known = _Known(images)
    for file in (file for of_tar in files.values() for file in of_tar):
        text = read_bytes(file.tar, file.offset, min(file.size, READ)) if file.name.lower().endswith(TEXTS) else b""
        if _is_table(file.name) or _says_splits(file.name) or known.are_listed(text):
            raise _refusal(root, file.name, "inside a tar")
    # Beside a single tar anything may lie: what does not name its images is not about it.
    for path in _beside(files):
        is_named = (
            root.is_dir() and path.suffix.lower() != ".parquet" and (_is_table(path.name) or _says_splits(path.name))
        )
        if is_named or known.are_listed(_beginning(path)):
            raise _refusal(root, path.name, "beside a tar of class folders")


def _beside(tars: Iterable[Path]) -> Iterator[Path]:
    """Yield the tables and texts that lie in the folders of the tars."""
    for folder in sorted({tar.parent for tar in tars}):
        for path in sorted(folder.iterdir()):
            if path.name.lower().endswith(TABLES + TEXTS) and path.is_file() and not is_litter(path.name):
                yield path


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(READ)


def _is_table(name: str) -> bool:
    return name.lower().endswith(TABLES) and not is_litter(name)


def _says_splits(name: str) -> bool:
    """Tell whether a text is called as lists of splits are: train.txt, splits.json."""
    base = name.rpartition("/")[2]
    if not base.lower().endswith(TEXTS) or is_litter(name):
        return False
    return bool(SPLIT_WORD.search(base)) or re.search(r"split|partition|fold", base, re.IGNORECASE) is not None


class _Known:
    """The names of images, to be found in lists."""

    def __init__(self, images: Sequence[str]) -> None:
        self._names = {name.rpartition("/")[2] for name in images}
        self._stems = {Path(name).stem for name in images}
        self._stems |= {re.sub(r"^\./|\.\w+$", "", name) for name in images}

    def are_listed(self, text: bytes) -> bool:
        """Tell whether a text names some of the images: by file name anywhere, or by stem where lines begin."""
        lines = text.decode("utf-8", "replace").splitlines()
        begins = 0
        for line in lines:
            parts = [part.strip(" \t\"'[]{}:") for part in re.split(r"[,;\t]|\s+(?=\S+$)|: ", line)]
            tokens = [*parts, *re.split(r"[\s\"',;:]+", line)]
            if any(token.rpartition("/")[2] in self._names for token in tokens):
                return True
            first = {parts[0], line.split(maxsplit=1)[0] if line.strip() else "", line.strip(" \t\"',")}
            begins += not self._stems.isdisjoint(first)
        return begins >= FEW


def _refusal(root: Path, name: str, where: str) -> DataError:
    return DataError(
        f"{root} holds images in folders, and a table that may label them or say their splits, {name}, which is not read "
        f"{where}; unpack the tar, and give the folder, or move {name.rpartition('/')[2]} away"
    )
