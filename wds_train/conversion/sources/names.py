"""What splits, images and the files beside them are called in people's folders and archives."""

import hashlib
import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from wds_train.dataset.shard import KEY_LENGTH
from wds_train.errors import UsageError

# What a split is called, in the order of preference.
SPLITS = {
    "train": ("train", "training", "trn", "trainval"),
    "val": (
        "val",
        "validation",
        "valid",
        "dev",
        "devel",
        "development",
        "eval",
        "evaluation",
        "holdout",
        "hold_out",
        "hold-out",
        "held_out",
        "held-out",
        "publictest",  # FER2013 and Kaggle: the public leaderboard is what people validate on
    ),
    "test": ("test", "testing", "tst", "privatetest"),
}
# Images without labels, as STL-10 and semi-supervised sets have them. They are never trained on.
UNLABELED = ("unlabeled", "unlabelled", "unsup", "unsupervised", "unannotated")
NO_SPLIT = "none"  # what --split WORD=none says: leave these out
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
SPLIT_OF |= dict.fromkeys(UNLABELED, NO_SPLIT)
_WORDS = "|".join(sorted(SPLIT_OF, key=len, reverse=True))
# The words in a name: FER2013Train has FER, 2013 and Train.
WORDS_IN_NAMES = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# What people call sets of images that are neither trained nor validated on, beside a split's folder.
OTHER_SPLITS = ("gallery", "query", "probe", "support", "distractors")
# In the name of a file: the word between separators.
SPLIT_WORD = re.compile(rf"(?:^|[-_./ ])({_WORDS})(?=[-_./0-9{{ ]|$)", re.IGNORECASE)
# A folder is a split when its name is such a word and no more than what people put around it: seg_train, Test Images.
SPLIT_FOLDER = re.compile(
    rf"(?:(?:seg|img|images?|data|dataset)[-_ .]?)?({_WORDS})[-_ .]?(?:set|data|img|images?|split|folder)?[-_ .]?\d*",
    re.IGNORECASE,
)
# `train` in train-00000-of-00008.parquet: whatever stands before such numbers is the name of a split.
PART_OF = re.compile(r"(?:.*/)?([^/]+?)[-_.]\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.\w+")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".webp")
# Of images that shards do not hold: `ImagePolicy.reencode` takes them.
FOREIGN_SUFFIXES = (".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")
# Of pictures that nothing here reads: a folder of them is a class all the same, whose images must be converted.
UNREAD_SUFFIXES = (
    ".svg",
    ".psd",
    ".raw",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
    ".jp2",
    ".jxl",
    ".dcm",
    ".pgm",
    ".ppm",
    ".npy",
)
# What stands beside images in people's folders, and is no sample: counted, one note a kind.
SIDECARS = (
    ".txt",
    ".xml",
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".md",
    ".yaml",
    ".yml",
    ".html",
    ".pdf",
    ".log",
    ".ini",
    ".db",
)


