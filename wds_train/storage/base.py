"""Where objects live: an S3 prefix or a local directory, behind the same few verbs, with compare-and-swap.

Keys are '/'-separated and relative to the store's URL. A write is atomic: readers see the old object, the new one, or
none. A tag names a version of an object (S3: the ETag; local: the sha256) for `write(if_match=)`.

A conditional write that finds its own bytes in place has succeeded: the server may have committed a request whose
answer was lost, and then refuses its repetition. Writers who could write equal bytes and must not both win, such as
claimants of a run, put something random into them.
"""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from wds_train.errors import StoreError

Body = bytes | bytearray | memoryview
PART_BYTES = 16 << 20  # a larger body goes up in parts of exactly this size, UPLOAD_THREADS of them at a time
UPLOAD_THREADS = 4


class Entry(NamedTuple):
    """An object; or a folder, whose key ends in '/'. `written` is when, in Unix time by the store's clock."""

    key: str
    bytes: int = 0
    written: float = 0.0


class Store(Protocol):
    url: str

    @property
    def fallbacks(self) -> int:
        """How many ranges took a second request, since the address that was signed for them was not answered with them."""

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """The object's bytes [start, start + length); `NotFound`, or `StoreError` when fewer exist.

        Without `length`, all from `start` on.
        """

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        """Fill `target` (bytes) with the object's from `start` on, as `read` would."""

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        """The whole object and its tag."""

    def write(self, key: str, body: Body, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Store `body` and return its tag; `Conflict` when the condition does not hold, nor the object hold `body`."""

    def write_pieces(self, key: str, pieces: Iterator[Body]) -> str:
        """Store `pieces` as one object and return its tag. The next is asked for while others are on their way, of which
        there are `UPLOAD_THREADS` at most. Pieces may be of any length. What asking for one raises passes through, and
        nothing is stored. `NotFound` when an answer was lost and it is unknown what became of it.
        """

    def upload(self, key: str, path: Path) -> None:
        """Store a file; the object appears whole or not at all."""

    def head(self, key: str) -> tuple[int, str]:
        """The object's size in bytes and its tag, without its content."""

    def reconnect(self) -> None:
        """Forget what connections there are: the next request goes over a new one."""

    def list(self, prefix: str = "", *, flat: bool = False) -> Iterator[Entry]:
        """The objects under `prefix`, in key order; `flat`: those below the next '/' as one folder."""

    def delete(self, key: str) -> None:
        """Remove the object; no error if there is none."""

    def abort_uploads(self, prefix: str) -> None:
        """Drop what writers of keys under `prefix` that were killed in the middle of an upload left, unseen but stored."""


def too_short(name: str, start: int, length: int | None) -> StoreError:
    span = f"from {start} on" if length is None else f"{start} up to {start + length}"
    return StoreError(f"{name} is too short: bytes {span} were asked for")


def inside(key: str, url: str) -> str:
    """`key`, which may come from a damaged or hostile manifest, and must not lead out of the store."""
    if key.startswith("/") or ".." in key.split("/") or "\0" in key:
        raise StoreError(f"{key!r} is not a key inside {url}")
    return key


def contents(path: Path) -> Body:
    """The bytes of a file; a large one is mapped, not read."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size <= PART_BYTES:
                return file.read()
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
