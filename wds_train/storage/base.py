"""The store: objects at an S3 prefix or in a local directory, with the same few methods.

Keys are '/'-separated and relative to the store's URL. A write is atomic: readers see the old
object, the new one, or none. A tag names a version of an object, for `write(if_match=)`: on S3 it
is the ETag, locally the sha256.

A conditional write that finds its own bytes in place has succeeded: the server may have committed
a request whose answer was lost, and then refuses its repetition. Writers who could write equal
bytes and must not both win, such as claimants of a run, put something random into them.
"""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from wds_train.errors import StoreError

Body = bytes | bytearray | memoryview
# A larger body is uploaded in parts of exactly this size.
PART_BYTES = 16 << 20
# The parts of one body that are uploaded at a time.
UPLOAD_THREADS = 4


class Entry(NamedTuple):
    """An object or a folder of a listing.

    Attributes:
        key: Its key; a folder's ends in '/'.
        bytes: Its size; 0 of a folder.
        written: When it was written: seconds since the epoch, by the store's clock.
    """

    key: str
    bytes: int = 0
    written: float = 0.0


class Store(Protocol):
    """A place for objects. All methods raise `StoreError` or one of its children."""

    url: str

    @property
    def fallbacks(self) -> int:
        """The number of ranges whose signed address failed, and that took a second request."""

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Return `length` bytes of an object from `start` on; by default all of them.

        Raises:
            NotFound: There is no such object.
            StoreError: It has fewer bytes.
        """

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        """Fill `target`, a view of bytes, with the object's from `start` on.

        Raises as `read` does.
        """

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        """Return the whole object and its tag."""

    def write(
        self, key: str, body: Body, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        """Store an object, and return its tag.

        Args:
            key: Its key.
            body: Its bytes.
            if_absent: Write only if there is no such object.
            if_match: Write only if the object has this tag.

        Raises:
            Conflict: The condition does not hold, and the object does not hold `body` either.
        """

    def write_pieces(self, key: str, pieces: Iterator[Body]) -> str:
        """Store the bytes of `pieces` as one object, and return its tag.

        The next piece is requested while others are uploaded, `UPLOAD_THREADS` at most. Pieces may
        have any length. An error of the iterator passes through, and nothing is stored.

        Raises:
            NotFound: An answer was lost, and nobody knows whether the object was stored.
        """

    def upload(self, key: str, path: Path) -> None:
        """Store a file. The object appears whole or not at all."""

    def head(self, key: str) -> tuple[int, str]:
        """Return the object's size in bytes and its tag, without reading it."""

    def reconnect(self) -> None:
        """Close the connections: the next request opens a new one."""

    def list(self, prefix: str = "", *, flat: bool = False) -> Iterator[Entry]:
        """Return the objects under `prefix`, in the order of their keys.

        Args:
            prefix: The keys begin with it.
            flat: Return all that are below the next '/' as one folder.
        """

    def delete(self, key: str) -> None:
        """Remove the object. It is no error if there is none."""

    def abort_uploads(self, prefix: str) -> None:
        """Remove the unseen parts that killed writers of keys under `prefix` left."""


def too_short(name: str, start: int, length: int | None) -> StoreError:
    """Return the error for an object that has fewer bytes than were asked for.

    Args:
        name: The object's address.
        start: The first byte that was asked for.
        length: The number of bytes; None for all from `start` on.
    """
    span = f"from {start} on"
    if length is not None:
        span = f"{start} up to {start + length}"
    return StoreError(f"{name} is too short: bytes {span} were asked for")


def check_key(key: str, url: str) -> str:
    """Return `key`, which may come from a damaged or hostile manifest.

    Raises:
        StoreError: It leads out of the store.
    """
    if key.startswith("/") or ".." in key.split("/") or "\0" in key:
        raise StoreError(f"{key!r} is not a key inside {url}")
    return key


def read_file(path: Path) -> Body:
    """Return the bytes of a file. A large one is mapped, not read.

    Raises:
        StoreError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size <= PART_BYTES:
                return file.read()
            # A second copy of a large file could be more than the memory holds.
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
