"""The images that a person names: files, folders, what is below a prefix on S3, web addresses.

Each is read as a conversion would have put it into a shard: transparent pixels lie on white, and so on (`transforms/plain.py`).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wds_train.errors import DataError, NotFound
from wds_train.images.plain import plain_bytes
from wds_train.serving.download import download
from wds_train.storage.base import Store, read_file
from wds_train.storage.open import open_store

# Those of a folder or a prefix that are taken for images; a file that is named alone may be called anything.
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".heic", ".heif")
MOST_BYTES = 256 << 20  # of a file: an image of all the pixels that are decoded has less


@dataclass(frozen=True)
class Photo:
    """An image: what it is called, and how to get its bytes, which raises `WdsTrainError` when they are not to be had."""

    name: str
    read: Callable[[], bytes]


def photos(texts: Iterable[str]) -> Iterator[Photo]:
    """The images that `texts` name, those of a folder or a prefix in the order of their names, however deep they lie."""
    for text in texts:
        for photo in _named(text):
            yield Photo(photo.name, partial(_plain, photo))


def _plain(photo: Photo) -> bytes:
    return plain_bytes(photo.read())


def _named(text: str) -> Iterator[Photo]:
    """What one of the texts names, with the bytes as they lie there."""
    if text.lower().startswith(("http://", "https://")):
        yield Photo(text, partial(download, text))
    elif text.startswith("s3://"):
        yield from _on_s3(text)
    else:
        yield from _local(text)


def _local(text: str) -> Iterator[Photo]:
    path = Path(os.path.expanduser(text))  # noqa: PTH111 (Path's raises for a user who is not there)
    if not os.path.isdir(path):  # noqa: PTH112 (Path's raises for a name that is too long, or not ours to look at)
        yield Photo(text, partial(_file, path))
        return
    found = [
        Path(folder) / name
        for folder, _, names in os.walk(path, onerror=_refuse)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]
    if not found:
        raise DataError(f"{text} holds no image ({', '.join(SUFFIXES)})")
    yield from (Photo(str(each), partial(_file, each)) for each in sorted(found))


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error


def _file(path: Path) -> bytes:
    try:
        if not path.exists():
            raise DataError("there is no such file")
        if not path.is_file():
            raise DataError("it is no file")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise DataError(f"it has {size >> 20} MB, at most {MOST_BYTES >> 20} are read")
        return bytes(read_file(path))
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror}") from error


def _on_s3(text: str) -> Iterator[Photo]:
    """The object, if there is one of that name; else those below."""
    bucket, _, key = text.removeprefix("s3://").rstrip("/").partition("/")
    store = open_store(f"s3://{bucket}")
    if key and not text.endswith("/"):
        try:
            store.head(key)
        except NotFound:
            pass
        else:
            yield Photo(text, partial(_object, store, key))
            return
    below = [
        entry
        for entry in store.list(f"{key}/" if key else "")
        if entry.key.lower().endswith(SUFFIXES)
    ]
    if not below:
        raise DataError(f"there is no object {text}, nor an image ({', '.join(SUFFIXES)}) below it")
    yield from (
        Photo(f"s3://{bucket}/{entry.key}", partial(_object, store, entry.key)) for entry in below
    )


def _object(store: Store, key: str) -> bytes:
    if (size := store.head(key)[0]) > MOST_BYTES:
        raise DataError(f"it has {size >> 20} MB, at most {MOST_BYTES >> 20} are read")
    return store.read(key)
