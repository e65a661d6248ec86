"""Ranges of a bucket's objects, by requests that are signed once for many."""

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

SIGNED_SECONDS = 3600  # an address for reads is good for
CONNECT_SECONDS = 5
AGENT = f"Botocore/{botocore.__version__}"  # who signs; Hugging Face sends all others to another server
HEAD_BYTES = 4096  # asked for at a time: what comes of the body with them is copied
MOST_HEAD_BYTES = 64 << 10


class NoAnswer(Exception):
    """The server cannot be reached, or its answer broke off."""


class Answer:
    """What a server answers to a GET. `status`; `headers` by name in lower case; `left`: bytes of the body that are still to come,
    None where they are not told; `last`: whether the `socket` that it came over is of no more use.
    """

    def __init__(self, sock: socket.socket) -> None:
        head = b""
        while (end := head.find(b"\r\n\r\n")) < 0:
            if len(head) > MOST_HEAD_BYTES:
                raise NoAnswer(f"a header of over {MOST_HEAD_BYTES} bytes")
            if not (piece := sock.recv(HEAD_BYTES)):
                raise ConnectionResetError("the connection was closed before an answer came")
            head += piece
        first, *lines = head[:end].decode("latin-1").split("\r\n")
        protocol, _, rest = first.partition(" ")
        if not protocol.startswith("HTTP/1.") or not rest[:3].isdecimal():
            raise NoAnswer(f"no answer in HTTP/1.1: {first[:60]!r}")
        named = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in named}
        self.status, length = int(rest[:3]), self.headers.get("content-length", "")
        told = re.fullmatch(r"\d{1,18}", length, re.ASCII) and "transfer-encoding" not in self.headers
        self.left = int(length) if told else None
        come = memoryview(head)[end + 4 :]
        self._come = come[: self.left]
        closes = protocol == "HTTP/1.0" or self.headers.get("connection", "").lower() == "close"
        self.last = closes or len(come) > len(self._come)
        self.socket = sock

    def readinto1(self, target: memoryview) -> int:
        """Put into `target` what has come of the body, once there is anything: how many bytes that is, 0 at the end."""
        target = target[: self.left]
        if self._come:
            count = min(len(target), len(self._come))
            target[:count], self._come = self._come[:count], self._come[count:]
        else:
            count = self.socket.recv_into(target) if target else 0
        self.left = (self.left or 0) - count
        return count

    def read1(self, size: int) -> bytes:
        """At most `size` bytes of the body, as `readinto1`."""
        piece = bytearray(min(size, self.left or 0))
        return bytes(piece[: self.readinto1(memoryview(piece))])


class Ranges:
    """GETs of ranges, over connections that are kept. boto3 takes over twice the CPU for a range of 1 MB, most of it to
    sign, to parse and to copy; http.client a quarter of a millisecond, most of it to parse an answer's headers as an e-mail's.
    Safe to use from threads and after a fork.
    """

    def __init__(self, client: "S3Client", bucket: str, seconds: float, signed: dict[str, str] | None = None) -> None:
        """`seconds` is how long to wait for a byte, `signed` are the headers that the client signs in each address."""
        self._client, self._bucket, self._seconds = client, bucket, seconds
        self._headers = signed or {}
        self._signed: dict[str, tuple[SplitResult, float]] = {}
        self._idle: list[socket.socket] = []
        self._pid = os.getpid()
        self._context = _context() if client.meta.endpoint_url.startswith("https:") else None

    @contextlib.contextmanager
    def get(self, key: str, headers: dict[str, str]) -> Iterator[Answer | None]:
        """The answer, with the range as its body; None for any other. `NoAnswer` also while it is read."""
        url, answer = self._address(key), None
        try:
            answer = self._asked(url, self._headers | headers)
            if answer.status == 206 and answer.left is not None:
                yield answer
            else:
                self._signed.pop(key, None)
                yield None
        except OSError as error:
            raise NoAnswer(f"{url.scheme}://{url.netloc}: {error}") from error
        finally:
            if answer is not None:
                if answer.left == 0 and not answer.last:
                    self._idle.append(answer.socket)
                else:
                    answer.socket.close()

    def _asked(self, url: SplitResult, headers: dict[str, str]) -> Answer:
        if self._pid != os.getpid():  # on a socket shared with a forked parent, the answers of both would mix
            self._idle, self._pid = [], os.getpid()
        # None is idle, or the server has closed it meanwhile.
        with contextlib.suppress(IndexError, ConnectionError, ssl.SSLError):
            return _asked(self._idle.pop(), url, headers)
        return _asked(self._connected(url), url, headers)

    def _connected(self, url: SplitResult) -> socket.socket:
        host = url.hostname or ""
        sock = socket.create_connection((host, url.port or (443 if self._context else 80)), CONNECT_SECONDS)
        with _closed_on_failure(sock):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context:
                sock = self._context.wrap_socket(sock, server_hostname=host)
            sock.settimeout(self._seconds)
            return sock

    def _address(self, key: str) -> SplitResult:
        address, since = self._signed.get(key, (None, 0.0))
        if address is None or time.monotonic() - since > SIGNED_SECONDS / 2:
            where = {"Bucket": self._bucket, "Key": key}
            address = urlsplit(self._client.generate_presigned_url("get_object", where, SIGNED_SECONDS))
            self._signed[key] = address, time.monotonic()
        return address


def _asked(sock: socket.socket, url: SplitResult, headers: dict[str, str]) -> Answer:
    headers = {"Host": url.netloc, "Accept-Encoding": "identity", "User-Agent": AGENT} | headers
    lines = [f"GET {url.path}?{url.query} HTTP/1.1", *map(": ".join, headers.items()), "", ""]
    with _closed_on_failure(sock):
        sock.sendall("\r\n".join(lines).encode("latin-1"))
        return Answer(sock)


@contextlib.contextmanager
def _closed_on_failure(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise


def _context() -> ssl.SSLContext:
    """What trusts the certificates that boto3 would."""
    bundle = botocore.session.Session().get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(bundle or get_cert_path(True))
    return context
