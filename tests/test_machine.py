"""A container's cores and memory are those of its cgroup, of either version.

Workers and threads follow them.
"""

import argparse
import os
from pathlib import Path

import pytest

from wds_train import machine as limits
from wds_train.conversion import command as make_shards
from wds_train.loader.workers import default_workers, limit_threads, own_cores
from wds_train.machine import cores, memory
from wds_train.slurm import OTHERS

V2 = "0::/\n"
GIB = 1 << 30
DEEP = "0::/kubepods/pod1/box\n"
V1 = "4:memory:/docker/box\n3:cpu,cpuacct:/docker/box\n2:cpuset:/\n1:name=systemd:/\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One of 16 cores, without limits, whose /proc and /sys are in `tmp_path`."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in {"LOCAL_WORLD_SIZE", *OTHERS}:
            monkeypatch.delenv(name)
    return monkeypatch


def write(root: Path, groups: str, files: dict[str, str]) -> None:
    for name, text in (
        {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{name}": files[name] for name in files}
    ).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, 16),
        (V2, {}, 16),
        (V2, {"cpu.max": "max 100000\n"}, 16),
        (V2, {"cpu.max": "200000 100000\n"}, 2),
        (V2, {"cpu.max": "250000 100000\n"}, 2),
        (V2, {"cpu.max": "50000 100000\n"}, 1),
        (V2, {"cpu.max": "6400000 100000\n"}, 16),
        (V2, {"cpu.max": "nonsense\n"}, 16),
        (V2, {"cpu.max": ""}, 16),
        (V2, {"cpu.max": "100000 0"}, 16),
        # The smallest of the group's and of those above it.
        (
            DEEP,
            {"kubepods/pod1/box/cpu.max": "max 100000", "kubepods/pod1/cpu.max": "300000 100000"},
            3,
        ),
        (
            DEEP,
            {"kubepods/pod1/box/cpu.max": "500000 100000", "kubepods/cpu.max": "800000 100000"},
            5,
        ),
        # The path is the host's, and the container sees its own group at the top.
        (DEEP, {"cpu.max": "400000 100000"}, 4),
        ("0::/../../other\n", {"cpu.max": "400000 100000"}, 4),
        (
            V1,
            {
                "cpu/docker/box/cpu.cfs_quota_us": "300000",
                "cpu/docker/box/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            V1,
            {"cpu,cpuacct/cpu.cfs_quota_us": "150000", "cpu,cpuacct/cpu.cfs_period_us": "50000"},
            3,
        ),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        (V1, {"cpu/cpu.cfs_quota_us": "200000"}, 16),
        # Both at a time: the unified hierarchy beside the older one.
        (V1 + V2, {"unified/cpu.max": "200000 100000"}, 2),
        (V1 + V2, {"cpu/cpu.cfs_quota_us": "700000", "cpu/cpu.cfs_period_us": "100000"}, 7),
    ],
)
def test_the_quota_of_a_group_counts(
    machine: pytest.MonkeyPatch, tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    write(tmp_path, groups, files)
    assert cores() == expected
    assert default_workers() == max(1, expected - 1)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {}, 64 * GIB),
        (V2, {"memory.max": "max\n"}, 64 * GIB),
        (V2, {"memory.max": f"{2 * GIB}\n"}, 2 * GIB),
        (V2, {"memory.max": f"{100 * GIB}"}, 64 * GIB),
        (V2, {"memory.max": "lots"}, 64 * GIB),
        (
            DEEP,
            {"kubepods/pod1/box/memory.max": "max", "kubepods/pod1/memory.max": f"{8 * GIB}"},
            8 * GIB,
        ),
        (V1, {"memory/docker/box/memory.limit_in_bytes": f"{3 * GIB}"}, 3 * GIB),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712"}, 64 * GIB),
        (V1, {"memory/memory.limit_in_bytes": f"{5 * GIB}", "memory.max": f"{1 * GIB}"}, 5 * GIB),
    ],
)
def test_the_memory_of_a_group_counts(
    machine: pytest.MonkeyPatch, tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    machine.setattr(
        os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * GIB // 4096}.__getitem__
    )
    write(tmp_path, groups, files)
    assert memory() == expected


def test_processes_of_a_conversion_follow_the_quota(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(tmp_path, V2, {"cpu.max": "300000 100000"})
    parser = argparse.ArgumentParser()
    make_shards.add_arguments(parser)
    assert parser.parse_args(["digits", "there"]).processes == 3
    assert parser.parse_args(["digits", "there", "--processes", "9"]).processes == 9


@pytest.mark.parametrize(
    ("variables", "quota", "expected"),
    [
        ({}, "300000", 3),
        ({}, "max", 8),
        ({"LOCAL_WORLD_SIZE": "3"}, "600000", 2),
        ({"OMP_NUM_THREADS": "6"}, "300000", 8),  # which PyTorch has read by itself
    ],
)
def test_pytorch_takes_no_more_threads_than_cores(
    machine: pytest.MonkeyPatch,
    tmp_path: Path,
    variables: dict[str, str],
    quota: str,
    expected: int,
) -> None:
    threads = [8]
    machine.setattr("torch.get_num_threads", lambda: threads[-1])
    machine.setattr("torch.set_num_threads", threads.append)
    machine.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in variables.items():
        machine.setenv(name, value)
    write(tmp_path, V2, {"cpu.max": f"{quota} 100000"})
    limit_threads()
    limit_threads()
    assert threads == ([8] if expected == 8 else [8, expected])
    assert own_cores() == (
        16
        if quota == "max"
        else int(quota) // 100000 // int(variables.get("LOCAL_WORLD_SIZE", "1"))
    )
