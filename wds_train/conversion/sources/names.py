"""Names of splits and of image files, as people and programs write them, and the keys of samples.

Every reader of a source asks here what a name means: `seg_train` is a folder of the split train,
`validation-00003.tar` a file of the split val, `photo.jpeg` an image.
"""

import hashlib
import re
import shlex
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from wds_train.dataset.shard import KEY_LENGTH
from wds_train.errors import UsageError

# The names of each split, in the order of preference.
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
NO_SPLIT = "none"  # the value of --split WORD=none: leave these samples out

# The split of each name above; `NO_SPLIT` for those of images without labels.
SPLIT_OF: dict[str, str] = {}
for _split, _names in SPLITS.items():
    SPLIT_OF |= dict.fromkeys(_names, _split)
SPLIT_OF |= dict.fromkeys(UNLABELED, NO_SPLIT)

# The longest first: else `train` would be found in `training`.
_WORDS = "|".join(sorted(SPLIT_OF, key=len, reverse=True))
# The words in a name: FER2013Train has FER, 2013 and Train.
WORDS_IN_NAMES = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# Names of sets that are neither trained nor validated on, as they lie next to a split's folder.
OTHER_SPLITS = ("gallery", "query", "probe", "support", "distractors")
# In the name of a file: the word between separators.
SPLIT_WORD = re.compile(rf"(?:^|[-_./ ])({_WORDS})(?=[-_./0-9{{ ]|$)", re.IGNORECASE)
# A folder is a split when its name is such a word and no more than what people put around it:
# seg_train, Test Images.
SPLIT_FOLDER = re.compile(
    rf"(?:(?:seg|img|images?|data|dataset)[-_ .]?)?({_WORDS})"
    r"[-_ .]?(?:set|data|img|images?|split|folder)?[-_ .]?\d*",
    re.IGNORECASE,
)
# `train` in train-00000-of-00008.parquet: the part before such numbers is the name of a split.
PART_OF = re.compile(r"(?:.*/)?([^/]+?)[-_.]\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.\w+")

