"""A store below a prefix of an S3 bucket."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from wds_train.storage.base import Body, Entry, contents
from wds_train.storage.embedded import Endpoint
from wds_train.storage.s3_connection import S3Connection
from wds_train.storage.s3_read import S3Reader
from wds_train.storage.s3_write import S3Writer

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class S3Store:
    """A prefix of an S3 bucket, through boto3. Safe to use from threads and after a fork.

    What fails for want of an answer is repeated for `PATIENCE_SECONDS` (or $WDS_S3_PATIENCE), a read for a second more
    per `SLOWEST` bytes, and ends in `Unavailable`; a refusal (403, 404, 409, 412, 416) is final at once.
    """

    def __init__(self, bucket: str, prefix: str, endpoint: Endpoint | None = None) -> None:
        self._s3 = S3Connection(bucket, prefix, endpoint)
        self.bucket, self.prefix, self.url = bucket, prefix, self._s3.url
        self._reader = S3Reader(self._s3)
        self._writer = S3Writer(self._s3, self._reader)

    def __reduce__(self) -> tuple[object, ...]:
        return _shared, (self.bucket, self.prefix, self._s3.endpoint)

    @property
    def client(self) -> "S3Client":
        return self._s3.client

    @property
    def fallbacks(self) -> int:
        """How many ranges took a second request, through boto3, since the signed address was not answered with them."""
        return self._reader.fallbacks

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        return self._reader.read(key, start, length)

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        self._reader.read_into(key, start, target)

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        return self._reader.read_tagged(key)

    def reconnect(self) -> None:
        self._s3.reconnect()

    def write(self, key: str, body: Body, *, if_absent: bool = False, if_match: str | None = None) -> str:
        return self._writer.write(key, body, if_absent=if_absent, if_match=if_match)

    def write_pieces(self, key: str, pieces: Iterator[Body]) -> str:
        return self._writer.write_pieces(key, pieces)

    def upload(self, key: str, path: Path) -> None:
        self.write(key, contents(path))

    def head(self, key: str) -> tuple[int, str]:
        return self._s3.head(key)

    def list(self, prefix: str = "", *, flat: bool = False) -> Iterator[Entry]:
        found: list[Entry] = []
        more, above = {"Delimiter": "/"} if flat else {}, len(self._s3.full_key(""))
        while True:
            page = self._s3.ask("list_objects_v2", prefix, Prefix=self._s3.full_key(prefix), **more)
            found += [
                Entry(entry["Key"][above:], entry["Size"], entry["LastModified"].timestamp())
                for entry in page.get("Contents", ())
            ]
            found += [Entry(entry["Prefix"][above:]) for entry in page.get("CommonPrefixes", ())]
            if not page["IsTruncated"]:
                break
            more = {"ContinuationToken": page["NextContinuationToken"]}
        yield from sorted(found)  # AWS sorts by key already, SeaweedFS folder by folder

    def delete(self, key: str) -> None:
        self._s3.ask("delete_object", key, Key=self._s3.full_key(key))

    def abort_uploads(self, prefix: str) -> None:
        found = self._s3.ask("list_multipart_uploads", "", Prefix=self._s3.full_key(prefix))
        for upload in found.get("Uploads", ()):
            where = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
            self._s3.ask("abort_multipart_upload", upload["Key"], **where)


@functools.cache
def _shared(bucket: str, prefix: str, endpoint: Endpoint | None) -> S3Store:
    """What a store becomes in another process: one for all copies, or each task sent there would connect anew."""
    return S3Store(bucket, prefix, endpoint)
