"""The images that a person names: files, folders, objects and prefixes on S3, web addresses.

Each is read as a conversion would have put it into a shard, for instance with its transparent
pixels on white (`images/plain.py`).
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

# Files of a folder or a prefix that are taken for images. A file that is named by itself may have
# any name.
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".heic", ".heif")
# Bytes of a file. An image with the most pixels that are decoded has fewer.
MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class Photo:
    """An image that is read later.

    Attributes:
        name: Its name, for the answer.
        read: Returns its bytes; raises `WdsTrainError` if they cannot be read.
    """

    name: str
    read: Callable[[], bytes]


def find_photos(names: Iterable[str]) -> Iterator[Photo]:
    """Yield the images that a person names.

    The images of a folder or a prefix come in the order of their names, however deep they lie.

    Args:
        names: Files, folders, s3:// and http(s):// addresses.

    Raises:
        DataError: A folder or a prefix cannot be read, or holds no image.
    """
    for name in names:
        for photo in _find(name):
            yield Photo(photo.name, partial(_read_plain, photo))


def _read_plain(photo: Photo) -> bytes:
    return plain_bytes(photo.read())


def _find(name: str) -> Iterator[Photo]:
    """Yield the images behind one name, with their bytes as they are stored."""
    if name.lower().startswith(("http://", "https://")):
        yield Photo(name, partial(download, name))
    elif name.startswith("s3://"):
        yield from _find_on_s3(name)
    else:
        yield from _find_here(name)


def _find_here(name: str) -> Iterator[Photo]:
    # Path's own methods raise for a user who does not exist, and for a name that is too long or
    # that we may not look at. Such names are reported with the image.
    path = Path(os.path.expanduser(name))  # noqa: PTH111
    if not os.path.isdir(path):  # noqa: PTH112
        yield Photo(name, partial(_read_file, path))
        return
    found = []
    for folder, _, files in os.walk(path, onerror=_raise_unreadable):
        for file in files:
            if _is_image(file) and not file.startswith("."):
                found.append(Path(folder) / file)
    if not found:
        raise DataError(f"{name} holds no image ({', '.join(SUFFIXES)})")
    for image in sorted(found):
        yield Photo(str(image), partial(_read_file, image))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error


def _read_file(path: Path) -> bytes:
    try:
        if not path.exists():
            raise DataError("there is no such file")
        if not path.is_file():  # a pipe or a device could be read for ever
            raise DataError("it is no file")
        _check_size(path.stat().st_size)
        return bytes(read_file(path))
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror}") from error


def _find_on_s3(name: str) -> Iterator[Photo]:
    """Yield the object of this name if there is one, otherwise the images below the name."""
    bucket, _, key = name.removeprefix("s3://").rstrip("/").partition("/")
    store = open_store(f"s3://{bucket}")
    if key and not name.endswith("/") and _exists(store, key):
        yield Photo(name, partial(_read_object, store, key))
        return

    # With the slash: a prefix photos must not find photos-2/.
    prefix = f"{key}/" if key else ""
    keys = []
    for entry in store.list(prefix):
        if _is_image(entry.key):
            keys.append(entry.key)
    if not keys:
        raise DataError(f"there is no object {name}, nor an image ({', '.join(SUFFIXES)}) below it")
    for found in keys:
        yield Photo(f"s3://{bucket}/{found}", partial(_read_object, store, found))


def _exists(store: Store, key: str) -> bool:
    try:
        store.head(key)
    except NotFound:
        return False
    return True


def _read_object(store: Store, key: str) -> bytes:
    size, *_ = store.head(key)
    _check_size(size)
    return store.read(key)


def _check_size(size: int) -> None:
    """Raise `DataError` for a file of more than MOST_BYTES."""
    if size > MOST_BYTES:
        raise DataError(f"it has {size >> 20} MB, at most {MOST_BYTES >> 20} are read")
