"""The embedded S3 server: SeaweedFS, from its PyPI package, on loopback ports, its data under `.wds/s3`.

Commands that need it share one server. Each holds a shared lock on `users.lock` while it lives, which the kernel drops
even on SIGKILL; whoever leaves last, alone on that lock, stops the server. A server left behind by a killed command is
found through `server.json` and used again; one that no longer answers is replaced. The data needs no care: what
SeaweedFS acknowledged survives kill -9.
"""

import atexit
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from wds_train.errors import UsageError, WdsTrainError

READY_SECONDS = 60.0
GRPC_OFFSET = 10_000  # SeaweedFS adds it to every port for its gRPC twin


@dataclass(frozen=True)
class Endpoint:
    """Where the server is and how to sign for it; `pid` is the server process."""

    url: str
    access_key: str
    secret_key: str
    pid: int


def home() -> Path:
    """The folder of this machine's state: $WDS_HOME, or `.wds` in the current folder."""
    return Path(os.environ.get("WDS_HOME", ".wds")).absolute()


_held: dict[Path, IO[str]] = {}


def ensure_running(root: Path | None = None) -> Endpoint:
    """The endpoint of the server over `root`, started if none answers. It lives at least as long as this process."""
    root = (root or home() / "s3").absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WdsTrainError(f"cannot create {root} for the embedded S3 server: {error.strerror}") from error
    with _starting(root):
        _hold(root)
        endpoint = _read(root)
        if endpoint is None or not _answers(endpoint):
            _kill(endpoint, root)
            endpoint = _start(root)
    return endpoint


def stop(root: Path | None = None) -> bool:
    """Stop the server over `root` whoever uses it; False if none ran."""
    root = (root or home() / "s3").absolute()
    endpoint = _read(root) if root.exists() else None
    return _kill(endpoint, root)


