"""The boto3 session and client for a bucket: made anew after a fork, in another region, with new credentials."""

import os
import threading
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import boto3
import botocore.exceptions as boto_errors
from botocore.config import Config
from botocore.utils import get_environ_proxies

from wds_train.errors import StoreError, UsageError
from wds_train.storage.embedded import Endpoint
from wds_train.storage.ranges import Ranges
from wds_train.storage.s3_errors import QUERY, REDIRECTS, Denied, brief

if TYPE_CHECKING:
    from botocore.model import OperationModel
    from mypy_boto3_s3 import S3Client

SOCKET_SECONDS = 20.0  # without a byte
GOOGLE_HOST = "storage.googleapis.com"
GOOGLE_HEADERS = ("x-goog-", "x-guploader-")  # of its answers, under whatever name it is reached
MOST_REDIRECTS = 5  # one after the other; a wrong region takes one or two
REQUESTER = "requester"

Checksums = Literal["when_supported", "when_required"]

# Held while a client is made, which the fetch threads of a loader worker all want at once. Held by whoever
# forks, too: a child might get it locked, by a thread that it does not have.
_CONNECTING = threading.RLock()
os.register_at_fork(
    before=_CONNECTING.acquire,
    after_in_parent=_CONNECTING.release,
    after_in_child=_CONNECTING.release,
)


class _Client(NamedTuple):
    """The client of process `pid`. `ranges` is None where a proxy is in the way, which only boto3 can use."""

    pid: int
    boto3: "S3Client"
    ranges: Ranges | None


