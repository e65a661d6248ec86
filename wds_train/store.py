"""Where objects live: an S3 prefix or a local directory, behind the same few verbs, with compare-and-swap.

Keys are '/'-separated and relative to the store's URL. A write is atomic: readers see the old object, the new one, or
none. A tag names a version of an object (S3: the ETag; local: the sha256) for `write(if_match=)`.

A conditional write that finds its own bytes in place has succeeded: the server may have committed a request whose
answer was lost, and then refuses its repetition. Writers who could write equal bytes and must not both win, such as
claimants of a run, put something random into them.
"""

import base64
import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import mmap
import os
import random
import re
import stat
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

import boto3
import botocore.exceptions as boto_errors
import numpy as np
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies
from urllib3.exceptions import HTTPError

from wds_train.addresses import EMBEDDED_BUCKET, checked
from wds_train.devserver import Endpoint, ensure_running
from wds_train.errors import AccessDenied, Conflict, NotFound, StoreError, Unavailable, UsageError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

Body = bytes | bytearray | memoryview

PATIENCE_SECONDS = 120.0  # for a server that has answered before; $WDS_S3_PATIENCE overrides
FIRST_SECONDS = 15.0  # for one that never has: the address may be wrong
SOCKET_SECONDS = 20.0  # without a byte
SLOWEST = 100_000  # bytes per second; a body that comes slower is asked for again
PIECE_BYTES = 1 << 18
UNFINISHED = ".tmp-"  # begins the names of local files that are being written
PART_BYTES = 16 << 20  # a larger body goes up in parts of this size, of which UPLOAD_THREADS are copied at a time
UPLOAD_THREADS = 4
SIGNED_SECONDS = 3600  # an address for reads is good for

QUERY = re.compile(r"\?[^\s?'\"()<>]*=[^\s'\"()<>]*")
JITTER = random.SystemRandom()  # shared by no seed and no fork

# What is worth another try: the network, a server in trouble, and bytes damaged on their way to it.
BROKEN = (boto_errors.HTTPClientError, boto_errors.ConnectionError, HTTPError)
RETRIED = {408, 429, 500, 502, 503, 504}
RETRIED_CODES = {"SlowDown", "RequestTimeout", "Throttling", "BadDigest", "XAmzContentChecksumMismatch"}
NO_CREDENTIALS = (
    boto_errors.NoCredentialsError,
    boto_errors.PartialCredentialsError,
    boto_errors.CredentialRetrievalError,
)
# 409 is a write that raced another; 404 is what AWS answers to If-Match on a missing key, where SeaweedFS says 412.
CAS_LOST = {409, 412}
DENIED = {401, 403}
GRANT = (
    "let the AWS credentials read and write there, and list the bucket "
    "(without s3:ListBucket a missing object looks like a denied one)"
)
REMEDIES = {
    "ExpiredToken": "the credentials have expired: renew them",
    "InvalidToken": "the session token is not valid: renew the credentials",
    "InvalidAccessKeyId": "there is no such access key: check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is not the access key's: check AWS_SECRET_ACCESS_KEY",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it, for example with `timedatectl set-ntp true`",
}


class Entry(NamedTuple):
    key: str
    bytes: int


