"""Reads of ranges of a bucket's objects, by addresses that are signed once for many reads.

It is the way of the loader's blocks, so it does without boto3 and http.client; `Ranges` has the
figures. All that is not a plain answer goes back to boto3.
"""

import contextlib
import os
import re
import socket
import ssl
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

import botocore
import botocore.session
from botocore.httpsession import get_cert_path

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# An address for reads is valid for so long; it is used for half the time.
SIGNED_SECONDS = 3600
CONNECT_SECONDS = 5
# Hugging Face redirects all clients but boto3 to another server.
AGENT = f"Botocore/{botocore.__version__}"
# Read at a time, of the head of an answer. Bytes of the body among them are copied.
HEAD_BYTES = 4096
# Of all headers; more is no answer of an S3 server.
MOST_HEAD_BYTES = 64 << 10
END_OF_HEAD = b"\r\n\r\n"


class NoAnswer(Exception):
    """The server cannot be reached, or its answer broke off."""


class Answer:
    """The answer of a server to a GET, whose head has come when it is made.

    Args:
        sock: The connection, on which the request was sent.

    Attributes:
        status: The HTTP status.
        headers: Values by names in lower case.
        left: Bytes of the body that are still to come; None if the server does not say.
        last: True if the connection cannot be used again.
        socket: The connection.

    Raises:
        NoAnswer: What comes is not HTTP/1.0 or HTTP/1.1.
    """

    def __init__(self, sock: socket.socket) -> None:
        # The head: a status line, and lines of headers.
        head = _receive_head(sock)
        end = head.find(END_OF_HEAD)
        first, *lines = head[:end].decode("latin-1").split("\r\n")
        protocol, _, rest = first.partition(" ")
        if not protocol.startswith("HTTP/1.") or not rest[:3].isdecimal():
            raise NoAnswer(f"no answer in HTTP/1.1: {first[:60]!r}")
        self.headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self.status = int(rest[:3])

        # The body: its length, if the server says it, and the bytes that came with the head.
        length = self.headers.get("content-length", "")
        is_plain = "transfer-encoding" not in self.headers
        has_length = is_plain and re.fullmatch(r"\d{1,18}", length, re.ASCII)
        self.left = None
        if has_length:
            self.left = int(length)
        come = memoryview(head)[end + len(END_OF_HEAD) :]
        self._come = come[: self.left]

        # More bytes than the body's cannot be told from the next answer.
        closes = protocol == "HTTP/1.0" or self.headers.get("connection", "").lower() == "close"
        self.last = closes or len(come) > len(self._come)
        self.socket = sock

    def readinto1(self, target: memoryview) -> int:
        """Read into `target` what has come of the body, and wait only if nothing has.

        Returns:
            The number of bytes; 0 at the end of the body.
        """
        target = target[: self.left]
        count = 0
        if self._come:
            # What came with the head.
            count = min(len(target), len(self._come))
            target[:count] = self._come[:count]
            self._come = self._come[count:]
        elif target:
            count = self.socket.recv_into(target)
        self.left = (self.left or 0) - count
        return count

    def read1(self, size: int) -> bytes:
        """Return at most `size` bytes of the body, as `readinto1` does."""
        piece = bytearray(min(size, self.left or 0))
        return bytes(piece[: self.readinto1(memoryview(piece))])


def _receive_head(sock: socket.socket) -> bytes:
    """Return the head of an answer, with bytes of the body that came along."""
    head = b""
    while END_OF_HEAD not in head:
        if len(head) > MOST_HEAD_BYTES:
            raise NoAnswer(f"a header of over {MOST_HEAD_BYTES} bytes")
        piece = sock.recv(HEAD_BYTES)
        if not piece:
            raise ConnectionResetError("the connection was closed before an answer came")
        head += piece
    return head


class Ranges:
    """GETs of ranges, over connections that are kept. Safe to use from threads and after a fork.

    boto3 takes over twice the CPU for a range of 1 MB, most of it to sign, to parse and to copy.
    http.client takes a quarter of a millisecond, most of it to parse headers as those of an e-mail.

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
        self._headers = signed or {}
        self._signed: dict[str, tuple[SplitResult, float]] = {}
        self._idle: list[socket.socket] = []
        self._pid = os.getpid()
        self._context: ssl.SSLContext | None = None
        if client.meta.endpoint_url.startswith("https:"):
            self._context = _make_context()

    @contextlib.contextmanager
    def get(self, key: str, headers: dict[str, str]) -> Iterator[Answer | None]:
        """Yield the answer, whose body is the range; None for any other answer.

        Args:
            key: The object's key in the bucket.
            headers: `{"Range": "bytes=..."}`.

        Raises:
            NoAnswer: The server cannot be reached, or the connection broke while the body was read.
        """
        url = self._address(key)
        answer = None
        try:
            answer = self._request(url, self._headers | headers)
            if answer.status == 206 and answer.left is not None:
                yield answer
            else:
                # The address may be to blame: the next read gets a new one.
                self._signed.pop(key, None)
                yield None
        except OSError as error:
            raise NoAnswer(f"{url.scheme}://{url.netloc}: {error}") from error
        finally:
            # A connection with bytes left on it would answer the next request by those.
            if answer is not None:
                if answer.left == 0 and not answer.last:
                    self._idle.append(answer.socket)
                else:
                    answer.socket.close()

    def _request(self, url: SplitResult, headers: dict[str, str]) -> Answer:
        """Send a request over an idle connection, or else over a new one."""
        # On a socket shared with a forked parent, the answers of both would mix.
        if self._pid != os.getpid():
            self._idle = []
            self._pid = os.getpid()
        # No connection is idle, or the server has closed it meanwhile: then a new one is opened.
        with contextlib.suppress(IndexError, ConnectionError, ssl.SSLError):
            return _request_over(self._idle.pop(), url, headers)
        return _request_over(self._connect(url), url, headers)

    def _connect(self, url: SplitResult) -> socket.socket:
        host = url.hostname or ""
        default_port = 80
        if self._context:
            default_port = 443
        port = url.port or default_port
        sock = socket.create_connection((host, port), CONNECT_SECONDS)
        with _close_on_failure(sock):
            # Or the kernel holds back a short request, to send it together with more.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context:
                sock = self._context.wrap_socket(sock, server_hostname=host)
            sock.settimeout(self._seconds)
            return sock

    def _address(self, key: str) -> SplitResult:
        """Return an address of an object, signed so that it stays valid while it is read."""
        address, since = self._signed.get(key, (None, 0.0))
        if address is None or time.monotonic() - since > SIGNED_SECONDS / 2:
            where = {"Bucket": self._bucket, "Key": key}
            address = urlsplit(
                self._client.generate_presigned_url("get_object", where, SIGNED_SECONDS)
            )
            self._signed[key] = address, time.monotonic()
        return address


def _request_over(sock: socket.socket, url: SplitResult, headers: dict[str, str]) -> Answer:
    headers = {"Host": url.netloc, "Accept-Encoding": "identity", "User-Agent": AGENT} | headers
    lines = [f"GET {url.path}?{url.query} HTTP/1.1", *map(": ".join, headers.items()), "", ""]
    with _close_on_failure(sock):
        sock.sendall("\r\n".join(lines).encode("latin-1"))
        return Answer(sock)


@contextlib.contextmanager
def _close_on_failure(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise


def _make_context() -> ssl.SSLContext:
    """Return a context that trusts the certificates that boto3 trusts."""
    bundle = botocore.session.Session().get_config_variable("ca_bundle")
    bundle = bundle or os.environ.get("REQUESTS_CA_BUNDLE")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(bundle or get_cert_path(True))
    return context