class S3Session:
    """Signs requests to one bucket. Safe to use from threads and after a fork.

    Args:
        bucket: The bucket's name.
        url: The address of what is asked for in it, for messages.
        endpoint: The embedded server; None takes endpoint and credentials from the usual AWS settings.
        checksum_calculation: boto3's setting of that name; None takes it from the AWS settings.

    Attributes:
        generation: The number of renewals. Read it before a request, and give it to `renew` after.
        was_open: Whether any request was granted, by this process or the one that it was forked from.
    """

    def __init__(
        self,
        bucket: str,
        url: str,
        endpoint: Endpoint | None,
        checksum_calculation: Checksums | None,
    ) -> None:
        self.generation = 0
        self.was_open = False
        self._bucket = bucket
        self._url = url
        self._endpoint = endpoint
        self._checksum_calculation = checksum_calculation
        self._payer = _payer()
        self._client: _Client | None = None
        self._session: boto3.session.Session | None = None
        self._region: str | None = (
            None  # the settings', then the bucket's own, once an answer has told it
        )
        self._is_google = False
        self._redirects = threading.local()

    @property
    def client(self) -> "S3Client":
        """The boto3 client of this process."""
        return self._connected().boto3

    @property
    def ranges(self) -> Ranges | None:
        """Reads of ranges over connections that are kept; after a fork, the parent's client signs as well."""
        return (self._client or self._connected()).ranges

    @property
    def server(self) -> str:
        """The server's name, for people."""
        url = self.client.meta.endpoint_url
        if self._is_google or (urlsplit(url).hostname or "").endswith(GOOGLE_HOST):
            return f"Google Cloud Storage ({url}), which has no conditions of ETags on writes,"
        return f"the S3 server {url}"

    def reconnect(self) -> None:
        """Ask over new connections from now on."""
        self._client = None

    def renew(self, generation: int) -> None:
        """Read the credentials again: files, the SSO cache, the instance's role.

        Of many requests that one session's credentials failed, the first alone makes a new session.

        Args:
            generation: The `generation` that the failed request was made with.
        """
        with _CONNECTING:
            if generation == self.generation:
                self.generation += 1
                self._session = None
                self._client = None

    def describe_redirect(self) -> str:
        """Return the sentence for redirects that lead nowhere, of this thread's last request."""
        location = QUERY.sub("?...", getattr(self._redirects, "location", ""))
        target = f"to {location}" if location else "without an address or a region"
        return (
            f"the S3 server {self.client.meta.endpoint_url} redirects {target}; set AWS_ENDPOINT_URL to "
            "the address of the bucket's own server, and AWS_REGION to its region"
        )

    def _connected(self) -> _Client:
        # A connection pool shared with a forked parent would mix the answers of both on one socket.
        client = self._client
        if client is None or client.pid != os.getpid():
            with _CONNECTING:
                client = self._client
                if client is None or client.pid != os.getpid():
                    self._client = client = self._connect()
        return client

    def _connect(self) -> _Client:
        try:
            # Kept over a fork: it holds S3's parsed service model, which costs a loader worker half a second
            # to read. Kept only once it has made a client: until then, boto3 lets no two threads use it.
            session = self._session or self._sign_in()
            client = session.client(
                "s3",
                config=self._config(),
                endpoint_url=self._endpoint.url if self._endpoint else None,
                region_name=self._region,
            )
        except (ValueError, boto_errors.ProfileNotFound, boto_errors.InvalidConfigError) as error:
            message = (
                f"the AWS settings cannot be used for {self._url} ({brief(error)}); "
                "check AWS_ENDPOINT_URL, AWS_PROFILE and AWS_REGION"
            )
            # A file that is just being written anew may lack the profile for a moment.
            raise (Denied if self.was_open else UsageError)(message) from error
        client.meta.events.register("response-received.s3", self._learn)
        if self._payer:
            client.meta.events.register("before-parameter-build.s3", _say_who_pays)
        for write in ("PutObject", "CreateMultipartUpload", "UploadPart"):
            client.meta.events.register(f"before-call.s3.{write}", _name_type_of_shards)
        self._session = session
        self._region = client.meta.region_name

        url = client.meta.endpoint_url
        proxied = not self._endpoint and urlsplit(url).scheme in get_environ_proxies(url)
        payer = {"x-amz-request-payer": self._payer} if self._payer else {}
        ranges = None if proxied else Ranges(client, self._bucket, SOCKET_SECONDS, payer)
        return _Client(os.getpid(), client, ranges)

    def _config(self) -> Config:
        return Config(
            # Retries are ours alone: boto3's would multiply them, and resume no body.
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=5,
            read_timeout=SOCKET_SECONDS,
            max_pool_connections=32,
            request_checksum_calculation=self._checksum_calculation,
            # It holds only for whole bodies, which resuming has none of.
            response_checksum_validation="when_required",
            # As boto3 does over https: bodies go with a CRC. Over plain http it would hash them too, which hides nothing.
            s3={"payload_signing_enabled": False},
            proxies={} if self._endpoint else None,
            # boto3 signs addresses by Version 2 in older regions, which newer buckets refuse.
            signature_version="s3v4",
        )

    def _sign_in(self) -> boto3.session.Session:
        if self._endpoint is None:
            return boto3.session.Session()
        return boto3.session.Session(
            self._endpoint.access_key, self._endpoint.secret_key, region_name="us-east-1"
        )

    def _learn(self, response_dict: dict[str, Any] | None, **_: object) -> None:
        """Learn from an answer's headers whose server it is, and the bucket's region.

        In another region than we asked in, we connect again: botocore follows it for the one request alone,
        and every range would cost two. `response_dict` is None when no answer came.
        """
        if response_dict is None:
            return
        headers = response_dict["headers"]
        self._count_redirects(response_dict["status_code"], headers.get("location", ""))
        if any(name.lower().startswith(GOOGLE_HEADERS) for name in headers):
            self._is_google = True
        region = headers.get("x-amz-bucket-region")
        if region and region != self._region:
            self._region = region
            self._client = None

    def _count_redirects(self, status: int, location: str) -> None:
        """Raise `StoreError` at a redirect that follows too many others: botocore would follow them for ever."""
        if status not in REDIRECTS:
            self._redirects.count = 0
            return
        self._redirects.count = getattr(self._redirects, "count", 0) + 1
        self._redirects.location = location
        if self._redirects.count > MOST_REDIRECTS:
            self._redirects.count = 0
            raise StoreError(f"{self._url}: {self.describe_redirect()}")


def _payer() -> str:
    """Return who pays for requests instead of the bucket's owner; "" if nobody does."""
    payer = os.environ.get("WDS_REQUEST_PAYER", "").strip()
    if payer not in ("", REQUESTER):
        raise UsageError(f"WDS_REQUEST_PAYER is {payer!r}; it is {REQUESTER!r}, or not set")
    return payer


def _say_who_pays(params: dict[str, Any], model: "OperationModel", **_: object) -> None:
    if model.input_shape and "RequestPayer" in model.input_shape.members:
        params["RequestPayer"] = REQUESTER


def _name_type_of_shards(params: dict[str, Any], **_: object) -> None:
    """Name the type of a shard.

    SeaweedFS would guess it from the first bytes of each part, the header of a tar, and compress what cannot
    become smaller: uncompressing takes a seventh of its time when the loader reads.
    """
    if params["url_path"].endswith(".tar"):
        params["headers"]["Content-Type"] = "application/x-tar"