class Store(Protocol):
    url: str

    @property
    def fallbacks(self) -> int:
        """How many ranges took a second request, since the address that was signed for them was not answered with them."""

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """The object's bytes [start, start + length); `NotFound`, or `StoreError` when fewer exist.

        Without `length`, all from `start` on.
        """

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        """Fill `target` (bytes) with the object's from `start` on, as `read` would."""

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        """The whole object and its tag."""

    def write(self, key: str, body: Body, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Store `body` and return its tag; `Conflict` when the condition does not hold, nor the object hold `body`."""

    def write_pieces(self, key: str, pieces: Iterator[Body]) -> str:
        """Store `pieces` as one object and return its tag. The next is asked for while others are on their way, of which
        there are `UPLOAD_THREADS` at most; each but the last takes `PART_BYTES` or more. What asking for one raises
        passes through, and nothing is stored. `NotFound` when an answer was lost and it is unknown what became of it.
        """

    def upload(self, key: str, path: Path) -> None:
        """Store a file; the object appears whole or not at all."""

    def head(self, key: str) -> tuple[int, str]:
        """The object's size in bytes and its tag, without its content."""

    def reconnect(self) -> None:
        """Forget what connections there are: the next request goes over a new one."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The objects under `prefix`, in key order."""

    def delete(self, key: str) -> None:
        """Remove the object; no error if there is none."""

    def abort_uploads(self, prefix: str) -> None:
        """Drop what writers of keys under `prefix` that were killed in the middle of an upload left, unseen but stored."""


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


class LocalStore:
    """A directory."""

    fallbacks = 0

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = str(self.root)

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        with self._translated(key), _opened(self._path(key)) as file:
            file.seek(start)
            data = file.read(-1 if length is None else length)
        if len(data) < (bool(start) if length is None else length):
            raise _too_short(f"{self.url}/{key}", start, length)
        return data

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        with self._translated(key), _opened(self._path(key)) as file:
            file.seek(start)
            if file.readinto(target) < len(target):
                raise _too_short(f"{self.url}/{key}", start, len(target))

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        data = self.read(key)
        return data, hashlib.sha256(data).hexdigest()

    def write(self, key: str, body: Body, *, if_absent: bool = False, if_match: str | None = None) -> str:
        tag, path = hashlib.sha256(body).hexdigest(), self._path(key)
        with self._translated(key), _locked(path.with_name(UNFINISHED + path.name)) as file:
            found = self._tag(key) if if_absent or if_match else None
            if (if_absent and found is not None) or (if_match and found != if_match):
                if found != tag:
                    raise Conflict(f"{self.url}/{key} was written by another writer")
            else:
                _replace(path, file, [body])
        return tag

    def write_pieces(self, key: str, pieces: Iterator[Body]) -> str:
        digest, path = hashlib.sha256(), self._path(key)

        def hashed() -> Iterator[Body]:
            for piece in pieces:
                digest.update(piece)
                yield piece

        with self._translated(key), _locked(path.with_name(UNFINISHED + path.name)) as file:
            _replace(path, file, hashed())
        return digest.hexdigest()

    def upload(self, key: str, path: Path) -> None:
        self.write(key, _contents(path))

    def head(self, key: str) -> tuple[int, str]:
        with self._translated(key), _opened(self._path(key)) as file:
            return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()

    def reconnect(self) -> None:
        pass

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder, _, start = prefix.rpartition("/")
        tops = [path for path in (self.root / folder).glob("*") if path.name.startswith(start)]
        with self._translated(prefix):
            yield from sorted(
                entry for top in tops for path in (top, *top.rglob("*")) for entry in _entry(self.root, path)
            )

    def delete(self, key: str) -> None:
        with self._translated(key), contextlib.suppress(NotADirectoryError):
            self._path(key).unlink(missing_ok=True)

    def abort_uploads(self, prefix: str) -> None:
        folder, _, start = prefix.rpartition("/")
        for path in (self.root / folder).rglob(f"{UNFINISHED}{start}*"):
            with _locked(path):  # waits for a writer that lives, and removes what a killed one left
                pass

    def _path(self, key: str) -> Path:
        return self.root / _inside(key, self.url)

    def _tag(self, key: str) -> str | None:
        try:
            return self.head(key)[1]
        except NotFound:
            return None

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


def _opened(path: Path) -> io.BufferedReader:
    if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):  # opening a FIFO waits for ever
        raise StoreError(f"{path} is no plain file; remove it")
    return path.open("rb")


def _entry(root: Path, path: Path) -> Iterator[Entry]:
    with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
        if path.is_file() and not path.name.startswith(UNFINISHED):
            yield Entry(path.relative_to(root).as_posix(), path.stat().st_size)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The empty file `path`, this writer's alone until the block ends, when it is removed if it is still there.

    A kill releases the lock, and what it leaves behind the next writer of the same key takes over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _names(path, file):  # while we waited, the writer before us renamed this very file into place
                continue
            file.truncate(0)
            try:
                yield file
            finally:
                if _names(path, file):  # else it is the next writer's by now
                    path.unlink()
            return


