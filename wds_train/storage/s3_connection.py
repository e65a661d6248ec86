"""What the requests below a prefix of a bucket share."""

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import boto3
import botocore.exceptions as boto_errors
from botocore.config import Config
from botocore.utils import get_environ_proxies
from urllib3.exceptions import HTTPError

from wds_train.environment import number_of
from wds_train.errors import AccessDenied, Conflict, NotFound, StoreError, Unavailable, UsageError
from wds_train.storage.base import inside
from wds_train.storage.embedded import Endpoint
from wds_train.storage.retry import Retry
from wds_train.storage.s3_ranges import NoAnswer, Ranges

if TYPE_CHECKING:
    from botocore.model import OperationModel
    from mypy_boto3_s3 import S3Client

PATIENCE_SECONDS = 120.0  # for a server that has answered before; $WDS_S3_PATIENCE overrides
FIRST_SECONDS = 15.0  # for one that never has: the address may be wrong
SOCKET_SECONDS = 20.0  # without a byte

GOOGLE_HOST = "storage.googleapis.com"
GOOGLE_HEADERS = ("x-goog-", "x-guploader-")  # of its answers, under whatever name it is reached

REQUESTER = "requester"
CHECKSUM_HEADER = re.compile(r"(?i)x-amz-(sdk-)?checksum[a-z0-9-]*|x-amz-trailer")
CHECKSUM_REMEDY = "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required: what is written then goes with Content-MD5, which every S3 server knows"

Checksums = Literal["when_supported", "when_required"]
QUERY = re.compile(r"\?[^\s?'\"()<>]*=[^\s'\"()<>]*")

# What is worth another try: the network, a server in trouble, and bytes damaged on their way to it.
BROKEN = (boto_errors.HTTPClientError, boto_errors.ConnectionError, HTTPError, NoAnswer)
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

# Held while a client is made, which the fetch threads of a loader worker all want at once. Held by whoever forks, too, or a
# child might get it locked, by a thread that it does not have.
_CONNECTING = threading.RLock()
os.register_at_fork(before=_CONNECTING.acquire, after_in_parent=_CONNECTING.release, after_in_child=_CONNECTING.release)


class _Made(NamedTuple):
    """What process `pid` asks with. `ranges` is None where a proxy is in the way, which only boto3 knows to use."""

    pid: int
    client: "S3Client"
    ranges: Ranges | None


