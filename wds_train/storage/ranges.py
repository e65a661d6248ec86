"""Reads of ranges of a bucket's objects, by addresses that are signed once for many reads."""

import contextlib
import os
import ssl
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

import botocore
import botocore.session
from botocore.httpsession import get_cert_path

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SIGNED_SECONDS = 3600  # for which an address for reads is valid
CONNECT_SECONDS = 5
# Hugging Face redirects all clients but boto3 to another server.
AGENT = f"Botocore/{botocore.__version__}"


class NoAnswer(Exception):
    """The server cannot be reached, or its answer is broken."""


class Ranges:
    """GETs of ranges, over connections that are kept. Safe to use from threads and after a fork.

    boto3 takes over twice the CPU for a range of 1 MB, most of it to sign, to parse and to copy.

    Args:
        client: Signs the addresses.
        bucket: The bucket.
        seconds: The longest time to wait for a byte.
        signed: Headers that the client signs in each address.
    """

    def __init__(
        self, client: "S3Client", bucket: str, seconds: float, signed: dict[str, str] | None = None
    ) -> None:
        self._client = client
        self._bucket = bucket
        self._seconds = seconds
        self._headers = {"User-Agent": AGENT} | (signed or {})
        self._signed: dict[str, tuple[SplitResult, float]] = {}
        self._idle: list[HTTPConnection] = []
        self._pid = os.getpid()
        self._context = _context() if client.meta.endpoint_url.startswith("https:") else None

    @contextlib.contextmanager
    def get(self, key: str, headers: dict[str, str]) -> Iterator[HTTPResponse | None]:
        """Yield the answer, whose body is the range; None for any other answer.

        Args:
            key: The object's key.
            headers: The range, as a header of HTTP.

        Raises:
            NoAnswer: The server cannot be reached, or the connection broke while the body was read.
        """
        url = self._address(key)
        with contextlib.ExitStack() as stack:
            try:
                connection, answer = self._request(url, self._headers | headers)
                stack.callback(self._give_back, connection, answer)
                if answer.status == 206 and answer.length is not None:
                    yield answer
                else:
                    self._signed.pop(key, None)
                    yield None
            except OSError as error:
                raise NoAnswer(f"{url.scheme}://{url.netloc}: {error}") from error
            except HTTPException as error:
                text = str(error).strip()
                raise NoAnswer(
                    f"{url.scheme}://{url.netloc}: no answer in HTTP/1.1: {text[:60]!r}"
                ) from error

    def _request(
        self, url: SplitResult, headers: dict[str, str]
    ) -> tuple[HTTPConnection, HTTPResponse]:
        # On a connection shared with a forked parent, the answers of both would mix.
        if self._pid != os.getpid():
            self._idle = []
            self._pid = os.getpid()
        # No connection is idle, or the server has closed it meanwhile: then a new one is opened.
        with contextlib.suppress(IndexError, ConnectionError, ssl.SSLError, HTTPException):
            return _request_over(self._idle.pop(), url, headers)
        return _request_over(self._connect(url), url, headers)

    def _connect(self, url: SplitResult) -> HTTPConnection:
        host = url.hostname or ""
        if self._context:
            connection: HTTPConnection = HTTPSConnection(
                host, url.port, timeout=CONNECT_SECONDS, context=self._context
            )
        else:
            connection = HTTPConnection(host, url.port, timeout=CONNECT_SECONDS)
        with _close_on_failure(connection):
            connection.connect()
        connection.sock.settimeout(self._seconds)
        return connection

    def _give_back(self, connection: HTTPConnection, answer: HTTPResponse) -> None:
        """Keep the connection for the next request, if it has no bytes of this answer left."""
        reusable = answer.length == 0 and not answer.will_close
        answer.close()
        if reusable:
            self._idle.append(connection)
        else:
            connection.close()

    def _address(self, key: str) -> SplitResult:
        address, since = self._signed.get(key, (None, 0.0))
        if address is None or time.monotonic() - since > SIGNED_SECONDS / 2:
            where = {"Bucket": self._bucket, "Key": key}
            address = urlsplit(
                self._client.generate_presigned_url("get_object", where, SIGNED_SECONDS)
            )
            self._signed[key] = address, time.monotonic()
        return address


def _request_over(
    connection: HTTPConnection, url: SplitResult, headers: dict[str, str]
) -> tuple[HTTPConnection, HTTPResponse]:
    with _close_on_failure(connection):
        # The host as it was signed: with its port, if the address has one.
        connection.request("GET", f"{url.path}?{url.query}", headers={"Host": url.netloc} | headers)
        return connection, connection.getresponse()


@contextlib.contextmanager
def _close_on_failure(connection: HTTPConnection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise


def _context() -> ssl.SSLContext:
    """Return a context that trusts the certificates that boto3 trusts."""
    bundle = botocore.session.Session().get_config_variable("ca_bundle")
    bundle = bundle or os.environ.get("REQUESTS_CA_BUNDLE")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(bundle or get_cert_path(True))
    return context