def _names(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _replace(path: Path, file: BinaryIO, pieces: Iterable[Body]) -> None:
    """Put `pieces` at `path` by way of `file`, a file beside it."""
    file.writelines(pieces)
    file.flush()
    os.fsync(file.fileno())  # before the rename, or a power cut leaves `path` empty
    Path(file.name).replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # or a power cut undoes the rename, of which a manifest may already tell
    os.close(folder)


class S3Connection:
    """What the requests below a prefix of a bucket share: a boto3 client, another one after a fork, in the bucket's own
    region once an answer has told it; repetition; and the translation of what goes wrong. Credentials and endpoint come
    from the usual AWS settings, or from `endpoint`.
    """

    def __init__(self, bucket: str, prefix: str, endpoint: Endpoint | None) -> None:
        self.bucket, self.prefix, self.endpoint = bucket, prefix, endpoint
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.patience = float(os.environ.get("WDS_S3_PATIENCE", PATIENCE_SECONDS))
        self.answered = False
        self.signed: dict[str, tuple[str, float]] = {}
        self.http = _sender({})
        self._client: S3Client | None = None
        self._client_pid = 0
        self._session: boto3.session.Session | None = None
        self._region: str | None = None  # the settings', then the bucket's own, once an answer has told it

    @property
    def client(self) -> "S3Client":
        # A connection pool shared with a forked parent would mix the answers of both on one socket.
        client = self._client
        if client is None or self._client_pid != os.getpid():
            self._client, self._client_pid = client, _ = self._connect(), os.getpid()
            self.http = _sender({} if self.endpoint else get_environ_proxies(client.meta.endpoint_url))
        return client

    def reconnect(self) -> None:
        self._client = None

    def ask(self, verb: str, key: str, **details: Any) -> dict[str, Any]:
        """boto3's answer to one request, repeated until there is one."""
        _inside(key, self.url)
        retry = self.retry()
        while True:
            try:
                with self.translated(key):
                    answer: dict[str, Any] = getattr(self.client, verb)(Bucket=self.bucket, **details)
                self.answered = True
                return answer
            except Unavailable as error:
                retry.pause(error)

    def head(self, key: str) -> tuple[int, str]:
        answer = self.ask("head_object", key, Key=self.full_key(key))
        return answer["ContentLength"], answer["ETag"]

    def retry(self) -> "Retry":
        return Retry(self.patience if self.answered else min(self.patience, FIRST_SECONDS))

    @contextlib.contextmanager
    def translated(self, key: str) -> Iterator[None]:
        name = f"{self.url}/{key}".rstrip("/")
        try:
            yield
        except boto_errors.ClientError as error:
            self.answered = True
            translated = _translate(error, name)
            if isinstance(translated, Unavailable) and self.endpoint and self.endpoint.is_full():
                full = f"no space left on the disk of {self.endpoint.root}, where the embedded S3 server keeps {name}"
                raise StoreError(f"{full}; free some and run again") from error
            raise translated from error
        except NO_CREDENTIALS as error:
            raise AccessDenied(
                f"no AWS credentials for {name} ({_brief(error)}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or give the instance a role"
            ) from error
        except boto_errors.ParamValidationError as error:
            raise UsageError(f"{name} is not a usable S3 address: {_brief(error)}") from error
        except BROKEN as error:
            raise Unavailable(
                f"{name}: the S3 server does not answer ({_brief(error)}); check the network and AWS_ENDPOINT_URL"
            ) from error
        except boto_errors.BotoCoreError as error:
            raise StoreError(f"{name}: {_brief(error)}") from error

    def _connect(self) -> "S3Client":
        # Retries are ours alone: boto3's would multiply them, and resume no body.
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=5,
            read_timeout=SOCKET_SECONDS,
            max_pool_connections=32,
            response_checksum_validation="when_required",  # it holds only for whole bodies, which resuming has none of
            # As boto3 does over https: bodies go with a CRC. It would hash them for plain http too, which hides nothing.
            s3={"payload_signing_enabled": False},
            proxies={} if self.endpoint else None,
            signature_version="s3v4",  # boto3 signs addresses by Version 2 in older regions, which newer buckets refuse
        )
        try:
            # Kept over a fork: it holds S3's parsed service model, which costs a loader worker half a second to read.
            # Kept only once it has made a client: until then, boto3 lets no two threads use it.
            session = self._session or self._sign_in()
            url = self.endpoint.url if self.endpoint else None
            client = session.client("s3", config=config, endpoint_url=url, region_name=self._region)
            client.meta.events.register("response-received.s3", self._learn_region)
            self._session, self._region = session, client.meta.region_name
            return client
        except (ValueError, boto_errors.ProfileNotFound, boto_errors.InvalidConfigError) as error:
            raise UsageError(
                f"the AWS settings cannot be used for {self.url} ({_brief(error)}); "
                "check AWS_ENDPOINT_URL, AWS_PROFILE and AWS_REGION"
            ) from error

    def _learn_region(self, response_dict: dict[str, Any] | None, **_: object) -> None:
        """Connect anew in the region that S3 names when it was asked in another: botocore follows it for the one request
        alone, and every range would cost two. `response_dict` is None when no answer came.
        """
        region = response_dict["headers"].get("x-amz-bucket-region") if response_dict else None
        if region and region != self._region:
            self._region = region
            self.signed.clear()
            self._client = None

    def _sign_in(self) -> boto3.session.Session:
        if self.endpoint is None:
            return boto3.session.Session()
        return boto3.session.Session(self.endpoint.access_key, self.endpoint.secret_key, region_name="us-east-1")

    def full_key(self, key: str) -> str:
        """`key`, of an object below the prefix, as the bucket has it."""
        return f"{self.prefix}/{key}" if self.prefix else key


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
            except _OutOfRange as error:
                raise _too_short(f"{self._connection.url}/{key}", body.start, body.length) from error
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
            raise _OutOfRange
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
        where = {"Bucket": connection.bucket, "Key": connection.full_key(_inside(key, connection.url))}
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


