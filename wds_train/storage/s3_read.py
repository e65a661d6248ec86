"""Reads of objects on S3: a body that breaks off is resumed where it broke."""

import time
from typing import Any

from wds_train.errors import Conflict, StoreError, Unavailable
from wds_train.storage.base import too_short
from wds_train.storage.ranges import Answer
from wds_train.storage.retry import SLOWEST
from wds_train.storage.s3_connection import GET, S3Connection, tag_in
from wds_train.storage.s3_errors import OutOfRange
from wds_train.storage.s3_session import SOCKET_SECONDS, GetAnswer

# Bytes that are taken from a stream at a time.
PIECE_BYTES = 1 << 18


class S3Reader:
    """Reads of objects below a prefix of a bucket.

    Its methods are those of `Store` with the same names.

    Args:
        connection: Makes the requests, and repeats them.
    """

    def __init__(self, connection: S3Connection) -> None:
        self._s3 = connection

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        body = _Body(start, length)
        self._receive(key, body)
        return b"".join(body.pieces)

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        if target:
            self._receive(key, _Body(start, len(target), target))

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        body = _Body(0, None)
        self._receive(key, body)
        return b"".join(body.pieces), tag_in(self._s3, {"ETag": body.tag})

    def _receive(self, key: str, body: "_Body") -> None:
        """Read all of `body`, in as many requests as it takes."""
        try:
            self._s3.repeat(GET, key, lambda: self._read_on(key, body), body)
        except OutOfRange as error:
            # There were bytes there when the reading began.
            if body.size:
                raise self._changed(key) from error
            raise too_short(f"{self._s3.url}/{key}", body.start, body.length) from error

    def _read_on(self, key: str, body: "_Body") -> None:
        """Append to `body` what is missing of it, by one request.

        What comes later must be of the same version of the object.

        Raises:
            Unavailable: The body broke off, or came too slowly. What came is kept.
            OutOfRange: The object ends before the range that was asked for.
            Conflict: It is another version than the one before.
        """
        name = f"{self._s3.url}/{key}"
        headers = body.headers()
        with self._s3.get(key, headers) as answer:
            # The head: the same version, and the bytes that were asked for.
            # Versions are not compared by If-Match: some servers do not know it for reads.
            if body.size and answer.tag != body.tag:
                raise self._changed(key)
            body.tag = answer.tag
            body.expected = body.size + answer.size
            if headers and not body.is_in_range(answer):
                raise StoreError(f"{name}: this S3 server ignores ranges; it cannot be used")
            if body.length is not None and body.expected < body.length:
                raise OutOfRange

            # The bytes: a connection that trickles would keep a loader waiting for ever.
            began = time.monotonic()
            while body.receive(answer.stream):
                if time.monotonic() - began > SOCKET_SECONDS + body.size / SLOWEST:
                    raise Unavailable(f"{name} comes at less than {SLOWEST} bytes per second")

        # An early end is no error to http.client and urllib3.
        if body.size < body.expected:
            raise Unavailable(f"{name} broke off after {body.size} of {body.expected} bytes")

    def _changed(self, key: str) -> Conflict:
        return Conflict(f"{self._s3.url}/{key} was changed by another writer while it was read")


class _Body:
    """The bytes [start, start + length) of an object, as far as they have come.

    Args:
        start: The first byte.
        length: The number of bytes; None for all from `start` on.
        target: Where they go; None collects them in `pieces`.

    Attributes:
        pieces: The bytes in order, if there is no target.
        size: The number of bytes that have come.
        expected: The number of bytes that will have come at the end.
        tag: The tag of the version that they are of.
    """

    def __init__(self, start: int, length: int | None, target: memoryview | None = None) -> None:
        self.start = start
        self.length = length
        self.pieces: list[bytes] = []
        self.size = 0
        self.expected = length or 0
        self.tag = ""
        self._target = target

    @property
    def next(self) -> int:
        """The place in the object of the first byte that is missing."""
        return self.start + self.size

    def headers(self) -> dict[str, str]:
        """Return the header that asks for the missing bytes; none if that is the whole object."""
        if not self.next and self.length is None:
            return {}
        last = ""
        if self.length is not None:
            last = str(self.start + self.length - 1)
        return {"Range": f"bytes={self.next}-{last}"}

    def is_in_range(self, answer: GetAnswer) -> bool:
        """Return True if `answer` begins with the missing bytes, and has no more of them."""
        if self.length is not None and self.size + answer.size > self.length:
            return False
        return answer.content_range.startswith(f"bytes {self.next}-")

    def receive(self, stream: Any) -> int:
        """Take what has come of `stream`, and wait only if nothing has.

        Returns:
            The number of bytes; 0 at the end of the stream.
        """
        if self._target is not None and isinstance(stream, Answer):
            # Without a copy: it is the way of the loader's blocks.
            count = stream.readinto1(self._target[self.size :])
        else:
            # Not by `read`, which returns only when all that was asked for is there, however
            # slowly it comes.
            piece = stream.read1(PIECE_BYTES)
            count = len(piece)
            if self._target is None:
                self.pieces.append(piece)
            else:
                self._target[self.size : self.size + count] = piece
        self.size += count
        return count
