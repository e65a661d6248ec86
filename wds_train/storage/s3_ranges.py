"""Ranges of a bucket's objects, by requests that are signed once for many."""

import contextlib
import os
import ssl
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

import botocore.session
from botocore.httpsession import get_cert_path

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SIGNED_SECONDS = 3600  # an address for reads is good for
CONNECT_SECONDS = 5


class NoAnswer(Exception):
    """The server cannot be reached, or its answer broke off."""


class Answer(HTTPResponse):
    """An answer of a known `length`, in bytes that are still to come."""

    def readinto1(self, target: Any) -> int:
        """As http.client's, which receives a piece of its own and copies it."""
        count = self.fp.readinto1(target)
        self.length = (self.length or 0) - count
        return count


class Ranges:
    """GETs of ranges, over connections that are kept. boto3 takes over twice the CPU for a range of 1 MB, most of it to
    sign, to parse and to copy. Safe to use from threads and after a fork.
    """

    def __init__(self, client: "S3Client", bucket: str, seconds: float) -> None:
        """`seconds` is how long to wait for a byte."""
        self._client, self._bucket, self._seconds = client, bucket, seconds
        self._signed: dict[str, tuple[SplitResult, float]] = {}
        self._idle: list[HTTPConnection] = []
        self._pid = os.getpid()
        self._context = _context() if client.meta.endpoint_url.startswith("https:") else None

    @contextlib.contextmanager
    def get(self, key: str, headers: dict[str, str]) -> Iterator[Answer | None]:
        """The answer, with the range as its body; None for any other. `NoAnswer` also while it is read."""
        url, answer = self._address(key), None
        connection = self._connection(url)
        try:
            answer = self._answer(connection, f"{url.path}?{url.query}", headers)
            if answer.status == 206 and answer.length is not None:
                yield answer
            else:
                self._signed.pop(key, None)
                yield None
        except (OSError, HTTPException) as error:
            raise NoAnswer(f"{url.scheme}://{url.netloc}: {error}") from error
        finally:
            if answer is not None and answer.length == 0:
                answer.close()
                self._idle.append(connection)
            else:
                connection.close()

    def _answer(self, connection: HTTPConnection, target: str, headers: dict[str, str]) -> Any:
        if connection.sock is not None:
            try:
                return _asked(connection, target, headers)
            except (ConnectionError, ssl.SSLError):  # the server has closed it meanwhile
                connection.close()
        connection.connect()
        connection.sock.settimeout(self._seconds)
        return _asked(connection, target, headers)

    def _connection(self, url: SplitResult) -> HTTPConnection:
        if self._pid != os.getpid():  # on a socket shared with a forked parent, the answers of both would mix
            self._idle, self._pid = [], os.getpid()
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        if self._context:
            connection: HTTPConnection = HTTPSConnection(url.netloc, timeout=CONNECT_SECONDS, context=self._context)
        else:
            connection = HTTPConnection(url.netloc, timeout=CONNECT_SECONDS)
        connection.response_class = Answer
        return connection

    def _address(self, key: str) -> SplitResult:
        address, since = self._signed.get(key, (None, 0.0))
        if address is None or time.monotonic() - since > SIGNED_SECONDS / 2:
            where = {"Bucket": self._bucket, "Key": key}
            address = urlsplit(self._client.generate_presigned_url("get_object", where, SIGNED_SECONDS))
            self._signed[key] = address, time.monotonic()
        return address


def _asked(connection: HTTPConnection, target: str, headers: dict[str, str]) -> HTTPResponse:
    connection.request("GET", target, headers=headers)
    return connection.getresponse()


def _context() -> ssl.SSLContext:
    """What trusts the certificates that boto3 would."""
    bundle = botocore.session.Session().get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(bundle or get_cert_path(True))
    return context