class S3Writer:
    """Writes of objects: large ones in parts, of which several are on their way at a time; each with a checksum."""

    def __init__(self, connection: S3Connection, reader: S3Reader) -> None:
        self._s3, self._reader = connection, reader

    def write(self, key: str, body: Body, *, if_absent: bool = False, if_match: str | None = None) -> str:
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_match} if if_match else {}
        try:
            if len(body) > PART_BYTES:
                whole = memoryview(body)
                starts = range(0, len(body), PART_BYTES)
                return self._write_parts(key, (whole[start : start + PART_BYTES] for start in starts), condition)
            return self._send("put_object", key, body, **condition)["ETag"]
        except (Conflict, NotFound) as error:
            tag = self._tag_of(key, memoryview(body))
            if tag is None:
                raise Conflict(f"{self._s3.url}/{key} was written by another writer") from error
            return tag

    def write_pieces(self, key: str, pieces: Iterator[Body]) -> str:
        first, second = next(pieces, b""), next(pieces, None)
        if second is None:
            return self.write(key, first)
        return self._write_parts(key, itertools.chain((first, second), pieces), {})

    def _write_parts(self, key: str, pieces: Iterable[Body], condition: dict[str, str]) -> str:
        """A multipart upload: nothing is visible before its end, and nothing remains of one that failed."""
        where = {"Key": self._s3.full_key(key)}
        upload = where | {
            "UploadId": self._s3.ask("create_multipart_upload", key, **where, ChecksumAlgorithm="CRC32")["UploadId"]
        }
        try:
            size, parts = self._send_parts(key, pieces, upload["UploadId"])
            tag = self._s3.ask(
                "complete_multipart_upload", key, **upload, MultipartUpload={"Parts": parts}, **condition
            )["ETag"]
        except BaseException:
            # Once only: when the server is gone, the bucket's lifecycle rule has to do it.
            with contextlib.suppress(StoreError), self._s3.translated(key):
                self._s3.client.abort_multipart_upload(Bucket=self._s3.bucket, **upload)
            raise
        stored = self._s3.head(key)
        if stored[1] == tag and stored[0] != size:
            raise StoreError(f"{self._s3.url}/{key}: {size} bytes were sent, but {stored[0]} stored")
        return tag

    def _send_parts(self, key: str, pieces: Iterable[Body], upload: str) -> tuple[int, Sequence[Any]]:
        """Send the parts of a multipart upload; their size in bytes together, and what completes it."""

        def send(part: int, piece: Body) -> dict[str, Any]:
            answer = self._send("upload_part", key, piece, UploadId=upload, PartNumber=part)
            return {"PartNumber": part, "ETag": answer["ETag"], "ChecksumCRC32": answer["ChecksumCRC32"]}

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
        crc, content = _crc32(body), bytes(body) if isinstance(body, memoryview) else body
        answer = self._s3.ask(verb, key, Key=self._s3.full_key(key), Body=content, ChecksumCRC32=crc, **details)
        if answer.get("ChecksumCRC32", crc) != crc:
            raise StoreError(f"{self._s3.url}/{key}: the S3 server stored other bytes than it was sent")
        return answer | {"ChecksumCRC32": crc}

    def _tag_of(self, key: str, body: memoryview) -> str | None:
        """The object's tag if it holds `body`, else None."""
        try:
            size, tag = self._s3.head(key)
            starts = range(0, size, PART_BYTES)
            same = size == len(body) and all(
                self._reader.read(key, start, min(PART_BYTES, size - start)) == body[start : start + PART_BYTES]
                for start in starts
            )
        except NotFound:
            return None
        return tag if same else None


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
        self.write(key, _contents(path))

    def head(self, key: str) -> tuple[int, str]:
        return self._s3.head(key)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        found: list[Entry] = []
        more: dict[str, str] = {}
        while True:
            page = self._s3.ask("list_objects_v2", prefix, Prefix=self._s3.full_key(prefix), **more)
            found += [
                Entry(entry["Key"][len(self._s3.full_key("")) :], entry["Size"]) for entry in page.get("Contents", ())
            ]
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


