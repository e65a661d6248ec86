"""Open the store at an address."""

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
        server,
            which is started if it does not run.
    """
    if url.startswith("s3://"):
        address = check_address(url, "the address")
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        endpoint = ensure_running() if bucket == EMBEDDED_BUCKET else None
        return S3Store(bucket, prefix.strip("/"), endpoint)
    if url.startswith("file:///"):
        return LocalStore(Path(url.removeprefix("file://")))
    if "://" in url:
        check_address(url, "the address")  # raises, and says what was meant
    return LocalStore(Path(url))
