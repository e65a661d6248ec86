"""Download an image from a web address, within limits: public addresses, bytes, seconds.

A program that is handed addresses by others must not become their way into a private network
(CWE-918). So a name is resolved once, all of its addresses must be public, and the connection goes
to the very address that was checked. Each redirect is checked in the same way.
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

MOST_BYTES = 50 << 20  # of an image
SECONDS = 20.0  # for all of a download, with its redirects
REDIRECTS = 5
MOVED = (301, 302, 303, 307, 308)  # the answers that name another address
PIECE = 64 << 10  # bytes that are read at once
# Characters of an address that stay as they are: they mean something, or are quoted already.
SAFE = "%/:?#[]@!$&'()*+,;=~"
PORTS = {"http": 80, "https": 443}
# IPv6 addresses that stand for IPv4 ones (RFC 6052), by which a private address could be reached.
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(text: str) -> bool:
    """Return True for an IP address of the internet.

    An IPv6 address that stands for an IPv4 one is public if that one is.

    Args:
        text: The address, IPv4 or IPv6.
    """
    # An IPv6 address may name a network card of this machine: fe80::1%eth0.
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = _embedded_ipv4(address)
        if inner:
            return is_public(str(inner))
    return address.is_global and not address.is_multicast


def _embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that `address` stands for, if it stands for one."""
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def download(
    url: str,
    *,
    allowed: Callable[[str], bool] = is_public,
    seconds: float = SECONDS,
    most: int = MOST_BYTES,
) -> bytes:
    """Return the bytes at a web address.

    Args:
        url: http:// or https://, in any alphabet and with blanks.
        allowed: Returns True for an IP address that may be connected to.
        seconds: The time for all of it.
        most: The most bytes to read.

    Raises:
        DataError: They cannot be had within the limits, or an address on the way is not allowed.
    """
    deadline = time.monotonic() + seconds
    # The messages follow the image's name, and begin with a small letter.
    try:
        for _ in range(REDIRECTS + 1):
            with _request(url, allowed, deadline) as (connection, answer):
                if answer.status not in MOVED:
                    return _read_body(connection, answer, deadline, most)
                url = urljoin(url, answer.getheader("Location", ""))
    except TimeoutError as error:
        raise DataError(
            f"it did not come within {seconds:g} s; try again, or download it yourself"
        ) from error
    except (OSError, HTTPException, ValueError) as error:
        cause = str(error)[:200] or type(error).__name__
        raise DataError(f"it could not be downloaded: {cause}") from error
    raise DataError(f"it redirects more than {REDIRECTS} times")


@contextlib.contextmanager
def _request(
    url: str, allowed: Callable[[str], bool], deadline: float
) -> Iterator[tuple[HTTPConnection, HTTPResponse]]:
    """Ask for `url`, and yield the connection and the answer's head."""
    parts = urlsplit(url)
    # A user name hides the host from whoever reads the address: http://good.org@bad.org asks
    # bad.org.
    if parts.scheme not in PORTS or not parts.hostname or parts.username:
        raise DataError(
            "its address, or one that it redirects to, is none of the form http://HOST/... or "
            "https://HOST/..."
        )
    # For https, too: the socket that it is given does TLS already.
    connection = HTTPConnection(parts.hostname, _port_of(parts))
    with contextlib.closing(connection):
        connection.sock = _connect(parts, allowed, deadline)
        # People copy addresses with blanks and with letters of any alphabet.
        path = parts.path or "/"
        if parts.query:
            path += f"?{parts.query}"
        connection.sock.settimeout(_seconds_left(deadline))
        with _cut_off_at(deadline, connection.sock):
            headers = {"User-Agent": "wds-train", "Accept": "image/*"}
            connection.request("GET", quote(path, SAFE), headers=headers)
            answer = connection.getresponse()
            _seconds_left(deadline)
        yield connection, answer


@contextlib.contextmanager
def _cut_off_at(deadline: float, connection: socket.socket) -> Iterator[None]:
    """Shut a socket down at `deadline`, if the context lasts so long.

    A socket's own limit holds for each piece of a header: a server that sends one byte now and then
    would not meet it.
    """

    def shut_down() -> None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(_seconds_left(deadline), shut_down)
    timer.start()
    try:
        yield
    except (OSError, HTTPException):
        _seconds_left(deadline)  # the shutdown is the cause: a TimeoutError
        raise
    finally:
        timer.cancel()


def _port_of(parts: SplitResult) -> int:
    return parts.port or PORTS[parts.scheme]


def _connect(parts: SplitResult, allowed: Callable[[str], bool], deadline: float) -> socket.socket:
    """Connect to the host of an address, all of whose IP addresses are allowed."""
    assert parts.hostname
    found = socket.getaddrinfo(parts.hostname, _port_of(parts), type=socket.SOCK_STREAM)
    for *_, place in found:
        if not allowed(str(place[0])):
            raise DataError(
                f"{parts.hostname} is at {place[0]}, which is no public address; download it "
                "yourself and give the file"
            )
    # By its number: looked up a second time, the name might have another address.
    host, port = found[0][4][:2]
    connection = socket.create_connection((str(host), port), timeout=_seconds_left(deadline))
    if parts.scheme == "http":
        return connection
    context = ssl.create_default_context()
    return context.wrap_socket(connection, server_hostname=parts.hostname)


def _read_body(
    connection: HTTPConnection, answer: HTTPResponse, deadline: float, most: int
) -> bytes:
    """Return all that the server sends.

    The socket's limit is set again for every piece: a server that sends a byte now and then would
    hold us for ever.
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
            connection.sock.settimeout(_seconds_left(deadline))
        _seconds_left(deadline)
    return bytes(data)


def _seconds_left(deadline: float) -> float:
    """Return the seconds until `deadline`; raise `TimeoutError` after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
