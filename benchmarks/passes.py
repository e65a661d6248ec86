"""One pass of a loader in a process of its own: its rates, CPU time and memory. `python -m benchmarks.passes` is that
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
from typing import NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from benchmarks.peers import CONTENDERS, OURS, Pass, image_count, our_parts, write_copy
from wds_train.dataset.index import image_of
from wds_train.errors import WdsTrainError
from wds_train.files import home
from wds_train.storage import embedded
from wds_train.storage.address import EMBEDDED_BUCKET

FLOOR_IMAGES = 600
PASS_SECONDS = 1800  # a pass that takes longer hangs
MARK_SECONDS = 0.05  # between looks at the CPU time, which takes as long as several small images
CLONE = Path(__file__).resolve().parent.parent  # where a child process finds `benchmarks`
LOOK_SECONDS = (
    0.2  # between looks at the memory: each stops the process that is looked at for a moment
)


def in_child(
    task: str, name: str, wanted: Pass, cores: list[int], environment: dict[str, str]
) -> dict[str, float]:
    """The figures of `task` (`copy`, `measure` or `floor`), done by a fresh process on `cores`, with its workers' memory."""
    with tempfile.TemporaryDirectory(dir=wanted.cache) as folder:
        what = json.dumps(asdict(replace(wanted, cache=folder)))
        command = [sys.executable, "-m", "benchmarks.passes", task, name, what]
        with (Path(folder) / "out").open("w+") as out, (Path(folder) / "err").open("w+") as err:
            with _pinned(None if task == "copy" else cores):
                child = subprocess.Popen(
                    command,
                    stdout=out,
                    stderr=err,
                    env=environment | {"HF_HOME": folder, "PYTHONPATH": str(CLONE)},
                    start_new_session=True,
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
            figures = json.loads(out.read().splitlines()[-1])
            return figures | {
                column: max(most, figures.get(column, 0.0)) for column, most in memory.items()
            }


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
        now = _memory_below(child.pid)
        most = {column: max(mb, now[column]) for column, mb in most.items()}
        time.sleep(LOOK_SECONDS)
    return most


def _memory_below(pid: int) -> dict[str, float]:
    """Return the memory of all descendants of a process, in MB."""
    pss, rss = (
        sum(column) for column in zip((0, 0), *map(_memory, _descendants(pid)), strict=True)
    )
    return {"workers_pss_mb": pss, "workers_rss_mb": rss}


def _descendants(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return children + [below for child in children for below in _descendants(child)]


def _memory(pid: int) -> tuple[float, float]:
    """PSS and RSS in MB; nothing for a process that has ended."""
    with contextlib.suppress(OSError):
        fields = dict(
            line.split(":")
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        )
        return tuple(int(fields[name].split()[0]) * 1024 / 1e6 for name in ("Pss", "Rss"))  # type: ignore[return-value]
    return 0.0, 0.0


def cause(stderr: str) -> str:
    """The line that says what went wrong: a traceback's exception, or else the last one."""
    lines = [line for line in stderr.splitlines() if line.strip()] or ["nothing was printed"]
    return next(
        (line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception): ", line)),
        lines[-1],
    )


class _Mark(NamedTuple):
    """How far a pass has come: seconds, images, and CPU seconds of the process with its workers, and of the embedded server."""

    at: float
    images: int
    cpu: float
    server: float


def measure(name: str, wanted: Pass) -> dict[str, float]:
    """Make one pass in this process; imports are not counted."""
    for module in CONTENDERS[name].modules:
        importlib.import_module(module)
    servers = _servers(wanted)
    cpu, began = _cpu_seconds(), time.perf_counter()
    loader = CONTENDERS[name].batches(wanted)
    opened = time.perf_counter()
    first, images, memory = 0.0, 0, dict[str, float]()
    marks = [_mark(0, servers)]
    for batch in loader:
        if not images:
            first = time.perf_counter()
            memory = _memory_below(
                os.getpid()
            )  # a short pass may end between two looks from outside
        images += image_count(batch)
        if time.perf_counter() - marks[-1].at > MARK_SECONDS:
            marks.append(_mark(images, servers))
    ended = time.perf_counter()
    marks.append(_mark(images, servers))
    if not images:
        raise WdsTrainError(f"{name} yielded no images")
    fallbacks = getattr(
        loader, "fallbacks", 0
    )  # of ours alone: no other loader has signed addresses to fall back from
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
    } | (memory | _steady(marks, wanted.epochs) if name == OURS else memory)


def _mark(images: int, servers: list[int]) -> _Mark:
    workers = [worker.pid for worker in multiprocessing.active_children() if worker.pid]
    return _Mark(
        time.perf_counter(), images, time.process_time() + _cpu_of(workers), _cpu_of(servers)
    )


def _steady(marks: list[_Mark], epochs: int) -> dict[str, float]:
    """Rates of a pass but for its first epoch, in which all starts, and its last, in which all runs dry. Less than an epoch would
    not do, of which the short first windows are read at once, and used for long.
    """
    epoch = marks[-1].images / epochs
    within = [mark for mark in marks if epoch <= mark.images <= (epochs - 1) * epoch]
    begin, end = (
        (within[0], within[-1]) if len(within) > 1 else (marks[0], marks[-1])
    )  # of a pass of a moment, all
    images = end.images - begin.images
    return {
        "steady_img_per_s": images / (end.at - begin.at),
        "steady_cpu_ms_per_img": 1e3 * (end.cpu - begin.cpu) / images,
        "server_cpu_ms_per_img": 1e3 * (end.server - begin.server) / images,
    }


def floor(wanted: Pass) -> dict[str, float]:
    """CPU ms an image, of some of the epoch's, for what no loader does without: the crop out of the bytes, and the checksum."""
    from wds_train.images.decode import decode_crop
    from wds_train.loader.transform import Place

    split, plan, transform = our_parts(wanted)
    index, out, order = (
        split.index,
        np.empty((wanted.side, wanted.side, 3), np.uint8),
        plan.order(0),
    )
    steps = range(min(order.steps, -(-FLOOR_IMAGES // wanted.batch)))
    ids = np.concatenate([order.batch(step) for step in steps]).tolist()
    records = [split.record(i) for i in ids]
    began = time.process_time()
    for record in records:
        crc32(record)
    checked = time.process_time()
    # In memory that can be written, as the loader has them: of others, decoding makes a copy.
    images = [
        memoryview(bytearray(image_of(index, i, each)))
        for i, each in zip(ids, records, strict=True)
    ]
    places = [
        Place(i, (int(index.width[i]), int(index.height[i])), 0, n) for n, i in enumerate(ids)
    ]
    crops = [transform.draw(place) for place in places]
    prepared = time.process_time()
    for image, (box, flip) in zip(images, crops, strict=True):
        decode_crop(image, box, out, flip=flip)
    decoding = time.process_time() - prepared
    return {
        "decode_ms": 1e3 * decoding / len(ids),
        "checksum_ms": 1e3 * (checked - began) / len(ids),
    }


def _servers(wanted: Pass) -> list[int]:
    """The embedded server that a pass reads from, if it has no cores but those of the pass."""
    found = (
        embedded.pids(home() / "s3")
        if wanted.dataset.startswith(f"s3://{EMBEDDED_BUCKET}/")
        else []
    )
    return [pid for pid in found if os.sched_getaffinity(pid) <= os.sched_getaffinity(0)]


def _cpu_of(pids: list[int]) -> float:
    """User and system seconds of those of the processes that live."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            ticks += sum(
                map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
            )
    return ticks / os.sysconf("SC_CLK_TCK")


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _child_main() -> None:
    task, name, wanted = sys.argv[1], sys.argv[2], Pass(**json.loads(sys.argv[3]))
    if task == "copy":
        write_copy(name, wanted)
        print("{}")
    else:
        print(f"\n{json.dumps(floor(wanted) if task == 'floor' else measure(name, wanted))}")


if __name__ == "__main__":
    _child_main()
