"""An HTTP proxy on loopback that breaks S3 in the ways in which it breaks, and counts what passes.

It forwards requests unchanged (the signed Host header included) to one server, and applies to each the first `Fault`
that matches. It runs in a thread, so that subprocesses can use it and the test can read its counters.
"""

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

PIECE = 1 << 16

Kind = Literal[
    "reset",
    "status",
    "hang",
    "stall",
    "truncate",
    "drip",
    "flip",
    "flip_up",
    "lost_ack",
    "strip",
    "equal_parts",
]


@dataclass
class Fault:
    """What to do to requests of `method` whose key contains `key`, `times` times, to the `share` drawn by the seed. With
    `header`, a pattern, only to those that have such a header.

    reset: the connection dies, after `after` bytes of the answer's body (before the request is sent on, if 0).
    status: the server is not asked; `status` and `code` are the answer.
    hang: the server is not asked, and the connection stays open without an answer.
    stall: the answer's body stops after `after` bytes and the connection stays open.
    truncate: the answer's body ends after `after` bytes, and the connection with it.
    drip: the answer's body comes at one byte each `pause` seconds after `after` bytes.
    flip, flip_up: one bit of the answer's body, or of the request's, is wrong: in the byte `after`.
    lost_ack: the server does what was asked; the connection dies before its answer.
    strip: the headers that match `header` do not reach the server; the request is signed anew without them.
    equal_parts: an upload whose parts, but for the last, are not of one length is answered as by `status`.
    """

    kind: Kind
    method: str = ""
    key: str = ""
    query: str = ""
    after: int = 0
    times: float = 1
    share: float = 1.0
    status: int = 503
    code: str = "SlowDown"
    pause: float = 0.05
    header: str = ""
    message: str = "injected"
    headers: str = ""  # more lines of an answer's head

    def matches(self, method: str, key: str, query: str, head: bytes) -> bool:
        has_header = not self.header or self.lines.search(head)
        asked = self.method in ("", method) and self.key in key and self.query in query
        return self.times > 0 and asked and bool(has_header)

    @property
    def lines(self) -> re.Pattern[bytes]:
        """The lines of a request's head that `header` means."""
        return re.compile(rb"(?i)\r\n(%s): *[^\r]*" % self.header.encode())


class _Broken(Exception):
    """The connection is to be cut here."""


