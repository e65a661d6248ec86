"""An image behind a web address, within limits: public addresses alone, so many bytes, so many seconds.

Who is handed addresses by others must not become their way into a private network (CWE-918). So a name is resolved once, every
address that it has must be public, and the connection goes to the very address that was looked at; each redirect anew.
"""

import contextlib
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from wds_train.errors import DataError

MOST_BYTES = 50 << 20
SECONDS = 20.0
REDIRECTS = 5
MOVED = (301, 302, 303, 307, 308)
PIECE = 64 << 10
SAFE = "%/:?#[]@!$&'()*+,;=~"  # of an address, what is quoted already or means something
PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(text: str) -> bool:
    """Whether the IP address is one of the internet; of an IPv6 address that stands for one of IPv4, whether that is."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else None
        if found := inner or address.ipv4_mapped or address.sixtofour:
            return is_public(str(found))
    return address.is_global and not address.is_multicast


def download(
    url: str,
    *,
    allowed: Callable[[str], bool] = is_public,
    seconds: float = SECONDS,
    most: int = MOST_BYTES,
) -> bytes:
    """The bytes at `url`; `DataError` when they are not to be had, or an address on the way is not `allowed`."""
    deadline = time.monotonic() + seconds
    try:
        for _ in range(REDIRECTS + 1):
            with _answer(url, allowed, deadline) as (connection, answer):
                if answer.status not in MOVED:
                    return _body(connection, answer, deadline, most)
                url = urljoin(url, answer.getheader("Location", ""))
    except TimeoutError as error:
        raise DataError(
            f"it did not come within {seconds:g} s; try again, or download it yourself"
        ) from error
    except (OSError, HTTPException, ValueError) as error:
        raise DataError(
            f"it could not be downloaded: {str(error)[:200] or type(error).__name__}"
        ) from error
    raise DataError(f"it redirects more than {REDIRECTS} times")


@contextlib.contextmanager
def _answer(
    url: str, allowed: Callable[[str], bool], deadline: float
) -> Iterator[tuple[HTTPConnection, HTTPResponse]]:
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname or parts.username:
        raise DataError(
            "its address, or one that it redirects to, is none of the form http://HOST/... or https://HOST/..."
        )
    connection = HTTPConnection(parts.hostname, parts.port or PORTS[parts.scheme])
    with contextlib.closing(connection):
        connection.sock = _connected(parts, allowed, deadline)
        # As people copy it: with blanks, and letters of any alphabet.
        path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), SAFE)
        connection.sock.settimeout(_left(deadline))
        with _ended_at(deadline, connection.sock):
            connection.request(
                "GET", path, headers={"User-Agent": "wds-train", "Accept": "image/*"}
            )
            answer = connection.getresponse()
            _left(deadline)
        yield connection, answer


@contextlib.contextmanager
def _ended_at(deadline: float, used: socket.socket) -> Iterator[None]:
    """Nobody sends or receives through the socket `used` after `deadline`; its own limit is for one piece of a header."""

    def end() -> None:
        with contextlib.suppress(OSError):
            used.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(_left(deadline), end)
    timer.start()
    try:
        yield
    except (OSError, HTTPException):
        _left(deadline)
        raise
    finally:
        timer.cancel()


def _connected(
    parts: SplitResult, allowed: Callable[[str], bool], deadline: float
) -> socket.socket:
    assert parts.hostname
    found = socket.getaddrinfo(
        parts.hostname, parts.port or PORTS[parts.scheme], type=socket.SOCK_STREAM
    )
    if refused := next(
        (str(place[4][0]) for place in found if not allowed(str(place[4][0]))), None
    ):
        raise DataError(
            f"{parts.hostname} is at {refused}, which is no public address; download it yourself and give the file"
        )
    made = socket.create_connection((str(found[0][4][0]), found[0][4][1]), timeout=_left(deadline))
    if parts.scheme == "http":
        return made
    return ssl.create_default_context().wrap_socket(made, server_hostname=parts.hostname)


def _body(connection: HTTPConnection, answer: HTTPResponse, deadline: float, most: int) -> bytes:
    """All that the server sends. A socket's own limit is for one piece: a server that sends a byte now and then would hold us
    for ever.
    """
    if answer.status != 200:
        raise DataError(f"the server answered {answer.status} {answer.reason}"[:200])
    data = bytearray()
    while piece := answer.read1(PIECE):
        data += piece
        if len(data) > most:
            raise DataError(
                f"it has more than {most >> 20} MB; download it yourself and give the file"
            )
        if connection.sock:  # gone once the server has said its last
            connection.sock.settimeout(_left(deadline))
        _left(deadline)
    return bytes(data)


def _left(deadline: float) -> float:
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left
