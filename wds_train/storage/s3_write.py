"""Writes of objects to S3."""

import base64
import contextlib
import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from isal.isal_zlib import crc32

from wds_train.errors import Conflict, NotFound, StoreError
from wds_train.storage.base import PART_BYTES, UPLOAD_THREADS, Body
from wds_train.storage.s3_connection import S3Connection, tag_in
from wds_train.storage.s3_read import S3Reader

UPLOADS = 3  # of one object, if the server forgets a multipart upload before its end


class S3Writer:
    """Writes of objects: large ones in parts, of which several are on their way at a time; each with a checksum."""

    def __init__(self, connection: S3Connection, reader: S3Reader) -> None:
        self._s3, self._reader = connection, reader

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
                # The answer to an earlier attempt may have been lost: the object may be ours all the same.
                tag = self._tag_of(key, memoryview(body))
                if tag is not None:
                    return tag
                if not _is_gone(error):
                    raise Conflict(f"{self._s3.url}/{key} was written by another writer") from error
                gone = error
        raise StoreError(
            f"{self._s3.url}/{key}: the S3 server forgot {UPLOADS} multipart uploads before their end; "
            "see that nothing aborts uploads there, such as a lifecycle rule"
        ) from gone

    def _write_whole(self, key: str, body: Body, condition: dict[str, str]) -> str:
        if len(body) <= PART_BYTES:
            return tag_in(self._s3, self._send("put_object", key, body, **condition))
        whole = memoryview(body)
        starts = range(0, len(body), PART_BYTES)
        return self._write_parts(
            key, (whole[start : start + PART_BYTES] for start in starts), condition
        )

    def write_pieces(self, key: str, pieces: Iterator[Body]) -> str:
        parts = _equal_parts(pieces)
        first, second = next(parts, b""), next(parts, None)
        if second is None:
            return self.write(key, first)
        return self._write_parts(key, itertools.chain((first, second), parts), {})

    def _write_parts(self, key: str, pieces: Iterable[Body], condition: dict[str, str]) -> str:
        """A multipart upload: nothing is visible before its end, and nothing remains of one that failed."""
        where = {"Key": self._s3.full_key(key)}
        algorithm = {"ChecksumAlgorithm": "CRC32"} if self._s3.checksums else {}
        begun = self._s3.ask("create_multipart_upload", key, **where, **algorithm)
        upload = where | {"UploadId": begun["UploadId"]}
        try:
            size, parts = self._send_parts(key, pieces, upload["UploadId"])
            ended = self._s3.ask(
                "complete_multipart_upload",
                key,
                **upload,
                MultipartUpload={"Parts": parts},
                **condition,
            )
            tag = tag_in(self._s3, ended)
        except BaseException:
            # Once only: when the server is gone, the bucket's lifecycle rule has to do it.
            with (
                contextlib.suppress(StoreError),
                self._s3.translated(key, "abort_multipart_upload"),
            ):
                self._s3.client.abort_multipart_upload(Bucket=self._s3.bucket, **upload)
            raise
        stored = self._s3.head(key)
        if stored[1] == tag and stored[0] != size:
            raise StoreError(
                f"{self._s3.url}/{key}: {size} bytes were sent, but {stored[0]} stored"
            )
        return tag

    def _send_parts(
        self, key: str, pieces: Iterable[Body], upload: str
    ) -> tuple[int, Sequence[Any]]:
        """Send the parts of a multipart upload; their size in bytes together, and what completes it."""

        def send(part: int, piece: Body) -> dict[str, Any]:
            answer = self._send("upload_part", key, piece, UploadId=upload, PartNumber=part)
            told = {"PartNumber": part, "ETag": tag_in(self._s3, answer)}
            return told | {name: value for name, value in answer.items() if name == "ChecksumCRC32"}

        size, parts, pending = 0, [], deque[Future[dict[str, Any]]]()
        with ThreadPoolExecutor(UPLOAD_THREADS) as pool:
            for part, piece in enumerate(pieces, 1):
                size += len(piece)
                pending.append(pool.submit(send, part, piece))
                if len(pending) == UPLOAD_THREADS:
                    parts.append(pending.popleft().result())
            return size, parts + [future.result() for future in pending]

    def _send(self, verb: str, key: str, body: Body, **details: Any) -> dict[str, Any]:
        """Send `body` with its checksum, which the server compares, and answers if it stores it."""
        digest, content = (
            digest_of(self._s3, body),
            bytes(body) if isinstance(body, memoryview) else body,
        )
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

    def _tag_of(self, key: str, body: memoryview) -> str | None:
        """The object's tag if it holds `body`, else None."""
        try:
            size, tag = self._s3.head(key)
            starts = range(0, size, PART_BYTES)
            same = size == len(body) and all(
                self._reader.read(key, start, min(PART_BYTES, size - start))
                == body[start : start + PART_BYTES]
                for start in starts
            )
        except NotFound:
            return None
        return tag if same else None


def _is_gone(error: StoreError) -> bool:
    """Return whether a multipart upload is no more: after a conflict at its end, it has to be sent again."""
    response = getattr(error.__cause__, "response", {})
    return response.get("Error", {}).get("Code") == "NoSuchUpload"


def _equal_parts(pieces: Iterable[Body]) -> Iterator[Body]:
    """`pieces`, cut anew into parts of PART_BYTES, and the rest last: Cloudflare R2 takes no others."""
    waiting = bytearray()
    for piece in pieces:
        waiting += piece
        while len(waiting) >= PART_BYTES:
            yield bytes(memoryview(waiting)[:PART_BYTES])
            del waiting[:PART_BYTES]
    if waiting:
        yield waiting


def digest_of(s3: S3Connection, body: Body) -> dict[str, str]:
    """What goes with `body`, for the server to compare: its CRC-32, or where the settings ask for none, its MD5, which
    servers know that are older than S3's checksums.
    """
    if s3.checksums:
        return {"ChecksumCRC32": base64.b64encode(crc32(body).to_bytes(4)).decode()}
    return {
        "ContentMD5": base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
    }
