"""Ranges: how they are signed, over which connections they come, and when boto3 has to get them."""

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import pytest
from fault_proxy import FaultProxy

from wds_train.cli import main
from wds_train.dataset.reader import Dataset
from wds_train.errors import Unavailable
from wds_train.storage.base import PART_BYTES
from wds_train.storage.embedded import OPENSSL
from wds_train.storage.open import open_store
from wds_train.storage.ranges import NoAnswer, Ranges
from wds_train.storage.retry import Retry
from wds_train.storage.s3 import S3Store


class Bucket(BaseHTTPRequestHandler):
    """One object in a bucket of eu-central-1 that takes Version 4 alone, signed for its region."""

    protocol_version = "HTTP/1.1"
    # Head and body in one packet, or the client's kernel waits 40 ms before it acknowledges the
    # head.
    wbufsize = -1
    requests: Counter[str]
    silently_closes = False
    content = bytes(range(256)) * 4096

    def setup(self) -> None:
        self.requests["connections"] += 1
        super().setup()

    def do_GET(self) -> None:
        self.requests["all"] += 1
        query = parse_qs(urlsplit(self.path).query)
        signed = self.headers.get("Authorization", "") + "".join(query.get("X-Amz-Credential", []))
        if "AWS4-HMAC-SHA256" not in signed and query.get("X-Amz-Algorithm") != [
            "AWS4-HMAC-SHA256"
        ]:
            self._answer(400, "InvalidRequest", "Please use AWS4-HMAC-SHA256.")
        elif "/eu-central-1/s3/" not in signed:
            self._answer(
                400,
                "AuthorizationHeaderMalformed",
                "the region is wrong",
                "<Region>eu-central-1</Region>",
            )
        else:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            self.requests["ranges"] += 1
            self.send_response(206)
            self.send_header("ETag", '"x"')
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.content)}")
            self._body(self.content[first : last + 1])

    def do_HEAD(self) -> None:
        self.requests["all"] += 1
        self._answer(400, "", "")

    def _answer(self, status: int, code: str, message: str, more: str = "") -> None:
        self.send_response(status)
        self.send_header("x-amz-bucket-region", "eu-central-1")
        self._body(f"<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>".encode())

    def _body(self, data: bytes) -> None:
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.close_connection |= self.silently_closes

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def strict(aws_env: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What was asked of a server that refuses Version 2.

    It also refuses signatures for another region than eu-central-1.
    """
    with served() as server:
        aws_env.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        aws_env.setenv("AWS_ACCESS_KEY_ID", "key")
        aws_env.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield Bucket.requests


@contextlib.contextmanager
def served() -> Iterator[ThreadingHTTPServer]:
    Bucket.requests = Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


RANGES = 10_000


@pytest.mark.parametrize("region", ["eu-central-1", "us-east-1", "eu-west-1"])
def test_a_range_is_one_request(
    region: str, strict: Counter[str], aws_env: pytest.MonkeyPatch
) -> None:
    aws_env.setenv("AWS_DEFAULT_REGION", region)
    store = S3Store("strict", "x")
    count = RANGES if region == "us-east-1" else 100
    store.read("shard.tar", 0, 1)  # learns the bucket's region
    learnt = strict["all"]
    assert learnt <= (1 if region == "eu-central-1" else 5)

    def read(n: int) -> bool:
        target = bytearray(64)
        store.read_into("shard.tar", 64 * n, memoryview(target))
        return target == Bucket.content[64 * n : 64 * n + 64]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(count)))
    assert strict["all"] - learnt == count
    assert store.fallbacks == (region != "eu-central-1")


def test_a_forked_worker_knows_the_region(strict: Counter[str]) -> None:
    store = S3Store("strict", "x")
    store.read("shard.tar", 0, 1)
    learnt = strict["all"]
    if (child := os.fork()) == 0:
        os._exit(store.read("shard.tar", 64, 64) != Bucket.content[64:128])
    assert os.waitpid(child, 0)[1] == 0
    assert strict["all"] - learnt == 1


def test_ranges_that_fall_back_are_counted(
    fault_proxy: FaultProxy,
    s3_url: str,
    digits: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a server that answers no signed address; of workers, too.

    In the benchmark, its table, and a training's log.
    """
    store = open_store(f"{s3_url}/digits")
    for entry in digits.store.list():
        store.write(entry.key, digits.store.read(entry.key))
    bench = [
        "bench",
        "loader",
        "--dataset",
        store.url,
        "--batch",
        "8",
        "--size",
        "32",
        "--repeats",
        "1",
        "--cores",
        "1",
    ]
    assert main([*bench, "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loaders"]["wds-train"]["fallbacks"] == 0
    fault_proxy.fail(
        "status", method="GET", key=".tar", query="X-Amz-Signature", status=400, times=float("inf")
    )
    assert main([*bench, "--workers", "1"]) == 0
    ranges = int(
        re.search(
            r"^(\d+) ranges of wds-train a pass took a second request",
            capsys.readouterr().out,
            re.M,
        )[1]
    )  # type: ignore[index]
    assert ranges >= len(digits.split("train").shard_names)
    train = ["train", "--dataset", store.url, "--run", str(tmp_path / "run"), "--workers", "1"]
    for setting in (
        "model.name=test_resnet",
        "schedule.epochs=1",
        "schedule.warmup_epochs=0",
        "data.size=32",
    ):
        train += ["--set", setting]
    assert main(train) == 0
    assert re.search(r"epoch +1/1 .* \d+ ranges asked for twice\n", capsys.readouterr().err)


# Connections


@pytest.fixture
def near(strict: Counter[str], aws_env: pytest.MonkeyPatch) -> S3Store:
    """A store on the strict server, which knows its region."""
    aws_env.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    return S3Store("strict", "x")


def read_all(store: S3Store) -> bool:
    """Whether four threads that begin at once get what is there."""
    begin = threading.Barrier(4)

    def read(start: int) -> bool:
        begin.wait()
        return store.read("shard.tar", start, 1000) == Bucket.content[start : start + 1000]

    with ThreadPoolExecutor(4) as pool:
        return all(pool.map(read, range(4)))


def test_a_connection_is_used_again(near: S3Store, strict: Counter[str]) -> None:
    for start in range(20):
        near.read("shard.tar", start, 1)
    assert strict == {"connections": 1, "all": 20, "ranges": 20}


def test_a_connection_that_the_server_has_closed_costs_no_pause(
    near: S3Store, strict: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bucket, "silently_closes", True)
    monkeypatch.setattr(Retry, "pause", lambda *_, **__: pytest.fail("a pause"))
    for start in range(5):
        near.read("shard.tar", start, 1)
        time.sleep(0.02)  # until the server has closed it
    assert strict == {"connections": 5, "all": 5, "ranges": 5}
    assert near.fallbacks == 0


def made_clients(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], threading.Event]:
    """Return a list to which every client adds its process, and an event.

    The event is set when a client begins to be made, slowly.
    """
    made: list[int] = []
    begun = threading.Event()
    client = boto3.session.Session.client

    def slow(*args: Any, **kwargs: Any) -> Any:
        made.append(os.getpid())
        begun.set()
        time.sleep(0.2)
        return client(*args, **kwargs)

    monkeypatch.setattr(boto3.session.Session, "client", slow)
    return made, begun


def test_threads_and_forked_processes_make_one_client(
    near: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = made_clients(monkeypatch)
    assert read_all(near)
    if (child := os.fork()) == 0:
        os._exit(0 if read_all(near) and made == [os.getppid()] else 1)
    assert read_all(near)
    assert os.waitpid(child, 0)[1] == 0
    assert made == [os.getpid()]


def test_a_fork_while_a_client_is_made(near: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _, begun = made_clients(monkeypatch)
    reader = threading.Thread(target=near.read, args=("shard.tar", 0, 1))
    reader.start()
    begun.wait()
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(120)  # the end of a child that waits for a thread which it does not have
        near.reconnect()
        os._exit(0 if read_all(near) else 1)
    reader.join()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("setting", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "ca_bundle", ""])
def test_over_tls_the_settings_say_whom_to_trust(
    setting: str, aws_env: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    certificate = tmp_path / "crt"
    key = tmp_path / "key"
    extensions = (
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-addext",
        "basicConstraints=critical,CA:TRUE",
    )
    command = [*OPENSSL.split(), *extensions, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "config").write_text(f"[default]\nca_bundle = {certificate}\n")
    settings = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "eu-central-1",
    }
    settings |= {
        "WDS_S3_PATIENCE": "0",
        "AWS_CONFIG_FILE": str(tmp_path / "config") if setting == "ca_bundle" else "",
    }
    with served() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
            aws_env.delenv(name, raising=False)
        for name, value in (
            settings | ({setting: str(certificate)} if setting.isupper() else {})
        ).items():
            aws_env.setenv(name, value)
        aws_env.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.server_port}")
        store = S3Store("strict", "x")
        if setting:
            assert (
                store.read("shard.tar", 7, 9)
                == store.read("shard.tar", 7, 9)
                == Bucket.content[7:16]
            )
            assert Bucket.requests == {"connections": 1, "all": 2, "ranges": 2}
        else:
            with pytest.raises(
                Unavailable,
                match=r"does not answer \(https://127.0.0.1:\d+: .*certificate verify failed",
            ):
                store.read("shard.tar", 7, 9)


def test_through_a_proxy_boto3_reads(
    near: S3Store, strict: Counter[str], aws_env: pytest.MonkeyPatch
) -> None:
    aws_env.setenv("HTTP_PROXY", os.environ["AWS_ENDPOINT_URL"])
    aws_env.setenv("AWS_ENDPOINT_URL", "http://s3.invalid")
    target = bytearray(9)
    near.read_into("shard.tar", 7, memoryview(target))
    assert target == Bucket.content[7:16]
    assert (strict["all"], near.fallbacks) == (1, 0)


# What a server may answer


@contextlib.contextmanager
def scripted(*pieces: bytes, pause: float = 0.0) -> Iterator[tuple[Ranges, list[bytes]]]:
    """Yield ranges of a server that answers all requests with `pieces`, one by one.

    With them comes what it was asked, an entry for each connection.
    """
    server = socket.create_server(("127.0.0.1", 0))
    asked: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                asked.append(b"")
                connection.settimeout(120)
                threading.Thread(
                    target=answer, args=(connection, len(asked) - 1), daemon=True
                ).start()

    def answer(connection: socket.socket, number: int) -> None:
        with connection, contextlib.suppress(OSError):
            while piece := connection.recv(65536):
                asked[number] += piece
                if asked[number].endswith(b"\r\n\r\n"):
                    for part in pieces:
                        connection.sendall(part)
                        time.sleep(pause)
                    if b"close" in pieces[0]:
                        return

    threading.Thread(target=serve, daemon=True).start()
    keys = {
        "aws_access_key_id": "key",
        "aws_secret_access_key": "secret",
        "region_name": "us-east-1",
    }
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server.getsockname()[1]}", **keys)
    yield Ranges(client, "bucket", 5), asked
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def body_of(ranges: Ranges) -> bytes | None:
    with ranges.get("a.tar", {"Range": "bytes=0-9"}) as answer:
        if answer is None:
            return None
        assert (answer.headers["etag"], answer.left) == ('"x"', 10)
        target = bytearray(12)
        while count := answer.readinto1(memoryview(target)[10 - (answer.left or 0) :]):
            assert count <= 10
        return bytes(target[:10])