class FaultProxy:
    """`requests`, `sent`, `received`: requests, and bytes of bodies to and from the client, by (method, key). `heads`: those of
    each request and of its answer. `parts`: the lengths of parts, by upload and number.

    `accepted`: the access keys of clients, of which the server itself knows none: whoever signs with another gets `denial`.

    `port` is the server's own, `keys` what it knows its clients by. A key is the path without its bucket; a bucket's own requests (listings) have the key "".
    """

    def __init__(self, port: int, seed: int = 0, keys: tuple[str, str] = ("", "")) -> None:
        self.faults: list[Fault] = []
        self.requests: Counter[tuple[str, str]] = Counter()
        self.sent: Counter[tuple[str, str]] = Counter()
        self.received: Counter[tuple[str, str]] = Counter()
        self.heads: list[tuple[bytes, bytes]] = []
        self.port, self.keys = port, keys
        self.parts: dict[str, dict[int, int]] = {}
        self.accepted: set[str] | None = None
        self.denial = Fault(
            "status", status=400, code="ExpiredToken", message="The provided token has expired."
        )
        self.signers: Counter[str] = Counter()
        self._draws = random.Random(seed)
        self._tasks: set[asyncio.Task[None] | None] = set()  # asyncio keeps none alive that waits
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20), self._loop
        ).result()
        self.url = "http://127.0.0.1:{1}".format(*self._server.sockets[0].getsockname())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def fail(self, kind: Kind, **details: object) -> Fault:
        fault = Fault(kind, **details)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def count(self, method: str = "", key: str = "") -> int:
        """The requests of `method` whose key contains `key`."""
        return sum(n for (m, k), n in self.requests.items() if method in ("", m) and key in k)

    def bytes_sent(self, key: str = "") -> int:
        """The bytes of bodies that clients got by GET of keys that contain `key`."""
        return sum(n for (m, k), n in self.sent.items() if m == "GET" and key in k)

    async def _close(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _draw(self, method: str, key: str, query: str, head: bytes) -> Fault | None:
        for fault in self.faults:
            if not fault.matches(method, key, query, head) or self._draws.random() >= fault.share:
                continue
            if fault.kind == "equal_parts" and not self._is_unequal(query):
                continue
            fault.times -= 1
            return fault
        return None

    def _note_part(self, method: str, query: str, head: bytes) -> None:
        asked = parse_qs(query)
        if method == "PUT" and "partNumber" in asked:
            lengths = re.findall(rb"(?i)\r\n(?:x-amz-decoded-)?content-length: *(\d+)", head)
            parts = self.parts.setdefault(asked["uploadId"][0], {})
            parts[int(asked["partNumber"][0])] = min(map(int, lengths))

    def _is_unequal(self, query: str) -> bool:
        parts = self.parts.get(parse_qs(query).get("uploadId", [""])[0], {})
        *lengths, last = [parts[number] for number in sorted(parts)] or [0]
        return len({*lengths}) > 1 or any(last > length for length in lengths)

    async def _serve(
        self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter
    ) -> None:
        server_out = None
        self._tasks.add(task := asyncio.current_task())
        try:
            server_in, server_out = await asyncio.open_connection(
                "127.0.0.1", self.port, limit=1 << 20
            )
            while True:
                await self._exchange(client_in, client_out, server_in, server_out)
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            pass
        except _Broken as broken:
            if broken.args[0] != "truncate":
                linger = struct.pack("ii", 1, 0)  # closing sends RST, not FIN
                client_out.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, linger
                )
        finally:
            for end in (client_out, server_out):
                if end is not None:
                    end.close()
                    with contextlib.suppress(OSError, asyncio.CancelledError):
                        await end.wait_closed()
            self._tasks.discard(task)

    async def _exchange(
        self,
        client_in: asyncio.StreamReader,
        client_out: asyncio.StreamWriter,
        server_in: asyncio.StreamReader,
        server_out: asyncio.StreamWriter,
    ) -> None:
        """One request and its answer."""
        head = await client_in.readuntil(b"\r\n\r\n")
        method, target = head.split(b" ", 2)[:2]
        address = urlsplit(target.decode())
        what = method.decode(), unquote(address.path).lstrip("/").partition("/")[2]
        self.requests[what] += 1
        self._note_part(what[0], address.query, head)
        fault = self._draw(*what, address.query, head)
        if self.accepted is not None:
            signer = _signer(head)
            self.signers[signer] += 1
            if signer not in self.accepted:
                await self._refuse(self.denial, head, client_in, client_out)
                return
            head = self._signed(head)
        if fault and fault.kind == "reset" and not fault.after:
            raise _Broken("reset")
        if fault and fault.kind == "hang":
            await asyncio.sleep(3600)
        if fault and fault.kind == "strip":
            head = self._signed(fault.lines.sub(b"", head))
        if fault and fault.kind in ("status", "equal_parts"):
            await self._refuse(fault, head, client_in, client_out)
            return
        server_out.write(head)
        # Nobody gives leave to send an empty body.
        if re.search(rb"(?i)\r\nexpect: *100", head) and not re.search(
            rb"(?i)\r\ncontent-length: *0\r", head
        ):
            client_out.write(await server_in.readuntil(b"\r\n\r\n"))
        done = 0
        async for piece in _body(head, client_in):
            flip = fault and fault.kind == "flip_up" and 0 <= fault.after - done < len(piece)
            server_out.write(_flip(piece, fault.after - done) if fault and flip else piece)
            await server_out.drain()
            done += len(piece)
        self.received[what] += done
        answer = await server_in.readuntil(b"\r\n\r\n")
        self.heads.append((head, answer))
        body = _body(answer, server_in) if method != b"HEAD" else _nothing()
        if fault and fault.kind == "lost_ack":
            raise _Broken("lost_ack")
        client_out.write(answer)
        done = 0
        async for whole in body:
            for piece in _cut(whole, fault.after - done) if fault else [whole]:
                if fault and done >= fault.after:
                    piece = await _spoil(fault, piece, client_out, done == fault.after)  # noqa: PLW2901
                self.sent[what] += len(
                    piece
                )  # before the write: the client may have it, and the test look, at once
                client_out.write(piece)
                await client_out.drain()
                done += len(piece)

    def _signed(self, head: bytes) -> bytes:
        """The request with a signature of its own: the client's was of the headers that are gone."""
        first, *lines = head.decode().split("\r\n\r\n")[0].split("\r\n")
        method, target = first.split(" ")[:2]
        headers = dict(line.split(": ", 1) for line in lines)
        headers.pop("Authorization", "")
        headers.setdefault(
            "X-Amz-Content-SHA256", "UNSIGNED-PAYLOAD"
        )  # of an address signed in its query
        path, _, query = target.partition("?")
        kept = [each for each in query.split("&") if each and not each.startswith("X-Amz-")]
        target = "?".join([path, "&".join(kept)] if kept else [path])
        request = AWSRequest(method, f"http://{headers['Host']}{target}", headers=headers)
        _SameBody(Credentials(*self.keys), "s3", "us-east-1").add_auth(request)
        told = [first, *(f"{name}: {value}" for name, value in request.headers.items()), "", ""]
        return "\r\n".join(told).encode()

    async def _refuse(
        self,
        fault: Fault,
        head: bytes,
        client_in: asyncio.StreamReader,
        client_out: asyncio.StreamWriter,
    ) -> None:
        if not re.search(
            rb"(?i)\r\nexpect: *100", head
        ):  # who waits for leave to send a body will not send it
            async for _ in _body(head, client_in):
                pass
        xml = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>{fault.message}</Message></Error>".encode()
        client_out.write(
            b"HTTP/1.1 %d Injected%s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n"
            % (fault.status, fault.headers.encode(), len(xml))
            + (b"" if head.startswith(b"HEAD") else xml)
        )
        await client_out.drain()


