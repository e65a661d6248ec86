"""The boto3 session and client for a bucket, and single requests through them.

The client is made again after a fork, in another region, and with new credentials. Repeating what
fails is for `s3_connection`.
"""

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import boto3
import botocore.exceptions as boto_errors
import numpy as np
from botocore.config import Config
from botocore.utils import get_environ_proxies

from wds_train.errors import StoreError, UsageError
from wds_train.storage.embedded import Endpoint
from wds_train.storage.ranges import Ranges
from wds_train.storage.s3_errors import QUERY, REDIRECTS, Denied, brief

if TYPE_CHECKING:
    from botocore.model import OperationModel
    from mypy_boto3_s3 import S3Client

# The longest time to wait for a byte.
SOCKET_SECONDS = 20.0
CONNECT_SECONDS = 5
GOOGLE_HOST = "storage.googleapis.com"
# Headers of Google's answers begin so, under whatever name it is reached.
GOOGLE_HEADERS = ("x-goog-", "x-guploader-")
# One after the other: a wrong region takes one or two.
MOST_REDIRECTS = 5
REQUESTER = "requester"

Checksums = Literal["when_supported", "when_required"]

# Held while a client is made, which the fetch threads of a loader worker all want at once. Held by
# whoever forks, too: a child might get it locked, by a thread that it does not have.
_CONNECTING = threading.RLock()
os.register_at_fork(
    before=_CONNECTING.acquire,
    after_in_parent=_CONNECTING.release,
    after_in_child=_CONNECTING.release,
)


class GetAnswer(NamedTuple):
    """The answer to one GET.

    Attributes:
        tag: The object's ETag; "" if the server does not say it.
        size: The bytes of the body.
        content_range: The header Content-Range; "" if there is none.
        stream: The body, with a method `read1`.
    """

    tag: str
    size: int
    content_range: str
    stream: Any


@dataclass(frozen=True)
class _Client:
    """The client of a process.

    Attributes:
        pid: The process.
        boto3: The client.
        ranges: Reads of ranges. None if a proxy is in the way, which only boto3 can use.
    """

    pid: int
    boto3: "S3Client"
    ranges: Ranges | None


class _Redirects(threading.local):
    """The redirects that this thread got, one after the other, and where the last one led."""

    count = 0
    location = ""

    def are_too_many(self, status: int, location: str) -> bool:
        """Count an answer, and return True if it is one redirect too many."""
        if status not in REDIRECTS:
            self.count = 0
            return False
        self.count += 1
        self.location = location
        if self.count > MOST_REDIRECTS:
            self.count = 0
            return True
        return False


