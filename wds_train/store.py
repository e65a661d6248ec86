"""Where objects live: an S3 prefix or a local directory, behind the same few verbs, with compare-and-swap.

Keys are '/'-separated and relative to the store's URL. A write is atomic: readers see the old object, the new one, or
none. A tag names a version of an object (S3: the ETag; local: the sha256) for `write(if_match=)`.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import boto3
import botocore.exceptions as boto_errors
from botocore.config import Config
from urllib3.exceptions import HTTPError

from wds_train.errors import AccessDenied, Conflict, NotFound, StoreError, Unavailable, UsageError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from wds_train.devserver import Endpoint

Body = bytes | bytearray | memoryview

TEMPORARY = ".wds-train-"
EMBEDDED_BUCKET = "embedded"
READ_ATTEMPTS = 6
MULTIPART_BYTES = 64 << 20
PART_BYTES = 16 << 20
PARTS_AT_ONCE = 4
ACCESS_DENIED = {401, 403, "ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed"}
# 409 is a write that raced another; 404 is what AWS answers to If-Match on a missing key, where SeaweedFS says 412.
CAS_LOST = {409, 412}
BROKEN = (boto_errors.HTTPClientError, boto_errors.ConnectionError, boto_errors.IncompleteReadError, HTTPError)


class Entry(NamedTuple):
    key: str
    bytes: int


class Store(Protocol):
    url: str

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """The object's bytes [start, start + length); `NotFound`, or `StoreError` when fewer exist."""

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        """The whole object and its tag."""

    def write(self, key: str, body: Body, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Store `body` and return its tag; `Conflict` when the condition does not hold."""

    def upload(self, key: str, path: Path) -> None:
        """Store a file; the object appears whole or not at all."""

    def head(self, key: str) -> tuple[int, str]:
        """The object's size in bytes and its tag, without its content."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The objects under `prefix`, in key order."""

    def delete(self, key: str) -> None:
        """Remove the object; no error if there is none."""

    def abort_uploads(self) -> None:
        """Drop what writers that were killed in the middle of an upload left, unseen."""


def open_store(url: str) -> Store:
    """The store at `s3://bucket/prefix` or in a local directory. `s3://embedded/...` is the embedded server's."""
    parts = urlsplit(url)
    if parts.scheme == "s3":
        if not parts.netloc:
            raise UsageError(f"{url!r} names no bucket; write s3://BUCKET/PREFIX")
        return S3Store(parts.netloc, parts.path.strip("/"))
    if parts.scheme in ("", "file"):
        return LocalStore(Path(parts.path if parts.scheme else url))
    raise UsageError(f"{url!r} is neither s3://BUCKET/PREFIX nor a local directory")


def default_url(kind: str, name: str, bucket: str | None) -> str:
    """`<bucket>/<kind>/<name>`; without a bucket in the embedded server, which is said in one line."""
    if bucket is None:
        _announce_embedded()
        bucket = f"s3://{EMBEDDED_BUCKET}"
    return f"{bucket.rstrip('/')}/{kind}/{name}"


@functools.cache  # once, however many addresses a command needs
def _announce_embedded() -> None:
    hint = "to use your own, add BUCKET=s3://... to make, or --bucket s3://..."
    print(f"no bucket is set: using the embedded S3 server, data under .wds/ ({hint})", file=sys.stderr)


class LocalStore:
    """A directory. Writers of one store exclude each other by a lock file; a kill releases it."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = str(self.root)

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        with self._translated(key), self._path(key).open("rb") as file:
            file.seek(start)
            data = file.read(-1 if length is None else length)
        if length is not None and len(data) < length:
            raise StoreError(
                f"{self.url}/{key} ends at byte {start + len(data)}, but bytes up to {start + length} were asked for"
            )
        return data

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        data = self.read(key)
        return data, hashlib.sha256(data).hexdigest()

    def write(self, key: str, body: Body, *, if_absent: bool = False, if_match: str | None = None) -> str:
        with self._translated(key), self._exclusive():
            if if_absent and self._path(key).exists():
                raise Conflict(f"{self.url}/{key} exists already")
            if if_match is not None and self._tag(key) != if_match:
                raise Conflict(f"{self.url}/{key} was changed by another writer")
            with self._replacing(key) as file:
                file.write(body)
        return hashlib.sha256(body).hexdigest()

    def upload(self, key: str, path: Path) -> None:
        with self._translated(key), path.open("rb") as source, self._replacing(key) as file:
            shutil.copyfileobj(source, file, 1 << 20)

    def head(self, key: str) -> tuple[int, str]:
        data = self.read(key)
        return len(data), hashlib.sha256(data).hexdigest()

    def list(self, prefix: str = "") -> Iterator[Entry]:
        files = (path for path in self.root.rglob("*") if path.is_file() and not path.name.startswith("."))
        entries = (Entry(path.relative_to(self.root).as_posix(), path.stat().st_size) for path in files)
        yield from sorted(entry for entry in entries if entry.key.startswith(prefix))

    def delete(self, key: str) -> None:
        with self._translated(key):
            self._path(key).unlink(missing_ok=True)

    def abort_uploads(self) -> None:
        for path in self.root.rglob(f"{TEMPORARY}*"):
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        # A key from a damaged or hostile manifest must not reach outside the store.
        if key.startswith("/") or ".." in key.split("/"):
            raise StoreError(f"{key!r} is not a key inside {self.url}")
        return self.root / key

    def _tag(self, key: str) -> str | None:
        try:
            return hashlib.sha256(self._path(key).read_bytes()).hexdigest()
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _replacing(self, key: str) -> Iterator["tempfile._TemporaryFileWrapper[bytes]"]:
        """A file that becomes `key` when the block ends well: fsync before rename, or a power cut leaves it empty."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=TEMPORARY, delete=False) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise NotFound(f"{self.url}/{key} does not exist") from error
        except PermissionError as error:
            raise AccessDenied(f"no permission for {error.filename or self.url}; check its owner and mode") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(
                    f"no space left on the disk of {self.url} while writing {key}; free some and run again"
                ) from error
            raise StoreError(f"{self.url}/{key}: {error}") from error


class S3Store:
    """A prefix of an S3 bucket, through boto3. Credentials and endpoint come from the usual AWS settings, except for
    the bucket `embedded`, which always means the embedded server. Safe to use from threads and after a fork.
    """

    def __init__(self, bucket: str, prefix: str, endpoint: "Endpoint | None" = None) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._endpoint = endpoint
        if bucket == EMBEDDED_BUCKET and endpoint is None:
            from wds_train.devserver import ensure_running

            self._endpoint = ensure_running()
        self._client: S3Client | None = None
        self._client_pid = 0

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_client": None}

    @property
    def client(self) -> "S3Client":
        # A connection pool shared with a forked parent would mix the answers of both on one socket.
        if self._client is None or self._client_pid != os.getpid():
            self._client, self._client_pid = self._connect(), os.getpid()
        return self._client

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        data = bytearray()
        tag: str | None = None
        for attempt in range(READ_ATTEMPTS):
            try:
                with self._translated(key):
                    tag = self._read_on(key, data, start, length, tag)
                return bytes(data)
            except Unavailable:
                # boto3 retries requests but not bodies that break off: go on from the byte that came last.
                if attempt + 1 == READ_ATTEMPTS:
                    raise
                time.sleep(random.uniform(0, min(5.0, 0.1 * 2**attempt)))
        raise AssertionError("unreachable")

    def _read_on(self, key: str, data: bytearray, start: int, length: int | None, tag: str | None) -> str:
        """Append to `data` what is missing of the range; the object's tag, which later parts must match."""
        wanted = {} if tag is None else {"IfMatch": tag}
        first = start + len(data)
        if first or length is not None:
            wanted["Range"] = f"bytes={first}-" + ("" if length is None else str(start + length - 1))
        answer = self.client.get_object(Bucket=self.bucket, Key=self._key(key), **wanted)  # type: ignore[arg-type]
        for chunk in answer["Body"].iter_chunks(1 << 20):
            data += chunk
        if length is not None and len(data) < length:
            raise StoreError(
                f"{self.url}/{key} ends at byte {start + len(data)}, but bytes up to {start + length} were asked for"
            )
        return answer["ETag"]

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        with self._translated(key):
            answer = self.client.get_object(Bucket=self.bucket, Key=self._key(key))
            return answer["Body"].read(), answer["ETag"]

    def write(self, key: str, body: Body, *, if_absent: bool = False, if_match: str | None = None) -> str:
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_match} if if_match else {}
        where: dict[str, Any] = {"Bucket": self.bucket, "Key": self._key(key)}
        try:
            with self._translated(key):
                if len(body) > MULTIPART_BYTES:
                    return self._write_parts(where, body, condition)
                return self.client.put_object(**where, Body=body, **condition)["ETag"]  # type: ignore[arg-type]
        except NotFound as error:
            if if_match is None:
                raise
            raise Conflict(f"{self.url}/{key} was removed by another writer") from error

    def _write_parts(self, where: dict[str, Any], body: Body, condition: dict[str, Any]) -> str:
        """A multipart upload: parts side by side, each checksummed and retried on its own; nothing shows until all
        of them are there.
        """
        client = self.client
        upload = where | {"UploadId": client.create_multipart_upload(**where, ChecksumAlgorithm="CRC32")["UploadId"]}
        pieces = [memoryview(body)[start : start + PART_BYTES] for start in range(0, len(body), PART_BYTES)]

        def send(number: int) -> Any:
            piece = pieces[number - 1].tobytes()
            answer = client.upload_part(**upload, PartNumber=number, Body=piece, ChecksumAlgorithm="CRC32")
            return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC32": answer["ChecksumCRC32"]}

        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                parts = list(pool.map(send, range(1, len(pieces) + 1)))
            return client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, **condition)["ETag"]
        except BaseException:
            with contextlib.suppress(boto_errors.BotoCoreError, boto_errors.ClientError):
                client.abort_multipart_upload(**upload)
            raise

    def abort_uploads(self) -> None:
        """Drop the parts of uploads below this prefix that a killed writer left; they cost storage, unseen."""
        with self._translated("uploads"):
            answer = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=f"{self.prefix}/")
            for upload in answer.get("Uploads", ()):
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def upload(self, key: str, path: Path) -> None:
        with self._translated(key):
            self.client.upload_file(str(path), self.bucket, self._key(key))

    def head(self, key: str) -> tuple[int, str]:
        with self._translated(key):
            answer = self.client.head_object(Bucket=self.bucket, Key=self._key(key))
            return answer["ContentLength"], answer["ETag"]

    def list(self, prefix: str = "") -> Iterator[Entry]:
        base = f"{self.prefix}/" if self.prefix else ""
        with self._translated(prefix):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=base + prefix):
                for entry in page.get("Contents", ()):
                    yield Entry(entry["Key"].removeprefix(base), entry["Size"])

    def delete(self, key: str) -> None:
        with self._translated(key):
            self.client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _connect(self) -> "S3Client":
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 5},
            connect_timeout=5,
            read_timeout=30,
            max_pool_connections=32,
        )
        if self._endpoint is None:
            return boto3.session.Session().client("s3", config=config)
        return boto3.session.Session(
            aws_access_key_id=self._endpoint.access_key,
            aws_secret_access_key=self._endpoint.secret_key,
            region_name="us-east-1",
        ).client("s3", config=config, endpoint_url=self._endpoint.url)

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        name = f"{self.url}/{key}".rstrip("/")
        try:
            yield
        except boto_errors.ClientError as error:
            raise _translate(error, name) from error
        except (
            boto_errors.NoCredentialsError,
            boto_errors.PartialCredentialsError,
            boto_errors.CredentialRetrievalError,
        ) as error:
            raise AccessDenied(
                f"no AWS credentials for {name}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or give the instance a role"
            ) from error
        except boto_errors.ParamValidationError as error:
            raise UsageError(f"{name} is not a usable S3 address: {error}") from error
        except BROKEN as error:
            raise Unavailable(f"{name}: the S3 server does not answer ({_brief(error)})") from error


def _translate(error: boto_errors.ClientError, name: str) -> StoreError:
    code = error.response.get("Error", {}).get("Code", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return NotFound(f"the bucket of {name} does not exist; create it, or correct the name")
    if code in ACCESS_DENIED or status in ACCESS_DENIED:
        return AccessDenied(
            f"access to {name} was denied ({code}); check the AWS credentials, that they may read and write there, "
            "and that they grant s3:ListBucket (without it a missing object looks like a denied one)"
        )
    if status == 404:
        return NotFound(f"{name} does not exist")
    if status in CAS_LOST:
        return Conflict(f"{name} was changed by another writer ({code})")
    if status == 416:
        return StoreError(f"{name} is shorter than the range that was asked for")
    return Unavailable(f"{name}: the S3 server answered {status} {code}: {_brief(error)}")


def _brief(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:200]
