"""Reads of objects on S3."""

import contextlib
import mmap
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from botocore.awsrequest import AWSRequest

from wds_train.errors import StoreError, Unavailable
from wds_train.storage.base import inside, too_short
from wds_train.storage.retry import SLOWEST
from wds_train.storage.s3_connection import SOCKET_SECONDS, OutOfRange, S3Connection

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
PIECE_BYTES = 1 << 18
SIGNED_SECONDS = 3600  # an address for reads is good for


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
        return b"".join(body.pieces), body.tag

    def _received(self, key: str, body: "_Body") -> "_Body":
        retry = self._connection.retry()
        while True:
            had = body.size
            try:
                with self._connection.translated(key):
                    self._read_on(key, body)
                return body
            except OutOfRange as error:
                raise too_short(f"{self._connection.url}/{key}", body.start, body.length) from error
            except Unavailable as error:
                # Bodies break off: go on from the byte that came last.
                retry.pause(error, body.expected, progressed=body.size > had)

    def _read_on(self, key: str, body: "_Body") -> None:
        """Append to `body` what is missing of it. What comes later must be of the same version of the object."""
        first = body.start + body.size
        wanted = {"IfMatch": body.tag} if body.tag else {}
        if first or body.length is not None:
            wanted["Range"] = f"bytes={first}-" + ("" if body.length is None else str(body.start + body.length - 1))
        tag, size, answered_range, answer = self._get(key, wanted)
        self._connection.answered = True
        body.tag, body.expected = tag, body.size + size
        too_much = body.length is not None and body.expected > body.length
        if "Range" in wanted and (too_much or not answered_range.startswith(f"bytes {first}-")):
            raise StoreError(f"{self._connection.url}/{key}: this S3 server ignores ranges; it cannot be used")
        if body.length is not None and body.expected < body.length:
            raise OutOfRange
        began = time.monotonic()
        with contextlib.closing(answer) as stream:
            # urllib3's `read1`; `read` returns only when all that was asked for is there, however slowly it comes.
            while piece := stream.read1(PIECE_BYTES):
                body.take(piece)
                if time.monotonic() - began > SOCKET_SECONDS + body.size / SLOWEST:
                    raise Unavailable(f"{self._connection.url}/{key} comes at less than {SLOWEST} bytes per second")
        if body.size < body.expected:  # an early end is no error to urllib3
            raise Unavailable(f"{self._connection.url}/{key} broke off after {body.size} of {body.expected} bytes")

    def _get(self, key: str, wanted: dict[str, str]) -> tuple[str, int, str, Any]:
        """Tag, size in bytes, Content-Range and body (a urllib3 response) of one GET.

        A range goes to an address signed once for many reads, through botocore's own HTTP session: boto3 takes twice
        the CPU for a range of 1 MB, most of it to sign and to parse. Any other answer than the range is boto3's to get
        again and to judge: it names the error, follows a bucket to its region, and renews credentials.
        """
        connection = self._connection
        where = {"Bucket": connection.bucket, "Key": connection.full_key(inside(key, connection.url))}
        client = connection.client
        if "Range" in wanted:
            headers = {"If-Match" if name == "IfMatch" else name: value for name, value in wanted.items()}
            found = connection.http.send(
                AWSRequest("GET", self._signed_url(client, where), headers, stream_output=True).prepare()
            )
            if found.status_code == 206:
                size = int(found.headers["Content-Length"])
                return found.headers["ETag"], size, found.headers["Content-Range"], found.raw
            found.raw.close()
            self._fallbacks[0] += 1
            connection.signed.pop(where["Key"], None)
        answer = client.get_object(**where, **wanted)  # type: ignore[arg-type]
        return answer["ETag"], answer["ContentLength"], answer.get("ContentRange", ""), answer["Body"]._raw_stream  # type: ignore[attr-defined]

    def _signed_url(self, client: "S3Client", where: dict[str, str]) -> str:
        url, since = self._connection.signed.get(where["Key"], ("", 0.0))
        if not url or time.monotonic() - since > SIGNED_SECONDS / 2:
            url = client.generate_presigned_url("get_object", Params=where, ExpiresIn=SIGNED_SECONDS)
            self._connection.signed[where["Key"]] = url, time.monotonic()
        return url


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

    def take(self, piece: bytes) -> None:
        if self.target is None:
            self.pieces.append(piece)
        else:
            self.target[self.size : self.size + len(piece)] = piece
        self.size += len(piece)