class S3Session:
    """Signs requests to one bucket. Safe to use from threads and after a fork.

    Args:
        bucket: The bucket's name.
        url: The address of what is asked for in it, for messages.
        endpoint: The embedded server; None takes endpoint and credentials from the usual AWS
            settings.
        checksum_calculation: boto3's setting of that name; None takes it from the AWS settings.

    Attributes:
        generation: The number of renewals. Read it before a request, and give it to `renew` after.
        granted: The kinds of requests that were granted, by the names of boto3's methods. Loader
            workers inherit them when they are forked.
    """

    def __init__(
        self,
        bucket: str,
        url: str,
        endpoint: Endpoint | None,
        checksum_calculation: Checksums | None,
    ) -> None:
        self.generation = 0
        self.granted: set[str] = set()
        self._bucket = bucket
        self._url = url
        self._endpoint = endpoint
        self._checksum_calculation = checksum_calculation
        self._payer = _read_payer()
        self._client: _Client | None = None
        self._session: boto3.session.Session | None = None
        # That of the settings; then the bucket's own, once an answer has said it.
        self._region: str | None = None
        self._is_google = False
        self._redirects = _Redirects()
        # Shared with the processes that are forked from this one: loader workers read, and their
        # trainer shows the number.
        self._fallbacks = np.ndarray((1,), np.int64, mmap.mmap(-1, 8))

    @property
    def client(self) -> "S3Client":
        """The boto3 client of this process."""
        return self._connect().boto3

    @property
    def fallbacks(self) -> int:
        """The number of ranges whose signed address failed, and that took a second request."""
        return int(self._fallbacks[0])

    @property
    def server(self) -> str:
        """The server's name, for people."""
        url = self.client.meta.endpoint_url
        if self._is_google or (urlsplit(url).hostname or "").endswith(GOOGLE_HOST):
            return f"Google Cloud Storage ({url}), which has no conditions of ETags on writes,"
        return f"the S3 server {url}"

    @contextlib.contextmanager
    def get(self, full_key: str, headers: dict[str, str]) -> Iterator[GetAnswer]:
        """Yield the answer to one GET, whose body must be read inside the `with`.

        A range goes to a signed address (`Ranges`). If the answer is no range, boto3 asks again: it
        names the error, follows a bucket to its region, and renews credentials. boto3 also does all
        that goes through a proxy.

        Args:
            full_key: The object's key in the bucket.
            headers: `{"Range": "bytes=..."}`, or nothing for the whole object.

        Raises:
            NoAnswer: The server cannot be reached, or the connection broke.
            botocore.exceptions.ClientError: It answered with an error.
        """
        # After a fork, the parent's client signs as well: a new one would cost half a second.
        ranges = (self._client or self._connect()).ranges
        if "Range" in headers and ranges:
            with ranges.get(full_key, headers) as found:
                if found is not None:
                    tag = found.headers.get("etag", "")
                    content_range = found.headers.get("content-range", "")
                    yield GetAnswer(tag, found.left or 0, content_range, found)
                    return
            self._fallbacks[0] += 1

        answer = self.client.get_object(
            Bucket=self._bucket,
            Key=full_key,
            **headers,  # type: ignore[arg-type]
        )
        with contextlib.closing(answer["Body"]._raw_stream) as stream:  # type: ignore[attr-defined]
            tag = answer.get("ETag", "")
            yield GetAnswer(tag, answer["ContentLength"], answer.get("ContentRange", ""), stream)

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
        location = QUERY.sub("?...", self._redirects.location)
        target = "without an address or a region"
        if location:
            target = f"to {location}"
        return (
            f"the S3 server {self.client.meta.endpoint_url} redirects {target}; set "
            "AWS_ENDPOINT_URL to the address of the bucket's own server, and AWS_REGION to its "
            "region"
        )

    def _connect(self) -> _Client:
        """Return the client of this process, which is made if there is none."""
        # A connection pool shared with a forked parent would mix the answers of both on one socket.
        client = self._client
        if client is None or client.pid != os.getpid():
            with _CONNECTING:
                # Another thread may have made it while this one waited.
                client = self._client
                if client is None or client.pid != os.getpid():
                    client = self._make_client()
                    self._client = client
        return client

    def _make_client(self) -> _Client:
        address = None
        if self._endpoint:
            address = self._endpoint.url
        try:
            # Kept over a fork: it holds S3's parsed service model, which costs a loader worker half
            # a second to read. Kept only once it has made a client: until then, boto3 lets no two
            # threads use it.
            session = self._session or self._sign_in()
            client = session.client(
                "s3",
                config=_make_config(self._endpoint, self._checksum_calculation),
                endpoint_url=address,
                region_name=self._region,
            )
        except (ValueError, boto_errors.ProfileNotFound, boto_errors.InvalidConfigError) as error:
            message = (
                f"the AWS settings cannot be used for {self._url} ({brief(error)}); "
                "check AWS_ENDPOINT_URL, AWS_PROFILE and AWS_REGION"
            )
            # A file that is just being written again may lack the profile for a moment.
            if self.granted:
                raise Denied(message) from error
            raise UsageError(message) from error

        client.meta.events.register("response-received.s3", self._learn)
        _register_additions(client, self._payer)
        self._session = session
        self._region = client.meta.region_name

        # Reads of ranges go around boto3, unless a proxy must take them.
        ranges = None
        url = client.meta.endpoint_url
        if self._endpoint or urlsplit(url).scheme not in get_environ_proxies(url):
            ranges = _make_ranges(client, self._bucket, self._payer)
        return _Client(os.getpid(), client, ranges)

    def _sign_in(self) -> boto3.session.Session:
        if self._endpoint is None:
            return boto3.session.Session()
        return boto3.session.Session(
            self._endpoint.access_key, self._endpoint.secret_key, region_name="us-east-1"
        )

    def _learn(self, response_dict: dict[str, Any] | None, **_: object) -> None:
        """Learn from an answer's headers whose server it is, and the bucket's region.

        In another region than we asked in, we connect again: botocore follows it for the one
        request alone, and every range would cost two. `response_dict` is None when no answer came.
        """
        if response_dict is None:
            return
        headers = response_dict["headers"]
        # botocore would follow redirects for ever.
        if self._redirects.are_too_many(response_dict["status_code"], headers.get("location", "")):
            raise StoreError(f"{self._url}: {self.describe_redirect()}")
        if any(name.lower().startswith(GOOGLE_HEADERS) for name in headers):
            self._is_google = True
        region = headers.get("x-amz-bucket-region")
        if region and region != self._region:
            self._region = region
            self._client = None


