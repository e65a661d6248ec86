"""A store below a prefix of an S3 bucket."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wds_train.errors import NotFound, StoreError
from wds_train.storage.base import Body, Entry, Store, read_file
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
        self.connection = S3Connection(bucket, prefix, endpoint)
        self.bucket, self.prefix, self.url = bucket, prefix, self.connection.url
        self._reader = S3Reader(self.connection)
        self._writer = S3Writer(self.connection, self._reader)

    def __reduce__(self) -> tuple[object, ...]:
        return _shared, (self.bucket, self.prefix, self.connection.endpoint)

    @property
    def client(self) -> "S3Client":
        return self.connection.client

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
        self.connection.session.reconnect()

    def write(
        self, key: str, body: Body, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        return self._writer.write(key, body, if_absent=if_absent, if_match=if_match)

    def write_pieces(self, key: str, pieces: Iterator[Body]) -> str:
        return self._writer.write_pieces(key, pieces)

    def upload(self, key: str, path: Path) -> None:
        self.write(key, read_file(path))

    def head(self, key: str) -> tuple[int, str]:
        return self.connection.head(key)

    def list(self, prefix: str = "", *, flat: bool = False) -> Iterator[Entry]:
        found: list[Entry] = []
        delimiter, above = {"Delimiter": "/"} if flat else {}, len(self.connection.full_key(""))
        token = {"ContinuationToken": "NextContinuationToken"}
        for page in _pages(self.connection, "list_objects_v2", prefix, token, **delimiter):
            found += [
                Entry(entry["Key"][above:], entry["Size"], entry["LastModified"].timestamp())
                for entry in page.get("Contents", ())
            ]
            found += [Entry(entry["Prefix"][above:]) for entry in page.get("CommonPrefixes", ())]
        yield from sorted(found)  # AWS sorts by key already, SeaweedFS folder by folder

    def delete(self, key: str) -> None:
        self.connection.ask("delete_object", key, Key=self.connection.full_key(key))

    def abort_uploads(self, prefix: str) -> None:
        whole = self.connection.full_key(prefix)
        markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        # All pages first: an upload that is gone could not mark where the next page begins.
        pages = list(_pages(self.connection, "list_multipart_uploads", prefix, markers))
        for upload in (each for page in pages for each in page.get("Uploads", ())):
            # Some servers list the uploads of the whole bucket, whatever prefix is asked for.
            if upload["Key"].startswith(whole):
                where = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                with contextlib.suppress(NotFound):  # it has ended meanwhile
                    self.connection.ask("abort_multipart_upload", prefix, **where)


def _pages(
    s3: S3Connection, verb: str, prefix: str, markers: dict[str, str], **details: str
) -> Iterator[dict[str, Any]]:
    """The answers to one listing. `markers` has what asks for the next page, and where the answer has it."""
    marks: dict[str, str] = {}
    while True:
        page = s3.ask(verb, prefix, Prefix=s3.full_key(prefix), **details, **marks)
        yield page
        if not page.get("IsTruncated"):
            return
        last, marks = marks, {name: page[told] for name, told in markers.items() if page.get(told)}
        if not marks or marks == last:
            raise StoreError(
                f"{s3.url}: the S3 server lists no more than its first objects; it cannot be used"
            )


@contextlib.contextmanager
def hurried(store: Store, seconds: float) -> Iterator[None]:
    """Give up what the server of `store` does not answer after so many seconds, inside the block.

    It is for housekeeping, while no other thread uses the store.
    """
    if not isinstance(store, S3Store):
        yield
        return
    patience = store.connection.patience
    store.connection.patience = min(patience, seconds)
    try:
        yield
    finally:
        store.connection.patience = patience


@functools.cache
def _shared(bucket: str, prefix: str, endpoint: Endpoint | None) -> S3Store:
    """What a store becomes in another process: one for all copies, or each task sent there would connect anew."""
    return S3Store(bucket, prefix, endpoint)
