"""Stores by their addresses."""

from pathlib import Path

from wds_train.storage.address import EMBEDDED_BUCKET, check_address
from wds_train.storage.base import Store
from wds_train.storage.embedded import ensure_running
from wds_train.storage.local import LocalStore
from wds_train.storage.s3 import S3Store


def open_store(url: str) -> Store:
    """Return the store at an address.

    Args:
        url: `s3://bucket/prefix`, or a local directory. `s3://embedded/...` is on the embedded
            server, which is started if it does not run.

    Raises:
        UsageError: It is no address. The message says what was probably meant.
        WdsTrainError: The embedded server cannot be started.
    """
    if url.startswith("s3://"):
        address = check_address(url, "the address")
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        endpoint = None
        if bucket == EMBEDDED_BUCKET:
            endpoint = ensure_running()
        return S3Store(bucket, prefix.strip("/"), endpoint)
    if url.startswith("file:///"):
        return LocalStore(Path(url.removeprefix("file://")))
    if "://" in url:
        # It raises, and says what was meant.
        check_address(url, "the address")
    return LocalStore(Path(url))