def _signer(head: bytes) -> str:
    """The access key that a request is signed with, in its headers or its query."""
    found = re.search(rb"Credential=([^/%]+)(?:/|%2F)", head)
    return found[1].decode() if found else ""


class _SameBody(S3SigV4Auth):
    """A signature over the digest of the body that the request names, whatever that is."""

    def payload(self, request: AWSRequest) -> str:
        return self._named

    def _modify_request_before_signing(self, request: AWSRequest) -> None:
        self._named = request.headers["X-Amz-Content-SHA256"]
        super()._modify_request_before_signing(request)


async def _nothing():
    return
    yield b""


async def _body(head: bytes, stream: asyncio.StreamReader):
    """The body after `head`, as it is on the wire."""
    if re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
        size = -1
        while size:
            line = await stream.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line + (await stream.readexactly(size + 2) if size else b"")
        while True:
            trailer = await stream.readuntil(b"\r\n")
            yield trailer
            if trailer == b"\r\n":
                return
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    left = (
        int(length[1]) if length and not head.startswith((b"HTTP/1.1 204", b"HTTP/1.1 304")) else 0
    )
    while left:
        piece = await stream.read(min(left, PIECE))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        yield piece


def _cut(piece: bytes, at: int) -> list[bytes]:
    return [piece[:at], piece[at:]] if 0 < at < len(piece) else [piece]


async def _spoil(fault: Fault, piece: bytes, out: asyncio.StreamWriter, first: bool) -> bytes:
    """What goes out in place of `piece`, all of which lies past `fault.after`."""
    if fault.kind in ("reset", "truncate"):
        raise _Broken(fault.kind)
    if fault.kind == "stall":
        await asyncio.sleep(3600)
    if fault.kind == "drip":
        for byte in piece:
            out.write(bytes([byte]))
            await out.drain()
            await asyncio.sleep(fault.pause)
        return b""
    if fault.kind == "flip" and first:
        return _flip(piece, 0)
    return piece


def _flip(piece: bytes, at: int) -> bytes:
    return piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
