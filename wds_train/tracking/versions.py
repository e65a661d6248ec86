"""Versions of the code and of the libraries that a training uses."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

LIBRARIES = ("wds-train", "torch", "torchvision", "timm", "webdataset", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def revision() -> str:
    """Return the commit of this code, with -dirty if it was changed; "" outside Git."""
    folder = str(Path(__file__).parent)
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    command = ["git", "-C", folder, *describe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
