"""What this process may use of its machine: a container's cores and memory are those of its cgroup, not the machine's.

Both versions of cgroups are read, https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1. A group is bounded by
its own limits and by those of all groups above it.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
GROUPS = "sys/fs/cgroup"


def cores() -> int:
    """Return how many cores this process may use: those it may run on, or as many as its quota is worth, rounded down."""
    allowed = len(os.sched_getaffinity(0))
    quota = min((_quota(folder) for folder in _folders("cpu")), default=math.inf)
    return max(1, math.floor(min(allowed, quota)))


def memory() -> int:
    """Return how many bytes of memory this process may hold: the machine's, or what its group is limited to."""
    bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            bounds += [number for number in _numbers(folder / name)[:1] if number > 0]
    return min(bounds)


def _quota(folder: Path) -> float:
    """The cores that a group's quota is worth; infinite where it has none."""
    numbers = _numbers(folder / "cpu.max")  # quota and period; "max" for no quota
    if not numbers:
        numbers = _numbers(folder / "cpu.cfs_quota_us") + _numbers(
            folder / "cpu.cfs_period_us"
        )  # -1 for no quota
    if len(numbers) != 2 or min(numbers) <= 0:
        return math.inf
    return numbers[0] / numbers[1]


def _folders(controller: str) -> Iterator[Path]:
    """The folders of this process's group and of all above it, in both versions' hierarchies."""
    for line in _lines(ROOT / "proc/self/cgroup"):
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


def _numbers(path: Path) -> list[int]:
    """The whole numbers of a file's first line; none where it is not there, or says anything else."""
    words = (_lines(path) or [""])[0].split()
    try:
        return [int(word) for word in words]
    except ValueError:
        return []


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