@contextlib.contextmanager
def _starting(root: Path) -> Iterator[None]:
    with (root / "start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _hold(root: Path) -> None:
    if root not in _held:
        _held[root] = (root / "users.lock").open("w")
        fcntl.flock(_held[root], fcntl.LOCK_SH)
        atexit.register(_leave, root, os.getpid())


def _leave(root: Path, owner: int) -> None:
    if os.getpid() != owner:  # a forked child inherits the atexit entry, but the server is not its to stop
        return
    with _starting(root), contextlib.suppress(BlockingIOError):
        fcntl.flock(_held.pop(root), fcntl.LOCK_EX | fcntl.LOCK_NB)
        _kill(_read(root), root)


def _read(root: Path) -> Endpoint | None:
    try:
        return Endpoint(**json.loads((root / "server.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _answers(endpoint: Endpoint) -> bool:
    """Whether *our* server is there: a signed request tells it from another program that took the port since."""
    try:
        _client(endpoint).list_buckets()
        return True
    except (BotoCoreError, ClientError):
        return False


def _client(endpoint: Endpoint):  # type: ignore[no-untyped-def]
    return boto3.session.Session(endpoint.access_key, endpoint.secret_key, region_name="us-east-1").client(
        "s3",
        endpoint_url=endpoint.url,
        config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1, "mode": "standard"}),
    )


def _kill(endpoint: Endpoint | None, root: Path) -> bool:
    """SIGKILL: SeaweedFS takes 15-25 s over SIGTERM and loses nothing either way. A reused pid is left alone."""
    if endpoint is None or not _is_weed(endpoint.pid, root):
        return False
    os.kill(endpoint.pid, signal.SIGKILL)
    while _is_weed(endpoint.pid, root):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(endpoint.pid, os.WNOHANG)
        time.sleep(0.02)
    return True


def _is_weed(pid: int, root: Path) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return f"-dir={root}/data".encode() in command


def _free_ports() -> list[int]:
    """Four free loopback ports whose gRPC twins are free too, below the range the kernel hands out by itself."""
    ports: list[int] = []
    while len(ports) < 4:
        port = 11_000 + secrets.randbelow(11_000)
        if port not in ports and _is_free(port) and _is_free(port + GRPC_OFFSET):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _start(root: Path) -> Endpoint:
    if shutil.disk_usage(root).free < 1 << 30:
        raise WdsTrainError(
            f"less than 1 GiB is free on the disk of {root}; the embedded S3 server needs room: free some"
        )
    (root / "data").mkdir(exist_ok=True)
    # Another program may take a port between our look and the server's bind; three draws make that a non-event.
    for remaining in (2, 1, 0):
        try:
            return _launch(root, _free_ports())
        except WdsTrainError as error:
            if remaining == 0 or "address already in use" not in str(error):
                raise
    raise AssertionError("unreachable")


def _launch(root: Path, ports: list[int]) -> Endpoint:
    access, secret = secrets.token_hex(10), secrets.token_hex(20)
    identities = {
        "identities": [
            {"name": "wds", "credentials": [{"accessKey": access, "secretKey": secret}], "actions": ["Admin"]}
        ]
    }
    _write_private(root / "identities.json", identities)
    with (root / "server.log").open("wb") as log:
        process = subprocess.Popen(
            _command(root, ports),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=root,
            env=os.environ | {"GOMEMLIMIT": "400MiB"},
            start_new_session=True,  # Ctrl-C must reach the trainer alone, which still needs the server to commit
        )
    endpoint = Endpoint(f"http://127.0.0.1:{ports[3]}", access, secret, process.pid)
    _write_private(root / "server.json", asdict(endpoint))
    _wait_ready(endpoint, process, root)
    return endpoint


def _command(root: Path, ports: list[int]) -> list[str]:
    master, volume, filer, s3 = ports
    weed = Path(sys.executable).parent / "weed"
    program = str(weed) if weed.exists() else shutil.which("weed")
    if program is None:
        raise WdsTrainError("the embedded S3 server (weed) is not installed; run `make setup`")
    flags = {
        "dir": f"{root}/data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.port": master,
        "master.volumeSizeLimitMB": 1024,
        "master.volumePreallocate": "false",
        "master.telemetry": "false",
        "master.electionTimeout": "1s",
        "volume.port": volume,
        "volume.max": 0,
        "volume.preStopSeconds": 0,
        "filer.port": filer,
        "s3.port": s3,
        "s3.port.iceberg": 0,
        "s3.config": f"{root}/identities.json",
    }
    return [program, "-logtostderr", "server", "-s3", *(f"-{name}={value}" for name, value in flags.items())]


def _wait_ready(endpoint: Endpoint, process: subprocess.Popen[bytes], root: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        with contextlib.suppress(BotoCoreError, ClientError):
            # The first write proves that the volume server has joined, which a listing does not.
            client = _client(endpoint)
            if "embedded" not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket="embedded")
            client.put_object(Bucket="embedded", Key=".ready", Body=b"")
            client.delete_object(Bucket="embedded", Key=".ready")
            return
        if process.poll() is not None or time.monotonic() > deadline:
            what = (
                f"stopped with code {process.returncode}"
                if process.poll() is not None
                else f"did not answer in {READY_SECONDS:.0f} s"
            )
            _kill(endpoint, root)
            raise WdsTrainError(f"the embedded S3 server {what}; the end of {root}/server.log:\n{_log_tail(root)}")
        time.sleep(0.1)


def _log_tail(root: Path, lines: int = 8) -> str:
    return "\n".join((root / "server.log").read_text(errors="replace").splitlines()[-lines:])


def _write_private(path: Path, content: object) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        json.dump(content, file)


def main() -> None:
    """`python -m wds_train.devserver stop`: what `make s3-stop` runs."""
    if sys.argv[1:] != ["stop"]:
        raise SystemExit(f"usage: python -m wds_train.devserver stop, not {sys.argv[1:]}")
    try:
        print("stopped the embedded S3 server" if stop() else "no embedded S3 server is running here")
    except UsageError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
