"""Writes of objects to S3: large ones in parts, several of them at a time; each with a checksum."""

import base64
import contextlib
import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from isal.isal_zlib import crc32

from wds_train.errors import Conflict, NotFound, StoreError
from wds_train.storage.base import PART_BYTES, UPLOAD_THREADS, Body
from wds_train.storage.s3_connection import S3Connection, tag_in
from wds_train.storage.s3_read import S3Reader

# Of one object, if the server forgets a multipart upload before its end.
UPLOADS = 3


class S3Writer:
    """Writes of objects below a prefix of a bucket.

    Its methods are those of `Store` with the same names.

    Args:
        connection: Makes the requests, and repeats them.
        reader: Reads what is stored, when the answer to a write was lost.
    """

    def __init__(self, connection: S3Connection, reader: S3Reader) -> None:
        self._s3 = connection
        self._reader = reader

    def write(
        self, key: str, body: Body, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        condition = {}
        if if_absent:
            condition = {"IfNoneMatch": "*"}
        elif if_match:
            condition = {"IfMatch": if_match}

        for _ in range(UPLOADS):
            try:
                return self._write_whole(key, body, condition)
            except (Conflict, NotFound) as error:
                # The answer to an earlier attempt may have been lost: the object may be ours all
                # the same.
                tag = self._find_tag(key, memoryview(body))
                if tag is not None:
                    return tag
                if not _is_upload_lost(error):
                    raise Conflict(f"{self._s3.url}/{key} was written by another writer") from error
                lost = error
        raise StoreError(
            f"{self._s3.url}/{key}: the S3 server forgot {UPLOADS} multipart uploads before their "
            "end; see that nothing aborts uploads there, such as a lifecycle rule"
        ) from lost

    def write_pieces(self, key: str, pieces: Iterator[Body]) -> str:
        parts = _cut_equal_parts(pieces)
        first = next(parts, b"")
        second = next(parts, None)
        if second is None:
            return self.write(key, first)
        return self._write_parts(key, itertools.chain((first, second), parts), {})

    def _write_whole(self, key: str, body: Body, condition: dict[str, str]) -> str:
        if len(body) <= PART_BYTES:
            return tag_in(self._s3, self._send("put_object", key, body, **condition))
        return self._write_parts(key, _cut(memoryview(body)), condition)

    def _write_parts(self, key: str, pieces: Iterable[Body], condition: dict[str, str]) -> str:
        """Write an object by a multipart upload.

        Nothing is visible before its end, and nothing remains of one that failed.
        """
        full_key = self._s3.full_key(key)
        algorithm = {}
        if self._s3.checksums:
            algorithm = {"ChecksumAlgorithm": "CRC32"}
        begun = self._s3.ask("create_multipart_upload", key, Key=full_key, **algorithm)
        upload = {"Key": full_key, "UploadId": begun["UploadId"]}

        try:
            size, parts = self._send_parts(key, pieces, upload["UploadId"])
            completion = {"MultipartUpload": {"Parts": parts}, **condition}
            ended = self._s3.ask("complete_multipart_upload", key, **upload, **completion)
            tag = tag_in(self._s3, ended)
        except BaseException:
            # Once only: when the server is gone, the bucket's lifecycle rule has to do it.
            with contextlib.suppress(StoreError):
                self._s3.ask_once("abort_multipart_upload", key, **upload)
            raise

        # Another writer may have replaced it by now: then its size says nothing about ours.
        stored_size, stored_tag = self._s3.head(key)
        if stored_tag == tag and stored_size != size:
            raise StoreError(
                f"{self._s3.url}/{key}: {size} bytes were sent, but {stored_size} stored"
            )
        return tag

    def _send_parts(
        self, key: str, pieces: Iterable[Body], upload: str
    ) -> tuple[int, list[dict[str, Any]]]:
        """Send the parts of a multipart upload.

        Returns:
            Their size in bytes together, and the list of parts that completes the upload.
        """

        def send(part: int, piece: Body) -> dict[str, Any]:
            answer = self._send("upload_part", key, piece, UploadId=upload, PartNumber=part)
            sent = {"PartNumber": part, "ETag": tag_in(self._s3, answer)}
            if "ChecksumCRC32" in answer:
                sent["ChecksumCRC32"] = answer["ChecksumCRC32"]
            return sent

        size = 0
        parts = []
        pending: deque[Future[dict[str, Any]]] = deque()
        with ThreadPoolExecutor(UPLOAD_THREADS) as pool:
            for part, piece in enumerate(pieces, 1):
                size += len(piece)
                pending.append(pool.submit(send, part, piece))
                # More at a time would only take memory: each piece is held until it is sent.
                if len(pending) == UPLOAD_THREADS:
                    parts.append(pending.popleft().result())
            for future in pending:
                parts.append(future.result())
        return size, parts

    def _send(self, verb: str, key: str, body: Body, **details: Any) -> dict[str, Any]:
        """Send `body` with its checksum, which the server compares, and answers if it stores it."""
        digest = digest_of(self._s3, body)
        # boto3 takes no memoryview.
        content = body
        if isinstance(body, memoryview):
            content = bytes(body)
        answer = self._s3.ask(
            verb, key, Key=self._s3.full_key(key), Body=content, **digest, **details
        )
        crc = digest.get("ChecksumCRC32")
        if crc is None:
            return answer
        if answer.get("ChecksumCRC32", crc) != crc:
            raise StoreError(
                f"{self._s3.url}/{key}: the S3 server stored other bytes than it was sent"
            )
        return answer | {"ChecksumCRC32": crc}

    def _find_tag(self, key: str, body: memoryview) -> str | None:
        """Return the object's tag if it holds `body`, else None."""
        try:
            size, tag = self._s3.head(key)
            if size == len(body) and self._holds(key, body):
                return tag
        except NotFound:
            pass
        return None

    def _holds(self, key: str, body: memoryview) -> bool:
        """Return True if the object, of as many bytes, is `body`; read a part at a time."""
        start = 0
        for part in _cut(body):
            if self._reader.read(key, start, len(part)) != part:
                return False
            start += len(part)
        return True


def digest_of(s3: S3Connection, body: Body) -> dict[str, str]:
    """Return the argument of boto3 with the digest of `body`, which the server compares.

    It is the CRC-32; or, if the settings ask for none, the MD5, which servers know that are older
    than S3's checksums.
    """
    if s3.checksums:
        return {"ChecksumCRC32": base64.b64encode(crc32(body).to_bytes(4)).decode()}
    md5 = hashlib.md5(body, usedforsecurity=False).digest()
    return {"ContentMD5": base64.b64encode(md5).decode()}


def _is_upload_lost(error: StoreError) -> bool:
    """Return True if the multipart upload is no more, so that it has to be sent again."""
    response = getattr(error.__cause__, "response", {})
    return response.get("Error", {}).get("Code") == "NoSuchUpload"


def _cut(body: memoryview) -> Iterator[memoryview]:
    """Yield `body` in parts of PART_BYTES, and the rest last."""
    for start in range(0, len(body), PART_BYTES):
        yield body[start : start + PART_BYTES]


def _cut_equal_parts(pieces: Iterable[Body]) -> Iterator[Body]:
    """Yield `pieces` as parts of PART_BYTES, and the rest last: Cloudflare R2 takes no others."""
    waiting = bytearray()
    for piece in pieces:
        waiting += piece
        while len(waiting) >= PART_BYTES:
            yield bytes(memoryview(waiting)[:PART_BYTES])
            del waiting[:PART_BYTES]
    if waiting:
        yield waiting
