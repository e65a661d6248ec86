"""The embedded S3 server: SeaweedFS, from its PyPI package, on loopback ports.

It serves `s3://embedded/...`, with its data under `.wds/s3`, so that wds-train works without an
account anywhere. `storage.open` starts it.

Commands that need it share one server. Each holds a shared lock on `users.lock` while it lives,
which the kernel drops even on SIGKILL; whoever leaves last, alone on that lock, stops the server.
A server left behind by a killed command is found through `server.json` and used again; one that
no longer answers is replaced. The data needs no care: what SeaweedFS acknowledged survives kill
-9.

Only its S3 port serves, whoever has the keys of `server.json`. Its other ports want keys that the
server alone has, made at each start, and its folder is the user's alone.
"""

import atexit
import contextlib
import fcntl
import json
import logging
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

import boto3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError

from wds_train.errors import UsageError, WdsTrainError
from wds_train.files import home
from wds_train.storage.address import EMBEDDED_BUCKET

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

LOG = logging.getLogger(__name__)
# For a server to answer after its start, or while it is busy.
READY_SECONDS = 60.0
# On the disk, to start a server at all.
MIN_FREE_BYTES = 512 << 20
# A running server keeps so much of the disk free, and refuses writes instead.
RESERVED_BYTES = 256 << 20
# SeaweedFS makes its Unix sockets there, whatever TMPDIR says.
SOCKETS = Path("/tmp")
# What SeaweedFS logs when another program has one of its ports.
PORT_TAKEN = "address already in use"
CERTIFICATE = "tls.crt"
KEY = "tls.key"
OPENSSL = (
    "openssl req -x509 -config /dev/null -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "
    "/CN=wds -days 9999"
)
# SeaweedFS adds it to every port for its gRPC twin.
GRPC_OFFSET = 10_000
# The parts of the server that want certificates from one another.
CERTIFIED_PARTS = (
    "GRPC_MASTER",
    "GRPC_VOLUME",
    "GRPC_FILER",
    "GRPC_S3",
    "GRPC_CLIENT",
    "HTTPS_MASTER",
)


@dataclass(frozen=True)
class Endpoint:
    """The server's address, and the keys to sign with.

    Attributes:
        url: Its address.
        access_key: For signatures.
        secret_key: For signatures.
        ports: Those of its master, volume, filer and S3 parts.
        root: Its folder.
    """

    url: str
    access_key: str
    secret_key: str
    ports: tuple[int, ...]
    root: str

    def is_full(self) -> bool:
        """Return True if its disk has less space than it keeps free.

        It then refuses writes by an internal error.
        """
        return Path(self.root).exists() and shutil.disk_usage(self.root).free < RESERVED_BYTES


# The locks that this process holds on `users.lock` of the servers that it uses.
_held: dict[Path, IO[str]] = {}


def ensure_running(root: Path | None = None) -> Endpoint:
    """Return the endpoint of the server over `root`, which is started if none answers.

    It lives at least as long as this process.

    Args:
        root: The server's folder. Default: `s3` in this machine's home of wds-train.

    Raises:
        WdsTrainError: It cannot be started.
    """
    root = (root or home() / "s3").absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Files of servers before this rule are readable by all.
        root.chmod(0o700)
    except OSError as error:
        raise WdsTrainError(
            f"cannot create {root} for the embedded S3 server: {error.strerror}"
        ) from error
    with _lock_start(root):
        # Held before the look at the server: nobody may stop it between the look and our use.
        _hold(root)
        endpoint = _read(root)
        if endpoint is None or not _serves(endpoint, root):
            _kill(root)
            endpoint = _start(root, endpoint)
    return endpoint


def stop(root: Path | None = None) -> bool:
    """Stop the server over `root`, even if others use it. Return False if none ran."""
    return _kill((root or home() / "s3").absolute())


