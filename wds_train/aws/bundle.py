"""The code that an instance runs: one object of the committed files and uv, named by its digest."""

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

from wds_train.errors import UsageError
from wds_train.files import home

ROOT = Path(__file__).parents[2]
LOCK = "requirements-uv.lock"  # the version and the digest of uv
# pip takes the wheel for an instance, whatever this machine is, and only with the locked digest.
DOWNLOAD = (
    *("download", "--quiet", "--disable-pip-version-check", "--no-deps"),
    *("--only-binary=:all:", "--platform=manylinux2014_x86_64", "--require-hashes"),
)


def bundle(root: Path = ROOT) -> tuple[bytes, bool]:
    """Pack the committed files and uv's wheel.

    Args:
        root: The repository.

    Returns:
        A gzipped tar, equal for equal commits, and True if there are changes that are not committed
        and so not in it.

    Raises:
        UsageError: `root` is no clone, or uv's wheel cannot be downloaded.
    """
    committed = _git(root, "archive", "--format=tar", "HEAD")
    changed = bool(_git(root, "status", "--porcelain", "--untracked-files=no").strip())

    # An instance starts without uv, and installs everything with it.
    out = io.BytesIO(committed)
    with tarfile.open(fileobj=out, mode="a") as tar:
        for name, wheel in _wheels(root):
            entry = tarfile.TarInfo(f"wheels/{name}")
            entry.size = len(wheel)
            tar.addfile(entry, io.BytesIO(wheel))

    # Without the time in its header, which would give the same code another digest.
    return gzip.compress(out.getvalue(), 6, mtime=0), changed


def key_of(data: bytes) -> tuple[str, str]:
    """Return the bundle's key below the bucket's prefix, and its sha256."""
    digest = hashlib.sha256(data).hexdigest()
    return f"code/{digest[:16]}.tar.gz", digest


def _git(root: Path, *arguments: str) -> bytes:
    try:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(
            f"the code at {root} cannot be packed: git {arguments[0]} failed; launch from a clone"
        ) from error


def _wheels(root: Path) -> list[tuple[str, bytes]]:
    """Return name and bytes of uv's wheel, of the version and digest in LOCK.

    It is kept below .wds/.
    """
    folder = home() / "wheels"
    lock = root / LOCK
    command = [sys.executable, "-m", "pip", *DOWNLOAD, "--dest", str(folder), "-r", str(lock)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"uv's wheel cannot be downloaded: {done.stderr.strip()[-300:]}")

    # The folder may hold wheels of earlier versions.
    version = lock.read_text().split()[0].removeprefix("uv==")
    wheels = []
    for path in sorted(folder.glob(f"uv-{version}-*.whl")):
        wheels.append((path.name, path.read_bytes()))
    return wheels
