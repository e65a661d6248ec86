"""The embedded S3 server: shared, found again, replaced when dead, stopped by the last user."""

import contextlib
import http.client
import itertools
import json
import random
import shutil
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from wds_train.errors import WdsTrainError
from wds_train.storage import embedded
from wds_train.storage.embedded import Endpoint
from wds_train.storage.s3 import S3Store

# A command that uses the server until its input ends.
USER = """
import sys
from wds_train.storage.embedded import ensure_running
print(ensure_running().url, flush=True)
sys.stdin.read()
"""


# What SeaweedFS's servers answer, by its own documentation; `x/known` is the object that the test
# has written.
PATHS = [
    *(
        "/",
        "/ui/index.html",
        "/status",
        "/healthz",
        "/metrics",
        "/stats/counter",
        "/stats/memory",
        "/stats/disk",
    ),
    *(
        "/debug/pprof/",
        "/cluster/status",
        "/cluster/healthz",
        "/dir/status",
        "/dir/assign",
        "/submit",
        "/vol/status",
    ),
    *(
        "/dir/assign?collection=embedded",
        "/col/delete?collection=embedded",
        "/vol/grow?count=1",
        "/vol/vacuum",
    ),
    *(
        "/embedded",
        "/embedded?list-type=2",
        "/embedded/x/known",
        "/x/known",
        "/buckets/",
        "/buckets/embedded/x/",
    ),
    *(
        "/buckets/embedded/x/known",
        "/buckets/embedded/x/known?metadata=true",
        "/buckets/embedded/x/new",
        "/.tus/",
    ),
    "/?Action=ListUsers",
]


@contextlib.contextmanager
def user() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that uses the embedded server, and the URL that it found."""
    process = subprocess.Popen(
        [sys.executable, "-c", USER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


def listening(pid: int) -> tuple[set[tuple[str, int]], set[Path]]:
    """Where a process listens: TCP addresses and Unix sockets."""
    mine = {path.stat().st_ino for path in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path("/proc/net", name).read_text().splitlines()[1:]
    ]
    found = [row[1].split(":") for row in rows if row[3] == "0A" and int(row[9]) in mine]
    hosts = [
        socket.inet_ntoa(struct.pack("=I", int(host, 16))) if len(host) == 8 else host
        for host, _ in found
    ]
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    unix = {Path(row[7]) for row in sockets if row[3] == "00010000" and int(row[6]) in mine}
    return {(host, int(port, 16)) for host, (_, port) in zip(hosts, found, strict=True)}, unix


def stored_as(folder: Path, content: bytes) -> str:
    """Return the name that the volume server keeps `content` under.

    Only the owner of its files can know it.
    """
    ((file, data),) = (
        (path, raw) for path in folder.glob("*.dat") if content in (raw := path.read_bytes())
    )
    cookie, number = struct.unpack_from(">IQ", data, data.index(content) - 20)
    return f"{file.stem.rpartition('_')[2]},{number:x}{cookie:08x}"


def asked(port: int, scheme: str, method: str, path: str) -> int | None:
    """The status of an answer to a stranger; None if there was none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    if scheme == "https":
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=120, context=context)
    try:
        connection.request(method, path, b"overwritten" if method in ("PUT", "POST") else None)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def speaks_grpc(port: int) -> bool:
    """Return True if the port answers the opening of HTTP/2 with its own settings.

    It is tried in the clear, and by TLS without a certificate.
    """
    context = ssl._create_unverified_context()
    context.set_alpn_protocols(["h2"])
    for wrap in (contextlib.nullcontext, context.wrap_socket):
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), 5) as plain,
            wrap(plain) as peer,
        ):
            peer.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
            if peer.recv(9)[3:4] == b"\x04":
                return True
    return False


def test_processes_share_a_server_even_a_killed_one_s_and_the_last_to_leave_stops_it(
    embedded_home: Path,
) -> None:
    root = embedded_home / "s3"
    with user() as (starter, first):
        starter.kill()
    (pid,) = embedded.pids(root)
    with user() as (_, second):
        with user() as (_, third):
            assert first == second == third
        assert embedded.pids(root) == [pid]
    assert embedded.pids(root) == []
    assert (root / "server.json").stat().st_mode & 0o077 == 0


def test_a_server_that_runs_is_asked_without_boto3(
    s3_server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        boto3.session.Session, "client", lambda *_, **__: pytest.fail("a client was made")
    )
    assert embedded.ensure_running(Path(s3_server.root)) == s3_server