def _sender(proxies: dict[str, str]) -> URLLib3Session:
    """botocore's HTTP session, with the certificates that boto3 would use."""
    bundle: Any = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE") or True
    limits: Any = (5, SOCKET_SECONDS)  # seconds to connect, and without a byte
    return URLLib3Session(verify=bundle, proxies=proxies, timeout=limits, max_pool_connections=32)


class _OutOfRange(StoreError):
    """The object ends before the range that was asked for."""


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


class Retry:
    """The pauses between the attempts at one thing: random, doubling up to 5 s, short again after progress."""

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._seconds, self._clock, self._sleep = seconds, clock, sleep
        self._began = clock()
        self._attempts = 0
        self._fruitless = 0

    def pause(self, error: Unavailable, size: int = 0, progressed: bool = False) -> None:
        """Wait before the next attempt at reading `size` bytes; `Unavailable` when the time for them is up."""
        self._attempts += 1
        self._fruitless = 0 if progressed else self._fruitless + 1
        pause = JITTER.uniform(0, min(5.0, 0.1 * 2**self._fruitless))
        spent = self._clock() - self._began
        if spent + pause > self._seconds + size / SLOWEST:
            raise Unavailable(f"{error}; gave up after {self._attempts} attempts in {spent:.0f} s") from error
        self._sleep(pause)


def _translate(error: boto_errors.ClientError, name: str) -> StoreError:
    code = error.response.get("Error", {}).get("Code", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":  # no `NotFound`: a run would be taken for a fresh one
        return StoreError(f"the bucket of {name} does not exist; create it, or correct the name")
    if code in REMEDIES or status in DENIED:
        return AccessDenied(f"access to {name} was denied ({code}): {REMEDIES.get(code, GRANT)}")
    if status == 404:
        return NotFound(f"{name} does not exist")
    if status in CAS_LOST:
        return Conflict(f"{name} was changed by another writer ({code})")
    if status == 416:
        return _OutOfRange(f"{name} is shorter than the range that was asked for")
    answered = f"{name}: the S3 server answered {status} {code}: {_brief(error)}"
    return Unavailable(answered) if status in RETRIED or code in RETRIED_CODES else StoreError(answered)


def _too_short(name: str, start: int, length: int | None) -> StoreError:
    span = f"from {start} on" if length is None else f"{start} up to {start + length}"
    return StoreError(f"{name} is too short: bytes {span} were asked for")


def _inside(key: str, url: str) -> str:
    """`key`, which may come from a damaged or hostile manifest, and must not lead out of the store."""
    if key.startswith("/") or ".." in key.split("/") or "\0" in key:
        raise StoreError(f"{key!r} is not a key inside {url}")
    return key


def _contents(path: Path) -> Body:
    """The bytes of a file; a large one is mapped, not read."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size <= PART_BYTES:
                return file.read()
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error


def _crc32(body: Body) -> str:
    return base64.b64encode(zlib.crc32(body).to_bytes(4)).decode()


def _brief(error: BaseException) -> str:
    """The text of a foreign error, without the query strings of addresses: a signed one is a key to the object."""
    return re.sub(r"\s+", " ", QUERY.sub("?...", str(error)))[:200]