def _make_ranges(client: "S3Client", bucket: str, payer: str) -> Ranges:
    signed = {}
    if payer:
        signed["x-amz-request-payer"] = payer
    return Ranges(client, bucket, SOCKET_SECONDS, signed)


def _make_config(endpoint: Endpoint | None, checksum_calculation: Checksums | None) -> Config:
    # An HTTP proxy named in the environment must not get what is meant for this machine.
    proxies: dict[str, str] | None = None
    if endpoint:
        proxies = {}
    return Config(
        # Retries are ours alone: boto3's would multiply them, and resume no body.
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=SOCKET_SECONDS,
        max_pool_connections=32,
        request_checksum_calculation=checksum_calculation,
        # It holds only for whole bodies, which resuming has none of.
        response_checksum_validation="when_required",
        # As boto3 does over https: bodies go with a CRC. Over plain http it would hash them too,
        # which hides nothing.
        s3={"payload_signing_enabled": False},
        proxies=proxies,
        # boto3 signs addresses by Version 2 in older regions, which newer buckets refuse.
        signature_version="s3v4",
    )


def _read_payer() -> str:
    """Return who pays for requests instead of the bucket's owner; "" if nobody does."""
    payer = os.environ.get("WDS_REQUEST_PAYER", "").strip()
    if payer not in ("", REQUESTER):
        raise UsageError(f"WDS_REQUEST_PAYER is {payer!r}; it is {REQUESTER!r}, or not set")
    return payer


def _register_additions(client: "S3Client", payer: str) -> None:
    """Let boto3 call the functions below, which add to its requests."""
    if payer:
        client.meta.events.register("before-parameter-build.s3", _add_payer)
    for write in ("PutObject", "CreateMultipartUpload", "UploadPart"):
        client.meta.events.register(f"before-call.s3.{write}", _add_type_of_shards)


def _add_payer(params: dict[str, Any], model: "OperationModel", **_: object) -> None:
    """Name who pays, in each request that has a parameter for it."""
    if model.input_shape and "RequestPayer" in model.input_shape.members:
        params["RequestPayer"] = REQUESTER


def _add_type_of_shards(params: dict[str, Any], **_: object) -> None:
    """Name the type of a shard.

    SeaweedFS would guess it from the first bytes of each part, the header of a tar, and compress
    what cannot become smaller: uncompressing takes a seventh of its time when the loader reads.
    """
    if params["url_path"].endswith(".tar"):
        params["headers"]["Content-Type"] = "application/x-tar"