HEAD = b'HTTP/1.1 206 Partial Content\r\nETag: "x"\r\nconTENT-length:10\r\n\r\n'
CLOSED = HEAD.replace(b"ETag", b"Connection: close\r\nETag")
OLD = HEAD.replace(b"/1.1", b"/1.0")


@pytest.mark.parametrize(
    ("pieces", "connections"),
    [
        ((HEAD + b"0123456789",), 1),
        ((*(HEAD[n : n + 1] for n in range(len(HEAD))), b"0123", b"456789"), 1),
        ((HEAD + b"0123456789 and what nobody asked for",), 2),
        ((CLOSED + b"0123456789",), 2),
        ((OLD + b"0123456789",), 2),
    ],
    ids=["at once", "in pieces", "too much", "closed", "HTTP/1.0"],
)
def test_a_body_comes_whole_however_it_comes(pieces: tuple[bytes, ...], connections: int) -> None:
    with scripted(*pieces, pause=0.001) as (ranges, asked):
        assert body_of(ranges) == body_of(ranges) == b"0123456789"
        assert len(asked) == connections
        assert asked[0].startswith(b"GET /bucket/a.tar?") or asked[0].startswith(b"GET /a.tar?")
        assert b"\r\nRange: bytes=0-9\r\n" in asked[0]


