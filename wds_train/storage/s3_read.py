"""Reads of objects on S3."""

import contextlib
import mmap
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

import numpy as np

from wds_train.errors import Conflict, StoreError, Unavailable
from wds_train.storage.base import check_key, too_short
from wds_train.storage.retry import SLOWEST
from wds_train.storage.s3_connection import S3Connection, tag_in
from wds_train.storage.s3_errors import OutOfRange
from wds_train.storage.s3_session import SOCKET_SECONDS

PIECE_BYTES = 1 << 18
GET = "get_object"


class S3Reader:
    """Reads of objects: a body that breaks off is resumed where it broke, a range goes to an address signed for many."""

    def __init__(self, connection: S3Connection) -> None:
        self._connection = connection
        # Shared with the processes that are forked from this one: loader workers read, their trainer tells.
        self._fallbacks = np.ndarray((1,), np.int64, mmap.mmap(-1, 8))

    @property
    def fallbacks(self) -> int:
        return int(self._fallbacks[0])

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        return b"" if length == 0 else b"".join(self._received(key, _Body(start, length)).pieces)

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        if target:
            self._received(key, _Body(start, len(target), target))

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        body = self._received(key, _Body(0, None))
        return b"".join(body.pieces), tag_in(self._connection, {"ETag": body.tag})

    def _received(self, key: str, body: "_Body") -> "_Body":
        retry = self._connection.retry()
        while True:
            had = body.size
            generation = self._connection.session.generation
            try:
                with self._connection.translated(key, GET):
                    self._read_on(key, body)
                return body
            except OutOfRange as error:
                if body.size:  # there were bytes there when the reading began
                    raise self._changed(key) from error
                raise too_short(f"{self._connection.url}/{key}", body.start, body.length) from error
            except Unavailable as error:
                # Bodies break off: go on from the byte that came last.
                progressed = body.size > had
                self._connection.pause(retry, error, generation, body.expected, progressed)

    def _read_on(self, key: str, body: "_Body") -> None:
        """Append to `body` what is missing of it. What comes later must be of the same version of the object."""
        first = body.start + body.size
        wanted = {}
        if first or body.length is not None:
            wanted["Range"] = f"bytes={first}-" + (
                "" if body.length is None else str(body.start + body.length - 1)
            )
        with self._get(key, wanted) as (tag, size, answered_range, stream):
            self._connection.note_granted(GET)
            # Not by If-Match: some servers do not know it for reads.
            if body.size and tag != body.tag:
                raise self._changed(key)
            body.tag, body.expected = tag, body.size + size
            too_much = body.length is not None and body.expected > body.length
            if "Range" in wanted and (too_much or not answered_range.startswith(f"bytes {first}-")):
                raise StoreError(
                    f"{self._connection.url}/{key}: this S3 server ignores ranges; it cannot be used"
                )
            if body.length is not None and body.expected < body.length:
                raise OutOfRange
            began = time.monotonic()
            while body.receive(stream):
                if time.monotonic() - began > SOCKET_SECONDS + body.size / SLOWEST:
                    raise Unavailable(
                        f"{self._connection.url}/{key} comes at less than {SLOWEST} bytes per second"
                    )
        if body.size < body.expected:  # an early end is no error to http.client and urllib3
            raise Unavailable(
                f"{self._connection.url}/{key} broke off after {body.size} of {body.expected} bytes"
            )

    def _changed(self, key: str) -> Conflict:
        return Conflict(
            f"{self._connection.url}/{key} was changed by another writer while it was read"
        )

    @contextlib.contextmanager
    def _get(self, key: str, wanted: dict[str, str]) -> Iterator[tuple[str, int, str, Any]]:
        """Tag, size in bytes, Content-Range and body of one GET.

        A range goes to a signed address (`Ranges`). Any other answer than the range is boto3's to get again and to judge:
        it names the error, follows a bucket to its region, and renews credentials. So is all that goes through a proxy.
        """
        connection = self._connection
        full_key = connection.full_key(check_key(key, connection.url))
        if "Range" in wanted and (ranges := connection.ranges):
            with ranges.get(full_key, wanted) as found:
                if found is not None:
                    head = found.headers
                    size = found.length or 0
                    yield head.get("ETag", ""), size, head.get("Content-Range", ""), found
                    return
            self._fallbacks[0] += 1
        answer = connection.client.get_object(Bucket=connection.bucket, Key=full_key, **wanted)  # type: ignore[arg-type]
        with contextlib.closing(answer["Body"]._raw_stream) as stream:  # type: ignore[attr-defined]
            yield (
                answer.get("ETag", ""),
                answer["ContentLength"],
                answer.get("ContentRange", ""),
                stream,
            )


class _Body:
    """What has come so far of an object's bytes [start, start + length), and the tag of the version that it is of: in
    `target`, or else in `pieces`.
    """

    def __init__(self, start: int, length: int | None, target: memoryview | None = None) -> None:
        self.start, self.length, self.target = start, length, target
        self.pieces: list[bytes] = []
        self.size = 0
        self.expected = length or 0
        self.tag = ""

    def receive(self, stream: Any) -> int:
        """Take what has come of `stream`, once there is anything: how many bytes that was, 0 at its end."""
        if self.target is not None and isinstance(stream, HTTPResponse):
            # It makes room for as many bytes as it is asked for, so it is not asked for all.
            count = stream.readinto1(self.target[self.size : self.size + PIECE_BYTES])
        else:
            # Both streams' `read1`; `read` returns only when all that was asked for is there, however slowly it comes.
            count = len(piece := stream.read1(PIECE_BYTES))
            if self.target is None:
                self.pieces.append(piece)
            else:
                self.target[self.size : self.size + count] = piece
        self.size += count
        return count
