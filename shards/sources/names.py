"""What splits, images and the rest are called in people's folders and archives."""

import hashlib
import re
from collections.abc import Iterable

from wds_train.format.shard import KEY_LENGTH

# What a split is called, in the order of preference.
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "dev"), "test": ("test", "testing")}
_WORDS = "|".join(word for words in SPLITS.values() for word in words)
# In the name of a file: the word between separators.
SPLIT_WORD = re.compile(rf"(?:^|[-_./])({_WORDS})(?=[-_./0-9{{]|$)", re.IGNORECASE)
# A folder is a split when its name is such a word and no more than what people put around it: seg_train, Test Images.
SPLIT_FOLDER = re.compile(
    rf"(?:(?:seg|img|images?|data|dataset)[-_ .]?)?({_WORDS})[-_ .]?(?:set|data|img|images?|split|folder)?[-_ .]?\d*",
    re.IGNORECASE,
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".webp")
# Of images that shards do not hold: `ImagePolicy.reencode` takes them.
FOREIGN_SUFFIXES = (".bmp", ".gif", ".tif", ".tiff", ".avif")
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
# What operating systems leave in folders: nobody's sample, so it does not count as a bad one.
LITTER = re.compile(r"\..*|(eh)?Thumbs\.db|desktop\.ini|__MACOSX|@eaDir|\$RECYCLE\.BIN|lost\+found", re.IGNORECASE)


def split_word(name: str) -> str:
    """The last word in a path that names a split; `train` where none does."""
    words = SPLIT_WORD.findall(name)
    return words[-1].lower() if words else "train"


def choose_splits(words: Iterable[str]) -> dict[str, str]:
    """Which of the splits in a source become `train`, `val` and `test`; of two names for one, the first in `SPLITS`."""
    there = set(words)
    chosen = {split: next((name for name in names if name in there), None) for split, names in SPLITS.items()}
    return {word: split for split, word in chosen.items() if word is not None}


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
