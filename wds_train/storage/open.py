"""The store at an address."""

from pathlib import Path

from wds_train.storage.address import EMBEDDED_BUCKET, checked
from wds_train.storage.base import Store
from wds_train.storage.embedded import ensure_running
from wds_train.storage.local import LocalStore
from wds_train.storage.s3 import S3Store


def open_store(url: str) -> Store:
    """The store at `s3://bucket/prefix` or in a local directory. `s3://embedded/...` is the embedded server's, which is
    started if it does not run.
    """
    if url.startswith("s3://"):
        bucket, _, prefix = checked(url, "the address").removeprefix("s3://").partition("/")
        return S3Store(bucket, prefix.strip("/"), ensure_running() if bucket == EMBEDDED_BUCKET else None)
    if url.startswith("file:///"):
        return LocalStore(Path(url.removeprefix("file://")))
    if "://" in url:
        checked(url, "the address")  # which says what was meant
    return LocalStore(Path(url))