# Images that shards hold as they are.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".webp")
# Images that shards do not hold: `ImagePolicy.reencode` takes them.
FOREIGN_SUFFIXES = (".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")
# Pictures that nothing here reads. A folder of them is a class all the same: it must not vanish
# without a word, since its images only need to be converted first.
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
# Files that accompany images and are no samples. They are counted, and noted once a suffix.
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
    """The splits that a person gave with --split: word in small letters -> split.

    It keeps which of the words occurred in the source, so that a misspelt one can be refused.

    Args:
        said: The words and their splits.
    """

    def __init__(self, said: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(said)
        self.met: set[str] = set()

    def get(self, word: str, default: Any = None) -> Any:
        """Return the split that the person gave for `word`, and keep that it occurred."""
        if word in self:
            self.met.add(word)
        return super().get(word, default)

    @property
    def unmet(self) -> list[str]:
        """The words that name nothing in the source, sorted."""
        return sorted(self.keys() - self.met)


class Framed(NamedTuple):
    """A name with a split's word in it.

    Attributes:
        split: The split: train for `bounding_box_train`.
        frame: The rest of the name: `bounding_box_*`.
    """

    split: str
    frame: str


def framed_split(name: str) -> Framed | None:
    """Find the word of a split in a name of several words.

    The name says a split only if another one of the same frame says another split: leaf_train and
    leaf_test, FER2013Train and FER2013Test, trainset.csv and testset.csv. A class alone may be
    called test_tube. The caller has to compare the frames.

    Args:
        name: The name of a folder, or of a file without its suffix.

    Returns:
        The split of the last such word, and the frame; None if there is no such word.
    """
    for found in reversed(list(WORDS_IN_NAMES.finditer(name))):
        # trainset and testlabels: the endings belong to the frame.
        word = found[0].lower()
        base = re.sub(r"(?<=.)(set|data|list|labels?|images?|imgs?)$", "", word)
        ending = word[len(base) :]
        if word in SPLIT_OF:
            ending = ""

        split = SPLIT_OF.get(word) or SPLIT_OF.get(base)
        if split is not None:
            frame = f"{name[: found.start()]}*{ending}{name[found.end() :]}".lower()
            return Framed(split, re.sub(r"\d+", "#", frame))  # 01_train, 02_test
    return None


def normal(text: str) -> str:
    """Return `text` in Unicode's composed form (NFC).

    macOS writes `é` as two characters and tables as one: without this, the names would differ.
    """
    return unicodedata.normalize("NFC", text)


def in_order(splits: Collection[str]) -> list[str]:
    """Return those of `SPLITS` that are in `splits`, train first."""
    return [split for split in SPLITS if split in splits]


def in_any_case(name: str, names: Iterable[str]) -> str | None:
    """Return the first of `names` that is `name` in any case; None if there is none."""
    for each in names:
        if each.casefold() == name.casefold():
            return each
    return None


def choose_splits(words: Iterable[str]) -> dict[str, str]:
    """Choose which of the splits in a source become `train`, `val` and `test`.

    Args:
        words: Split names as a source has them, in small letters.

    Returns:
        The word -> split of those that are used. Of two names for one split, the first in `SPLITS`
        is used.
    """
    there = set(words)
    chosen = {}
    for split, names in SPLITS.items():
        for name in names:
            if name in there:
                chosen[name] = split
                break
    return chosen


def assign_splits(words: Iterable[str], said: Mapping[str, str], where: str) -> dict[str, str]:
    """Decide for every split name of a source which split it becomes.

    Args:
        words: The names, as the source writes them.
        said: The splits that a person gave with --split WORD=SPLIT; keys in small letters.
        where: The source, for messages.

    Returns:
        word -> `train`, `val`, `test`, or `none` for samples that are left out.

    Raises:
        UsageError: A name is not known, or two names mean one split.
    """
    splits: dict[str, str] = {}
    for word in dict.fromkeys(words):
        split = said.get(word.lower()) or SPLIT_OF.get(word.lower().strip())
        if split is None:
            raise unknown_split(word, where)
        splits[word] = split
    for split in SPLITS:
        _refuse_two_names(split, splits, said, where)
    return splits


def _refuse_two_names(
    split: str, splits: Mapping[str, str], said: Mapping[str, str], where: str
) -> None:
    """Raise `UsageError` if two words mean `split` that differ in more than their case.

    Words that a person gave are meant so.
    """
    alike = []
    spellings = set()
    for word, found in splits.items():
        if found == split and word.lower() not in said:
            alike.append(word)
            spellings.add(word.lower())
    if len(spellings) > 1:
        raise UsageError(
            f"{where} has {' and '.join(map(repr, alike))}, which are all names of the split "
            f"{split}; say which one is used, and leave the others out: --split {alike[-1]}=none"
        )


def file_splits(
    paths: Sequence[str], said: Mapping[str, str], where: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Decide for every data file of a source which split it belongs to.

    Data files are tars, Parquet and arrow files.

    Args:
        paths: The files' paths below the source.
        said: The splits that a person gave with --split WORD=SPLIT; keys in small letters.
        where: The source, for messages.

    Returns:
        path -> `train`, `val` or `test` of those that are used; path -> why, of the others.

    Raises:
        UsageError: Some files are named for splits, and others for something that is not known; or
            there is nothing to train on.
    """
    # Find the word of a split in each path.
    words: dict[str, str | None] = {}
    known: set[str] = set()
    known_splits: set[str] = set()
    unknown: set[str] = set()
    for path in paths:
        word = _split_in(path, said)
        words[path] = word
        if word is None:
            unknown.add(_stem(path))
        else:
            known.add(word)
            # Asked even if every word is known: `said` keeps which words occur.
            known_splits.add(said.get(word) or SPLIT_OF[word])
    if unknown:
        _refuse_unknown(sorted(unknown), known_splits, paths, where)

    # Files of one unknown name are the training data where nothing else is.
    chosen = choose_splits(known)
    for word in known:
        if word in said:
            chosen[word] = said[word]
    used: dict[str, str] = {}
    unused: dict[str, str] = {}
    for path, word in words.items():
        split = "train"
        if word is not None:
            split = chosen.get(word, NO_SPLIT)
        if split == NO_SPLIT:
            unused[path] = f"the split {word!r} is not used"
        else:
            used[path] = split
    if not used:
        raise UsageError(
            f"{where} holds {', '.join(sorted(known))} alone, and nothing to train on; "
            "say which is: --split WORD=train"
        )
    return used, unused


def _refuse_unknown(
    unknown: Sequence[str], known_splits: Collection[str], paths: Iterable[str], where: str
) -> None:
    """Raise `UsageError` if files of `unknown` names cannot be the training data."""
    if "train" in known_splits:
        raise unknown_split(unknown[0], where)
    if len(unknown) > 1 and (known_splits or all(map(PART_OF.fullmatch, paths))):
        raise unknown_split(unknown[0], where)


def _split_in(path: str, said: Mapping[str, str]) -> str | None:
    """Return the word in a file's path that names its split; None without one."""
    # The words that a person gave come first.
    pieces = re.split(r"[-_./ ]", path.lower())
    for word in said:
        if word in pieces or word == _stem(path).lower():
            return word

    words = SPLIT_WORD.findall(path)
    if not words:
        return None
    return words[-1].lower()


def _stem(path: str) -> str:
    """Return the name of a file without its number: `extra` of extra-000012.tar."""
    part = PART_OF.fullmatch(path)
    name = part[1] if part else path.rpartition("/")[2].split(".")[0]
    stem = re.sub(r"[-_]?\d+$", "", name)
    folder = path.rpartition("/")[0].rpartition("/")[2]
    if stem in ("", "data") and folder:
        return folder  # query/data-00000-of-00001.arrow, default/0000.parquet
    return stem or name


def unknown_split(word: str, where: str) -> UsageError:
    """Return the error for a split whose name is not known.

    Args:
        word: The name.
        where: The source, for the message.
    """
    return UsageError(
        f"{where} has the split {word!r}, and it is not known what that is for; "
        f"say it: --split {shlex.quote(f'{word}=train')}, =val, =test, or =none to leave it out"
    )


def key_of(*parts: str) -> str:
    """Return the key of a sample.

    A character that a key cannot hold becomes '_'. A key that was changed so, or cut, ends in a
    digest of the original, so that different names stay different.

    Args:
        parts: The key's parts, such as a class and a file's stem.

    Returns:
        The key, at most `KEY_LENGTH` characters.
    """
    given = "/".join(parts)
    clean = "/".join(re.sub(r"[^A-Za-z0-9_-]", "_", part) or "_" for part in given.split("/"))
    if clean == given and len(clean) <= KEY_LENGTH:
        return clean
    # A name that is no UTF-8 reaches here with surrogates, which cannot be encoded otherwise.
    digest = hashlib.blake2b(given.encode(errors="surrogateescape"), digest_size=5).hexdigest()
    return f"{clean[: KEY_LENGTH - len(digest) - 1].rstrip('/')}-{digest}"