def test_a_killed_server_comes_back_where_it_was_with_all_that_it_acknowledged(
    tmp_path: Path,
) -> None:
    first = embedded.ensure_running(tmp_path)
    store = S3Store("embedded", "x", first)
    for i in range(20):
        store.write(f"{i}", b"%d" % i * 10_000)
    assert embedded.stop(tmp_path)  # by SIGKILL
    assert embedded.ensure_running(tmp_path) == first
    assert [store.read(f"{i}") for i in range(20)] == [b"%d" % i * 10_000 for i in range(20)]
    assert embedded.stop(tmp_path)
    assert not embedded.stop(tmp_path)
    with socket.create_server(("127.0.0.1", first.ports[-1])):  # another program took the port
        moved = embedded.ensure_running(tmp_path)
    assert moved.url != first.url
    assert S3Store("embedded", "x", moved).read("19") == b"19" * 10_000
    embedded.stop(tmp_path)


def test_a_damaged_server_file_gives_no_second_server_over_one_folder(tmp_path: Path) -> None:
    embedded.ensure_running(tmp_path)
    (first,) = embedded.pids(tmp_path)
    (tmp_path / "server.json").write_text("{")
    endpoint = embedded.ensure_running(tmp_path)
    (second,) = embedded.pids(tmp_path)
    assert second != first
    assert json.loads((tmp_path / "server.json").read_text())["url"] == endpoint.url
    embedded.stop(tmp_path)


def test_a_port_taken_between_the_look_and_the_bind_costs_a_second_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = embedded._free_ports()
    draws = iter([(*embedded._free_ports()[:3], 0), free])
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        taken = foreign.getsockname()[1]
        monkeypatch.setattr(
            embedded, "_free_ports", lambda: tuple(port or taken for port in next(draws))
        )
        assert embedded.ensure_running(tmp_path).ports == free
    embedded.stop(tmp_path)


def test_a_server_that_cannot_start_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "filerldb2").write_text("not a folder")
    with pytest.raises(
        WdsTrainError,
        match=rf"stopped with code 255; the end of {tmp_path}/server.log:\n(.*\n)*.*filerldb2",
    ):
        embedded.ensure_running(tmp_path)
    assert embedded.pids(tmp_path) == []


def test_a_missing_program_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        WdsTrainError, match="needs the program openssl; install it, or set a bucket"
    ):
        embedded.ensure_running(tmp_path)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(WdsTrainError, match=r"\(weed\) is not installed; run `make setup`"):
        embedded.ensure_running(tmp_path)


def test_a_full_disk_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "MIN_FREE_BYTES", shutil.disk_usage(tmp_path).free * 2)
    with pytest.raises(
        WdsTrainError, match=rf"less than \d+ MiB are free on the disk of {tmp_path}.*WDS_HOME"
    ):
        embedded.ensure_running(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        WdsTrainError, match=rf"cannot create {tmp_path}/file/s3 .*: Not a directory"
    ):
        embedded.ensure_running(tmp_path / "file" / "s3")


def test_only_the_s3_port_serves_and_only_with_keys(tmp_path: Path) -> None:
    """A known object is asked for without keys at every port, by every path that SeaweedFS knows."""
    tmp_path.chmod(0o755)  # as older versions made it
    endpoint = embedded.ensure_running(tmp_path)
    store = S3Store("embedded", "x", endpoint)
    secret = random.Random(0).randbytes(1000)
    store.write("known", secret)
    (pid,) = embedded.pids(tmp_path)
    addresses, sockets = listening(pid)
    assert {port for _, port in addresses} == {
        *endpoint.ports,
        *(port + 10_000 for port in endpoint.ports),
    }
    assert {host for host, _ in addresses} == {"127.0.0.1"}
    assert sockets and all(path.stat().st_mode & 0o077 == 0 for path in sockets)
    file = stored_as(tmp_path / "data", secret)
    paths = [
        f"/{file}",
        f"/dir/lookup?fileId={file}",
        f"/dir/lookup?volumeId={file.partition(',')[0]}",
        *PATHS,
    ]
    ports = sorted(port for _, port in addresses)
    asks = [*itertools.product(ports, ["http"], ["GET", "PUT", "POST", "DELETE"], paths)]
    asks += itertools.product(ports, ["https"], ["GET"], ["/"])
    answered = {ask for ask in asks if (status := asked(*ask)) is not None and status < 400}
    _, volume, filer, s3 = endpoint.ports
    # How much room the disk has, and that they live.
    harmless = {(port, path) for port in (volume, s3) for path in ("/status", "/healthz")}
    assert {(port, path) for port, _, _, path in answered} == harmless
    assert [port for port in ports if speaks_grpc(port)] == []
    program = embedded._command(tmp_path, endpoint.ports)[0]
    command = [program, "filer.cat", f"http://127.0.0.1:{filer}/buckets/embedded/x/known"]
    assert (
        secret
        not in subprocess.run(
            command, check=False, stdout=subprocess.PIPE, cwd="/", timeout=120
        ).stdout
    )
    assert [entry.key for entry in store.list()] == ["known"] and store.read("known") == secret
    assert tmp_path.stat().st_mode & 0o077 == 0
    embedded.stop(tmp_path)