class SaidSplits(dict[str, str]):
    """What a person said of splits: word in small letters -> split. It keeps which words occurred in the source."""

    def __init__(self, said: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(said)
        self.met: set[str] = set()

    def get(self, word: str, default: Any = None) -> Any:
        """Return the split that was said of `word`."""
        if word in self:
            self.met.add(word)
        return super().get(word, default)

    @property
    def unmet(self) -> list[str]:
        """The words that nothing in the source is called."""
        return sorted(self.keys() - self.met)


class Framed(NamedTuple):
    """A name with a split's word in it: `bounding_box_train` is `train` in the frame `bounding_box_*`."""

    split: str
    frame: str


def framed_split(name: str) -> Framed | None:
    """Find the word of a split in a name of several words.

    Such a name says a split where another one of the same frame says another split: leaf_train beside leaf_test, FER2013Train
    beside FER2013Test, trainset.csv beside testset.csv. A class may be called test_tube.
    """
    for found in reversed(list(WORDS_IN_NAMES.finditer(name))):
        word = found[0].lower()
        base = re.sub(r"(?<=.)(set|data|list|labels?|images?|imgs?)$", "", word)
        split = SPLIT_OF.get(word) or SPLIT_OF.get(base)
        if split is not None:
            rest = word[len(base) :] if word not in SPLIT_OF else ""
            frame = f"{name[: found.start()]}*{rest}{name[found.end() :]}".lower()
            return Framed(split, re.sub(r"\d+", "#", frame))  # 01_train, 02_test
    return None


def normal(text: str) -> str:
    """Return `text` in Unicode's composed form (NFC): macOS writes `é` as two characters, tables as one."""
    return unicodedata.normalize("NFC", text)


def split_word(name: str) -> str:
    """Return the last word in a path that names a split; `train` where none does."""
    words = SPLIT_WORD.findall(name)
    return words[-1].lower() if words else "train"


def choose_splits(words: Iterable[str]) -> dict[str, str]:
    """Choose which of the splits in a source become `train`, `val` and `test`.

    Args:
        words: Split names as a source has them, in small letters.

    Returns:
        The word -> split of those that are used. Of two names for one split the first in `SPLITS` is.
    """
    there = set(words)
    chosen = {
        split: next((name for name in names if name in there), None)
        for split, names in SPLITS.items()
    }
    return {word: split for split, word in chosen.items() if word is not None}


def assign_splits(words: Iterable[str], said: Mapping[str, str], where: str) -> dict[str, str]:
    """Decide for every split name of a source what it becomes.

    Args:
        words: The names, as the source writes them.
        said: What a person said of them with --split WORD=SPLIT; keys in small letters.
        where: The source, for messages.

    Returns:
        word -> `train`, `val`, `test`, or `none` for samples that are left out.

    Raises:
        UsageError: A name is not known, or two names mean one split.
    """
    names = dict.fromkeys(words)
    splits: dict[str, str] = {}
    for word in names:
        split = said.get(word.lower()) or SPLIT_OF.get(word.lower().strip())
        if split is None:
            raise unknown_split(word, where)
        splits[word] = split
    for split in SPLITS:
        alike = [
            word for word, found in splits.items() if found == split and word.lower() not in said
        ]
        if len({word.lower() for word in alike}) > 1:
            raise UsageError(
                f"{where} has {' and '.join(map(repr, alike))}, which are all names of the split {split}; say which one "
                f"is used, and leave the others out: --split {alike[-1]}=none"
            )
    return splits


def file_splits(
    paths: Sequence[str], said: Mapping[str, str], where: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Decide for every data file of a source what split it belongs to: tars, Parquet and arrow files.

    Args:
        paths: The files' paths below the source.
        said: What a person said of splits with --split WORD=SPLIT; keys in small letters.
        where: The source, for messages.

    Returns:
        path -> `train`, `val` or `test` of those that are used; path -> why, of the others.

    Raises:
        UsageError: Some files are named for splits, and others for something that is not known.
    """
    words = {path: _split_in(path, said) for path in paths}
    unknown = sorted({_stem(path) for path, word in words.items() if word is None})
    known = {word for word in words.values() if word is not None}
    splits_known = {said.get(word) or SPLIT_OF[word] for word in known}
    # Files of one unknown name are the training data where nothing else is.
    if unknown and ("train" in splits_known or (known and len(unknown) > 1)):
        raise unknown_split(unknown[0], where)
    if not known and len(unknown) > 1 and all(PART_OF.fullmatch(path) for path in paths):
        raise unknown_split(unknown[0], where)
    chosen = choose_splits(known) | {word: said[word] for word in known if word in said}
    used: dict[str, str] = {}
    unused: dict[str, str] = {}
    for path, word in words.items():
        split = "train" if word is None else chosen.get(word, NO_SPLIT)
        if split == NO_SPLIT:
            unused[path] = f"the split {word!r} is not used"
        else:
            used[path] = split
    if not used:
        raise UsageError(
            f"{where} holds {', '.join(sorted(known))} alone, and nothing to train on; say which is: --split WORD=train"
        )
    return used, unused


def _split_in(path: str, said: Mapping[str, str]) -> str | None:
    """Return the word in a file's path that names its split, None where none does."""
    pieces = re.split(r"[-_./ ]", path.lower())
    for word in said:
        if word in pieces or word == _stem(path).lower():
            return word
    words = SPLIT_WORD.findall(path)
    return words[-1].lower() if words else None


def _stem(path: str) -> str:
    """Return what a file is called without its number: `extra` of extra-000012.tar."""
    part = PART_OF.fullmatch(path)
    name = part[1] if part else path.rpartition("/")[2].split(".")[0]
    stem = re.sub(r"[-_]?\d+$", "", name)
    folder = path.rpartition("/")[0].rpartition("/")[2]
    if stem in ("", "data") and folder:
        return folder  # query/data-00000-of-00001.arrow, default/0000.parquet
    return stem or name


def unknown_split(word: str, where: str) -> UsageError:
    """Return the refusal of a split whose name is not known."""
    return UsageError(
        f"{where} has the split {word!r}, and it is not known what that is for; say it: --split {shlex.quote(f'{word}=train')}, =val, =test, "
        "or =none to leave it out"
    )


def key_of(*parts: str) -> str:
    """A sample's key from a class id and a file's stem, say. What a key cannot hold becomes '_'; a key so changed, or
    cut, ends in a digest of what it was, so that different names stay different.
    """
    given = "/".join(parts)
    clean = "/".join(re.sub(r"[^A-Za-z0-9_-]", "_", part) or "_" for part in given.split("/"))
    if clean == given and len(clean) <= KEY_LENGTH:
        return clean
    digest = hashlib.blake2b(given.encode(errors="surrogateescape"), digest_size=5).hexdigest()
    return f"{clean[: KEY_LENGTH - len(digest) - 1].rstrip('/')}-{digest}"