class S3Connection:
    """What the requests below a prefix of a bucket share: a boto3 client, another one after a fork, in the bucket's own
    region once an answer has told it; repetition; and the translation of what goes wrong. Credentials and endpoint come
    from the usual AWS settings, or from `endpoint`; so does `checksum_calculation`, unless it is given.
    """

    def __init__(
        self, bucket: str, prefix: str, endpoint: Endpoint | None, checksum_calculation: Checksums | None = None
    ) -> None:
        self.bucket, self.prefix, self.endpoint = bucket, prefix, endpoint
        self._checksum_calculation = checksum_calculation
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.patience = number_of("WDS_S3_PATIENCE", PATIENCE_SECONDS)
        self.payer = _payer()
        self.answered = False
        self._made: _Made | None = None
        self._session: boto3.session.Session | None = None
        self._is_google = False
        self._region: str | None = None  # the settings', then the bucket's own, once an answer has told it

    @property
    def client(self) -> "S3Client":
        return self._connected().client

    @property
    def server(self) -> str:
        """The server's name, for people."""
        url = self.client.meta.endpoint_url
        if self._is_google or (urlsplit(url).hostname or "").endswith(GOOGLE_HOST):
            return f"Google Cloud Storage ({url}), which has no conditions of ETags on writes,"
        return f"the S3 server {url}"

    @property
    def checksums(self) -> bool:
        """Whether bodies go with a CRC-32, as all do unless the settings ask for no more than S3 requires."""
        return self.client.meta.config.request_checksum_calculation != "when_required"  # type: ignore[attr-defined]

    @property
    def ranges(self) -> Ranges | None:
        return (self._made or self._connected()).ranges  # after a fork, the parent's client signs as well

    def _connected(self) -> _Made:
        # A connection pool shared with a forked parent would mix the answers of both on one socket.
        made = self._made
        if made is None or made.pid != os.getpid():
            with _CONNECTING:
                made = self._made
                if made is None or made.pid != os.getpid():
                    self._made = made = self._connect()
        return made

    def reconnect(self) -> None:
        self._made = None

    def ask(self, verb: str, key: str, **details: Any) -> dict[str, Any]:
        """The answer that boto3 got to one request, repeated until there is one."""
        inside(key, self.url)
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
        return answer["ContentLength"], tag_in(self, answer)

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
            if isinstance(translated, Refused) and self.checksums and (header := CHECKSUM_HEADER.search(str(error))):
                raise Refused(
                    f"{translated} This server does not take {header[0].lower()}: {CHECKSUM_REMEDY}"
                ) from error
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

    def _connect(self) -> _Made:
        # Retries are ours alone: boto3's would multiply them, and resume no body.
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=5,
            read_timeout=SOCKET_SECONDS,
            max_pool_connections=32,
            request_checksum_calculation=self._checksum_calculation,
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
            client.meta.events.register("response-received.s3", self._learn)
            if self.payer:
                client.meta.events.register("before-parameter-build.s3", _say_who_pays)
            for write in ("PutObject", "CreateMultipartUpload", "UploadPart"):
                client.meta.events.register(f"before-call.s3.{write}", _say_what_it_is)
            self._session, self._region = session, client.meta.region_name
            url = client.meta.endpoint_url
            proxied = not self.endpoint and urlsplit(url).scheme in get_environ_proxies(url)
            payer = {"x-amz-request-payer": self.payer} if self.payer else {}
            ranges = None if proxied else Ranges(client, self.bucket, SOCKET_SECONDS, payer)
            return _Made(os.getpid(), client, ranges)
        except (ValueError, boto_errors.ProfileNotFound, boto_errors.InvalidConfigError) as error:
            raise UsageError(
                f"the AWS settings cannot be used for {self.url} ({_brief(error)}); "
                "check AWS_ENDPOINT_URL, AWS_PROFILE and AWS_REGION"
            ) from error

    def _learn(self, response_dict: dict[str, Any] | None, **_: object) -> None:
        """Learn from an answer's headers whose server it is, and the bucket's region. In another region than we asked in, we
        connect anew: botocore follows it for the one request alone, and every range would cost two. `response_dict` is
        None when no answer came.
        """
        headers = response_dict["headers"] if response_dict else {}
        self._is_google = self._is_google or any(name.lower().startswith(GOOGLE_HEADERS) for name in headers)
        region = headers.get("x-amz-bucket-region")
        if region and region != self._region:
            self._region = region
            self._made = None

    def _sign_in(self) -> boto3.session.Session:
        if self.endpoint is None:
            return boto3.session.Session()
        return boto3.session.Session(self.endpoint.access_key, self.endpoint.secret_key, region_name="us-east-1")

    def full_key(self, key: str) -> str:
        """`key`, of an object below the prefix, as the bucket has it."""
        return f"{self.prefix}/{key}" if self.prefix else key


def tag_in(s3: S3Connection, answer: dict[str, Any]) -> str:
    """The ETag that an answer tells, without which no write can be conditional."""
    if not (tag := str(answer.get("ETag", ""))):
        raise StoreError(f"{s3.url}: {s3.server} tells no ETags; it cannot be used")
    return tag


def _payer() -> str:
    """Who pays for requests, other than the bucket's owner; "" where nobody does."""
    payer = os.environ.get("WDS_REQUEST_PAYER", "").strip()
    if payer not in ("", REQUESTER):
        raise UsageError(f"WDS_REQUEST_PAYER is {payer!r}; it is {REQUESTER!r}, or not set")
    return payer


def _say_who_pays(params: dict[str, Any], model: "OperationModel", **_: object) -> None:
    if model.input_shape and "RequestPayer" in model.input_shape.members:
        params["RequestPayer"] = REQUESTER


def _say_what_it_is(params: dict[str, Any], **_: object) -> None:
    """Name the type of a shard. SeaweedFS would guess it from the first bytes of each part, the header of a tar, and compress
    what cannot become smaller: uncompressing takes a seventh of its time when the loader reads.
    """
    if params["url_path"].endswith(".tar"):
        params["headers"]["Content-Type"] = "application/x-tar"


class OutOfRange(StoreError):
    """The object ends before the range that was asked for."""


class Refused(StoreError):
    """The server does not take the request: it lacks something, or a header or a value is not to its liking."""


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
        return OutOfRange(f"{name} is shorter than the range that was asked for")
    answered = f"{name}: the S3 server answered {status} {code}: {_brief(error)}"
    return Unavailable(answered) if status in RETRIED or code in RETRIED_CODES else Refused(answered)


def _brief(error: BaseException) -> str:
    """The text of a foreign error, without the query strings of addresses: a signed one is a key to the object."""
    return re.sub(r"\s+", " ", QUERY.sub("?...", str(error)))[:200]
