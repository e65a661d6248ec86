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

# Of a listing: the argument that asks for the next page, by the field of the answer that holds it.
OBJECT_MARKERS = {"NextContinuationToken": "ContinuationToken"}
UPLOAD_MARKERS = {"NextKeyMarker": "KeyMarker", "NextUploadIdMarker": "UploadIdMarker"}


class S3Store:
    """A prefix of an S3 bucket, through boto3. Safe to use from threads and after a fork.

    Its methods are those of `Store`. What fails for want of an answer is repeated for
    `PATIENCE_SECONDS` (or $WDS_S3_PATIENCE), a read for a second more per `SLOWEST` bytes, and ends
    in `Unavailable`. A refusal (403, 404, 409, 412, 416) is final at once.

    Args:
        bucket: The bucket's name.
        prefix: What all keys begin with, without a slash at the end; may be empty.
        endpoint: The embedded server; None takes endpoint and credentials from the AWS settings.

    Attributes:
        connection: Requests below the prefix, for what is no part of `Store`.
    """

    def __init__(self, bucket: str, prefix: str, endpoint: Endpoint | None = None) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.connection = S3Connection(bucket, prefix, endpoint)
        self.url = self.connection.url
        self._reader = S3Reader(self.connection)
        self._writer = S3Writer(self.connection, self._reader)

    def __reduce__(self) -> tuple[object, ...]:
        return _make_shared, (self.bucket, self.prefix, self.connection.endpoint)

    @property
    def client(self) -> "S3Client":
        """The boto3 client of this process."""
        return self.connection.session.client

    @property
    def fallbacks(self) -> int:
        return self.connection.session.fallbacks

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
        details = {}
        if flat:
            details = {"Delimiter": "/"}
        # Keys are relative to the store's prefix.
        above = len(self.connection.full_key(""))
        found: list[Entry] = []
        for page in _list_pages(
            self.connection, "list_objects_v2", prefix, OBJECT_MARKERS, **details
        ):
            for each in page.get("Contents", ()):
                written = each["LastModified"].timestamp()
                found.append(Entry(each["Key"][above:], each["Size"], written))
            for folder in page.get("CommonPrefixes", ()):
                found.append(Entry(folder["Prefix"][above:]))
        # AWS sorts by key already, SeaweedFS folder by folder.
        yield from sorted(found)

    def delete(self, key: str) -> None:
        self.connection.ask("delete_object", key, Key=self.connection.full_key(key))

    def abort_uploads(self, prefix: str) -> None:
        # All pages first: an upload that is gone could not mark where the next page begins.
        pages = _list_pages(self.connection, "list_multipart_uploads", prefix, UPLOAD_MARKERS)
        uploads = []
        for page in pages:
            uploads += page.get("Uploads", ())

        full_prefix = self.connection.full_key(prefix)
        for upload in uploads:
            # Some servers list the uploads of the whole bucket, whatever prefix is asked for.
            if upload["Key"].startswith(full_prefix):
                where = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                with contextlib.suppress(NotFound):  # it has ended meanwhile
                    self.connection.ask("abort_multipart_upload", prefix, **where)


def _list_pages(
    s3: S3Connection, verb: str, prefix: str, markers: dict[str, str], **details: str
) -> Iterator[dict[str, Any]]:
    """Yield the answers to one listing, page by page.

    Args:
        s3: Makes the requests.
        verb: The method of boto3's client.
        prefix: What the keys begin with, below the prefix of `s3`.
        markers: OBJECT_MARKERS or UPLOAD_MARKERS.
        details: Further arguments of the method.

    Raises:
        StoreError: The server says that there are more pages, but not how to ask for them.
    """
    marks: dict[str, str] = {}
    while True:
        page = s3.ask(verb, prefix, Prefix=s3.full_key(prefix), **details, **marks)
        yield page
        if not page.get("IsTruncated"):
            return
        last = marks
        marks = {}
        for field, argument in markers.items():
            if page.get(field):
                marks[argument] = page[field]
        # The same page again would come for ever.
        if not marks or marks == last:
            raise StoreError(
                f"{s3.url}: the S3 server lists no more than its first objects; it cannot be used"
            )


@contextlib.contextmanager
def hurried(store: Store, seconds: float) -> Iterator[None]:
    """Give up what the server of `store` does not answer in time, inside the block.

    It is for housekeeping, while no other thread uses the store.

    Args:
        store: The store. A local one is left as it is.
        seconds: The longest time to wait for an answer.
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
def _make_shared(bucket: str, prefix: str, endpoint: Endpoint | None) -> S3Store:
    """Return what a store becomes in another process.

    It is one for all copies, or each task that is sent there would connect again.
    """
    return S3Store(bucket, prefix, endpoint)
