"""What a training runs by: the code's revision and the libraries' versions."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

LIBRARIES = ("wds-train", "torch", "torchvision", "timm", "webdataset", "numpy", "pillow")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def revision() -> str:
    """The commit that this code is of, with -dirty where it was changed since; empty where it is of no Git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
