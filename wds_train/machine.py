"""The cores and the memory that this process may use.

In a container, they are those of its cgroup, not the machine's. Both versions of cgroups are read,
https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1. A group is bounded by its own
limits and by those of all groups above it.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

# Tests put another tree of files in its place.
ROOT = Path("/")
GROUPS = "sys/fs/cgroup"


def cores() -> int:
    """Return how many cores this process may use.

    They are those that it may run on, or as many as its quota is worth, rounded down.
    """
    allowed = len(os.sched_getaffinity(0))
    quota = math.inf
    for folder in _find_folders("cpu"):
        quota = min(quota, _read_quota(folder))
    return max(1, math.floor(min(allowed, quota)))


def memory() -> int:
    """Return how many bytes of memory this process may hold.

    They are the machine's, or what its group is limited to.
    """
    bound = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _find_folders("memory"):
        # The names of version 2 and version 1.
        for name in ("memory.max", "memory.limit_in_bytes"):
            numbers = _read_numbers(folder / name)
            if numbers and numbers[0] > 0:
                bound = min(bound, numbers[0])
    return bound


def _read_quota(folder: Path) -> float:
    """Return the cores that a group's quota is worth; infinite if it has none."""
    # Quota and period. Version 2 writes "max" for no quota, version 1 writes -1.
    numbers = _read_numbers(folder / "cpu.max")
    if not numbers:
        quota = _read_numbers(folder / "cpu.cfs_quota_us")
        numbers = quota + _read_numbers(folder / "cpu.cfs_period_us")
    if len(numbers) != 2 or min(numbers) <= 0:
        return math.inf
    return numbers[0] / numbers[1]


def _find_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of all above it, in both hierarchies.

    Args:
        controller: "cpu" or "memory".
    """
    for line in _read_lines(ROOT / "proc/self/cgroup"):
        # A line is "NUMBER:CONTROLLERS:PATH". Version 2 has one line, of number 0, for all.
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            tops = [ROOT / GROUPS, ROOT / GROUPS / "unified"]
        elif controller in controllers.split(","):
            tops = [ROOT / GROUPS / controllers, ROOT / GROUPS / controller]
        else:
            continue
        # In a container the path may be the host's, of which there is nothing here but the top.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for top in tops:
            for depth in range(len(parts) + 1):
                yield top.joinpath(*parts[:depth])


def _read_numbers(path: Path) -> list[int]:
    """Return the whole numbers of a file's first line; none if it is missing or holds others."""
    lines = _read_lines(path)
    if not lines:
        return []
    try:
        return [int(word) for word in lines[0].split()]
    except ValueError:
        return []


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