@pytest.mark.parametrize(
    "answer",
    [
        HEAD.replace(b"206", b"200") + b"0123456789",
        HEAD.replace(b"conTENT-length:10", b"Transfer-Encoding: chunked")
        + b"a\r\n0123456789\r\n0\r\n\r\n",
        HEAD.replace(b"conTENT-length:10", b"Content-Length: -1"),
        HEAD.replace(b"conTENT-length:10", b"Content-Length: " + b"9" * 5000),
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["200", "chunked", "no length", "no number of bytes", "403"],
)
def test_any_other_answer_is_boto3s_to_get(answer: bytes) -> None:
    with scripted(answer) as (ranges, _):
        assert body_of(ranges) is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", r"no answer in HTTP/1.1: 'SSH-2.0-OpenSSH_9.2'"),
        (b"HTTP/1.1 close\r\n\r\n", "no answer in HTTP/1.1"),
        (b"HTTP/1.1 206 OK\r\nX: " + b"a" * 100_000, "a header of over 65536 bytes"),
        (b"HTTP/1.1 206 close", "closed before an answer came"),
    ],
    ids=["another protocol", "no status", "endless", "cut off"],
)
def test_what_is_no_answer_is_named(answer: bytes, message: str) -> None:
    with scripted(answer) as (ranges, _), pytest.raises(NoAnswer, match=message):
        body_of(ranges)


def test_a_shard_goes_up_as_a_tar(s3_url: str) -> None:
    """Or SeaweedFS compresses what begins with a tar's header, for nothing."""
    store = open_store(s3_url)
    told: list[str] = []
    assert isinstance(store, S3Store)
    for verb in ("UploadPart", "PutObject"):
        store.client.meta.events.register(
            f"before-send.s3.{verb}",
            lambda request, **_: told.append(request.headers["Content-Type"].decode()),
        )
    store.write("large.tar", bytes(PART_BYTES + 1))
    store.write("small.tar", b"1")
    assert told == ["application/x-tar"] * 3
    for key in ("large.tar", "small.tar"):
        answer = store.client.head_object(Bucket=store.bucket, Key=f"{store.prefix}/{key}")
        assert answer["ContentType"] == "application/x-tar"