@contextlib.contextmanager
def _lock_start(root: Path) -> Iterator[None]:
    """Let one process at a time start or stop the server over `root`."""
    with (root / "start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _hold(root: Path) -> None:
    """Use the server over `root` until this process ends."""
    if root not in _held:
        _held[root] = (root / "users.lock").open("w")
        fcntl.flock(_held[root], fcntl.LOCK_SH)
        atexit.register(_leave, root, os.getpid())


def _leave(root: Path, owner: int) -> None:
    """Stop the server over `root`, unless others use it."""
    # A forked child inherits the atexit entry, but must not stop the server.
    if os.getpid() != owner:
        return
    # The folder may be gone by now, and its locks with it: then nobody else can use the server.
    starting: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if root.exists():
        starting = _lock_start(root)
    with contextlib.suppress(BlockingIOError), starting:
        fcntl.flock(_held.pop(root), fcntl.LOCK_EX | fcntl.LOCK_NB)
        _kill(root)


def _read(root: Path) -> Endpoint | None:
    """Return the endpoint of the last server over `root`; None if there is none that is whole."""
    try:
        saved = json.loads((root / "server.json").read_text())
        return Endpoint(**saved | {"ports": tuple(saved["ports"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _serves(endpoint: Endpoint, root: Path) -> bool:
    """Return True if the server runs and answers.

    A busy one gets time: to kill it would fail all who use it now.
    """
    deadline = time.monotonic() + READY_SECONDS
    while pids(root) and time.monotonic() < deadline:
        with contextlib.suppress(OSError, HTTPException):
            if _lists_buckets(endpoint):
                return True
        time.sleep(0.1)
    return False


def _lists_buckets(endpoint: Endpoint) -> bool:
    """Return True if the server lists its buckets for its keys.

    boto3 is not used: to make its client takes a tenth of a second.
    """
    request = AWSRequest("GET", f"{endpoint.url}/")
    credentials = Credentials(endpoint.access_key, endpoint.secret_key)
    S3SigV4Auth(credentials, "s3", "us-east-1").add_auth(request)
    with contextlib.closing(HTTPConnection(urlsplit(endpoint.url).netloc, timeout=5)) as connection:
        connection.request("GET", "/", headers=dict(request.headers))
        return connection.getresponse().status == 200


def _client(endpoint: Endpoint) -> "S3Client":
    session = boto3.session.Session(
        endpoint.access_key, endpoint.secret_key, region_name="us-east-1"
    )
    return session.client(
        "s3",
        endpoint_url=endpoint.url,
        # An HTTP proxy named in the environment must not get what is meant for this machine.
        config=Config(
            connect_timeout=2,
            read_timeout=5,
            retries={"total_max_attempts": 1},
            proxies={},
        ),
    )


def _kill(root: Path) -> bool:
    """End the servers by SIGKILL: SeaweedFS takes 15-25 s for SIGTERM, and loses nothing."""
    found = pids(root)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            process = os.pidfd_open(pid)
            signal.pidfd_send_signal(process, signal.SIGKILL)
            # Wait until its ports and files are free, which takes longer than its name.
            select.select([process], [], [])
            os.close(process)
    return bool(found)


def pids(root: Path) -> list[int]:
    """Return the processes of the servers over `root`, found by their command line.

    A file could name a reused pid, or miss a server whose starter was killed before it wrote the
    file. Two servers over one folder would spoil it.
    """
    mark = f"-dir={root}/data".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if mark in _arguments(path):
            found.append(int(path.parent.name))
    return found


def _arguments(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\0")
    except OSError:  # the process has ended meanwhile
        return []


def _free_ports() -> tuple[int, ...]:
    """Return four free loopback ports with free gRPC twins, below those that the kernel assigns."""
    ports: list[int] = []
    while len(ports) < 4:
        port = 11_000 + secrets.randbelow(11_000)
        if port not in ports and _are_free((port,)):
            ports.append(port)
    return tuple(ports)


def _are_free(ports: tuple[int, ...]) -> bool:
    """Return True if all `ports` and their gRPC twins are free."""
    return all(_is_free(port) and _is_free(port + GRPC_OFFSET) for port in ports)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Connections of the last server may linger.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _start(root: Path, last: Endpoint | None) -> Endpoint:
    """Start a server, on the last one's ports if they are free: its clients then find it again."""
    if shutil.disk_usage(root).free < MIN_FREE_BYTES:
        raise WdsTrainError(
            f"less than {MIN_FREE_BYTES >> 20} MiB are free on the disk of {root}; the embedded "
            "S3 server needs room: free some, or set WDS_HOME to a folder on another disk"
        )
    _refuse_no_sockets()
    LOG.info("starting the embedded S3 server ...")
    (root / "data").mkdir(exist_ok=True)
    if last and _are_free(last.ports):
        return _launch(root, last)

    # Another program may take a port between our look and the server's bind. Three tries are
    # enough.
    for remaining in (2, 1, 0):
        ports = _free_ports()
        endpoint = Endpoint(
            url=f"http://127.0.0.1:{ports[-1]}",
            access_key=secrets.token_hex(10),
            secret_key=secrets.token_hex(20),
            ports=ports,
            root=str(root),
        )
        try:
            return _launch(root, endpoint)
        except WdsTrainError as error:
            if remaining == 0 or PORT_TAKEN not in str(error):
                raise
    raise AssertionError("unreachable")


def _refuse_no_sockets() -> None:
    """Raise `WdsTrainError` if the server cannot make sockets: we would wait for it in vain."""
    try:
        with tempfile.TemporaryFile(dir=SOCKETS):
            pass
    except OSError as error:
        raise WdsTrainError(
            f"nothing can be written in {SOCKETS} ({error.strerror}), where the embedded S3 "
            "server makes its sockets; make it writable (in a container: --tmpfs /tmp), or give a "
            "bucket with --bucket or WDS_BUCKET"
        ) from error


def _launch(root: Path, endpoint: Endpoint) -> Endpoint:
    """Start a server with the ports and keys of `endpoint`, and return that once it answers."""
    # What the server reads, and what other processes find it by.
    keys = {"accessKey": endpoint.access_key, "secretKey": endpoint.secret_key}
    identities = {"identities": [{"name": "wds", "credentials": [keys], "actions": ["Admin"]}]}
    _write_private(root / "identities.json", identities)
    _write_private(root / "server.json", asdict(endpoint))
    command = _command(root, endpoint.ports)
    _certify(root)

    # The server outlives this process if others use it.
    with (root / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=root,
            # A soft limit: with 400 MiB, collecting garbage took a third of the speed of uploads.
            env=os.environ | {"GOMEMLIMIT": "2GiB"} | _locks(),
            # Its Unix sockets in /tmp have no other lock.
            umask=0o077,
            # Ctrl-C must reach only the trainer, which still needs the server to commit.
            start_new_session=True,
        )
    _wait_ready(endpoint, process, root)
    return endpoint


def _certify(root: Path) -> None:
    """Make a key and its certificate, by which the parts of one server know one another."""
    command = [*OPENSSL.split(), "-keyout", KEY, "-out", CERTIFICATE]
    try:
        subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise WdsTrainError(
            "the embedded S3 server needs the program openssl; install it, or set a bucket"
        ) from error
    except subprocess.CalledProcessError as error:
        raise WdsTrainError(
            f"openssl cannot make a certificate in {root}: {error.stderr.strip()}"
        ) from error


def _locks() -> dict[str, str]:
    """Return SeaweedFS's settings for ports that answer only its own parts.

    They are environment variables, not flags, which everybody sees in the process list. The volume
    server's objects need tokens. gRPC wants the certificate from its clients, and so does the
    master's page, which no flag turns off.
    """
    settings = {
        "WEED_JWT_SIGNING_KEY": secrets.token_hex(32),
        "WEED_JWT_SIGNING_READ_KEY": secrets.token_hex(32),
        "WEED_GRPC_CA": CERTIFICATE,
        "WEED_HTTPS_MASTER_CA": CERTIFICATE,
    }
    for part in CERTIFIED_PARTS:
        settings[f"WEED_{part}_CERT"] = CERTIFICATE
        settings[f"WEED_{part}_KEY"] = KEY
    return settings


def _find_program() -> str:
    """Return the path of SeaweedFS's program: this environment's, or another on the PATH."""
    weed = Path(sys.executable).parent / "weed"
    if weed.exists():
        return str(weed)
    program = shutil.which("weed")
    if program is None:
        raise WdsTrainError("the embedded S3 server (weed) is not installed; run `make setup`")
    return program


def _command(root: Path, ports: tuple[int, ...]) -> list[str]:
    """Return the command line of the server. `pids` finds it by the flag `-dir`."""
    program = _find_program()
    master, volume, filer, s3 = ports
    flags = {
        "dir": f"{root}/data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        # The filer's, which takes and gives every object.
        "disableHttp": "true",
        "master.port": master,
        "master.volumeSizeLimitMB": 1024,
        "master.volumePreallocate": "false",
        "master.telemetry": "false",
        "master.electionTimeout": "1s",
        "volume.port": volume,
        # Each bucket takes 7; what they hold is bounded by the disk alone.
        "volume.max": 2000,
        "volume.minFreeSpace": f"{RESERVED_BYTES >> 20}MiB",
        "volume.preStopSeconds": 0,
        "filer.port": filer,
        # The size of its chunks: it reads every chunk whole that a range touches.
        "filer.maxMB": 1,
        "s3.port": s3,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.config": f"{root}/identities.json",
    }
    words = [f"-{name}={value}" for name, value in flags.items()]
    return [program, "-logtostderr", "server", "-s3", *words]


def _wait_ready(endpoint: Endpoint, process: subprocess.Popen[bytes], root: Path) -> None:
    """Wait until the server takes objects, and make its bucket.

    Raises:
        WdsTrainError: It has stopped, met a port in use, or takes too long. It is ended then.
    """
    deadline = time.monotonic() + READY_SECONDS
    client = _client(endpoint)
    while True:
        with contextlib.suppress(BotoCoreError, ClientError):
            _make_bucket(client)
            # Only a byte written proves that the volume server has joined, at times 5 s after all
            # else answers.
            client.put_object(Bucket=EMBEDDED_BUCKET, Key=".ready", Body=b"1")
            client.delete_object(Bucket=EMBEDDED_BUCKET, Key=".ready")
            return

        # It is not ready: look whether it ever can be.
        stopped = process.poll() is not None
        taken = PORT_TAKEN in _log(root)
        if stopped or taken or time.monotonic() > deadline:
            _kill(root)
            what = f"did not answer in {READY_SECONDS:.0f} s"
            if taken:
                what = f"met a port in use ({PORT_TAKEN})"
            elif stopped:
                what = f"stopped with code {process.wait()}"
            raise WdsTrainError(
                f"the embedded S3 server {what}; the end of {root}/server.log:\n{_log_tail(root)}"
            )
        time.sleep(0.1)


def _make_bucket(client: "S3Client") -> None:
    for bucket in client.list_buckets()["Buckets"]:
        if bucket["Name"] == EMBEDDED_BUCKET:
            return
    client.create_bucket(Bucket=EMBEDDED_BUCKET)


def _log(root: Path) -> str:
    return (root / "server.log").read_text(errors="replace")


def _log_tail(root: Path, lines: int = 8) -> str:
    return "\n".join(_log(root).splitlines()[-lines:])


def _write_private(path: Path, content: object) -> None:
    """Write JSON that no other user may read; by rename, so that a kill leaves no half of it."""
    new = path.with_suffix(".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(content, file)
    new.replace(path)


def main() -> None:
    """Run `python -m wds_train.storage.embedded stop`, which is what `make s3-stop` runs."""
    if sys.argv[1:] != ["stop"]:
        raise SystemExit(f"usage: python -m wds_train.storage.embedded stop, not {sys.argv[1:]}")
    result = "no embedded S3 server is running here"
    try:
        if stop():
            result = "stopped the embedded S3 server"
    except UsageError as error:
        raise SystemExit(str(error)) from error
    print(result)


if __name__ == "__main__":
    main()
