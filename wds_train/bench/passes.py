"""One pass of a loader in a process of its own: its rates, CPU time and memory. `python -m wds_train.bench.passes` is that
process.
"""

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from wds_train.bench.peers import CONTENDERS, Pass, image_count, write_copy
from wds_train.errors import WdsTrainError

PASS_SECONDS = 1800  # a pass that takes longer hangs
LOOK_SECONDS = 0.2  # between looks at the memory: each stops the process that is looked at for a moment


def in_child(task: str, name: str, wanted: Pass, cores: list[int], environment: dict[str, str]) -> dict[str, float]:
    """The figures of `task` (`copy` or `measure`), done by a fresh process on `cores`, with the memory of its workers."""
    with tempfile.TemporaryDirectory(dir=wanted.cache) as folder:
        what = json.dumps(asdict(replace(wanted, cache=folder)))
        command = [sys.executable, "-m", "wds_train.bench.passes", task, name, what]
        with (Path(folder) / "out").open("w+") as out, (Path(folder) / "err").open("w+") as err:
            with _pinned(cores if task == "measure" else None):
                child = subprocess.Popen(
                    command, stdout=out, stderr=err, env=environment | {"HF_HOME": folder}, start_new_session=True
                )
            try:
                memory = _watch(child)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # also what a loader left behind
                code = child.wait()
            if code:
                err.seek(0)
                raise WdsTrainError(f"{name} failed with code {code}: {cause(err.read())}")
            out.seek(0)
            return json.loads(out.read().splitlines()[-1]) | memory


@contextlib.contextmanager
def _pinned(cores: list[int] | None) -> Iterator[None]:
    """Within, a process that is started may use only `cores`, and so may all threads of its libraries."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _watch(child: subprocess.Popen[bytes]) -> dict[str, float]:
    """Wait for the child; the most memory that its descendants took together, in MB. PSS counts a page that n
    processes share as 1/n of a page for each, RSS counts it n times.
    """
    most, deadline = {"workers_pss_mb": 0.0, "workers_rss_mb": 0.0}, time.monotonic() + PASS_SECONDS
    while child.poll() is None:
        if time.monotonic() > deadline:
            raise WdsTrainError(f"it did not finish in {PASS_SECONDS} s")
        pss, rss = (sum(column) for column in zip((0, 0), *map(_memory, _descendants(child.pid)), strict=True))
        most = {"workers_pss_mb": max(most["workers_pss_mb"], pss), "workers_rss_mb": max(most["workers_rss_mb"], rss)}
        time.sleep(LOOK_SECONDS)
    return most


def _descendants(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return children + [below for child in children for below in _descendants(child)]


def _memory(pid: int) -> tuple[float, float]:
    """PSS and RSS in MB; nothing for a process that has ended."""
    with contextlib.suppress(OSError):
        fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        return tuple(int(fields[name].split()[0]) * 1024 / 1e6 for name in ("Pss", "Rss"))  # type: ignore[return-value]
    return 0.0, 0.0


def cause(stderr: str) -> str:
    """The line that says what went wrong: a traceback's exception, or else the last one."""
    lines = [line for line in stderr.splitlines() if line.strip()] or ["nothing was printed"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception): ", line)), lines[-1])


def measure(name: str, wanted: Pass) -> dict[str, float]:
    """Make one pass in this process; imports are not counted."""
    for module in CONTENDERS[name].modules:
        importlib.import_module(module)
    cpu, began = _cpu_seconds(), time.perf_counter()
    loader = CONTENDERS[name].batches(wanted)
    opened = time.perf_counter()
    first, images = 0.0, 0
    for batch in loader:
        first = first or time.perf_counter()
        images += image_count(batch)
    ended = time.perf_counter()
    if not images:
        raise WdsTrainError(f"{name} yielded no images")
    fallbacks = getattr(loader, "fallbacks", 0)  # of ours alone: no other loader has signed addresses to fall back from
    del loader
    gc.collect()  # ends the workers: the kernel counts a child's CPU time only when it has ended
    for worker in multiprocessing.active_children():
        worker.join(30)
    return {
        "images": images,
        "fallbacks": fallbacks,
        "img_per_s": images / (ended - opened),
        "open_s": opened - began,
        "first_batch_s": first - began,
        "cpu_ms_per_img": 1e3 * (_cpu_seconds() - cpu) / images,
    }


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _child_main() -> None:
    task, name, wanted = sys.argv[1], sys.argv[2], Pass(**json.loads(sys.argv[3]))
    if task == "copy":
        write_copy(name, wanted)
        print("{}")
    else:
        print(f"\n{json.dumps(measure(name, wanted))}")


if __name__ == "__main__":
    _child_main()
