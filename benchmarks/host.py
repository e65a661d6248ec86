"""The machine and the versions that a benchmark's figures belong to.

It imports no PyTorch, which would add to the memory that `benchmarks.scale` measures.
"""

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path


def machine() -> str:
    """Return the name of this machine's processor, and the number of its CPUs."""
    names = []
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            names.append(line.partition(": ")[2])
    if not names:  # as on ARM
        return platform.processor()
    return f"{names[0]}, {len(names)} CPUs"


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of installed packages, by their names on PyPI."""
    return {name: version(name) for name in packages}


def list_versions(versions: Mapping[str, str], separator: str = ", ") -> str:
    """Return packages and their versions as a line of text."""
    return separator.join([f"{name} {number}" for name, number in versions.items()])
