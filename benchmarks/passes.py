"""One pass of a loader in a process of its own: its rates, CPU time and memory.

`python -m benchmarks.passes` is that process; `wds-train bench loader` starts it by `in_child`.
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

FLOOR_IMAGES = 600  # at least, of the first batches
PASS_SECONDS = 1800  # a pass that takes longer hangs
WORKER_SECONDS = 30  # for a worker to end after its pass
MARK_SECONDS = 0.05  # between looks at the CPU time, which takes as long as several small images
# Between looks at the memory: each stops the process that is looked at for a moment.
LOOK_SECONDS = 0.2
CLONE = Path(__file__).resolve().parent.parent  # where a child process finds `benchmarks`


def in_child(
    task: str, name: str, wanted: Pass, cores: list[int], environment: dict[str, str]
) -> dict[str, float]:
    """Do `task` in a fresh process.

    Args:
        task: "copy" (write what the loader reads), "measure" or "floor".
        name: The loader.
        wanted: The dataset and the loader's settings.
        cores: Numbers of the cores that the process may use; a copy may use all.
        environment: The environment of the process.

    Returns:
        The figures of `measure` or `floor`, and the most memory that its workers took, MB.

    Raises:
        WdsTrainError: It failed or hung; the message has the cause.
    """
    with tempfile.TemporaryDirectory(dir=wanted.cache) as folder:
        # It gets a folder of its own, so that nothing is cached on its side.
        given = json.dumps(asdict(replace(wanted, cache=folder)))
        command = [sys.executable, "-m", "benchmarks.passes", task, name, given]
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
    # The process looked once itself: a short pass may end between two looks from outside.
    inside = Memory(figures.get("workers_pss_mb", 0.0), figures.get("workers_rss_mb", 0.0))
    return figures | _columns(memory.most(inside))


@contextlib.contextmanager
def _pinned(cores: list[int] | None) -> Iterator[None]:
    """Let processes that are started meanwhile, and their threads, use only `cores`; None: all."""
    # Set here and inherited: libraries count the cores when they are imported.
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Memory(NamedTuple):
    """Memory of processes, MB.

    Attributes:
        pss: Proportional: a page that n processes share counts as 1/n of a page for each.
        rss: Resident: such a page counts n times.
    """

    pss: float
    rss: float

    def most(self, other: "Memory") -> "Memory":
        """Return the larger of both, column by column."""
        return Memory(max(self.pss, other.pss), max(self.rss, other.rss))


def _watch(child: subprocess.Popen[bytes]) -> Memory:
    """Wait for the child, and return the most memory that its descendants took together.

    Raises:
        WdsTrainError: It hangs.
    """
    most = Memory(0.0, 0.0)
    deadline = time.monotonic() + PASS_SECONDS
    while child.poll() is None:
        if time.monotonic() > deadline:
            raise WdsTrainError(f"it did not finish in {PASS_SECONDS} s")
        most = most.most(_memory_below(child.pid))
        time.sleep(LOOK_SECONDS)
    return most


def _memory_below(pid: int) -> Memory:
    """Return the memory of all descendants of a process."""
    pss = 0.0
    rss = 0.0
    for descendant in _descendants(pid):
        memory = _memory(descendant)
        pss += memory.pss
        rss += memory.rss
    return Memory(pss, rss)


def _columns(memory: Memory) -> dict[str, float]:
    return {"workers_pss_mb": memory.pss, "workers_rss_mb": memory.rss}


def _descendants(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    descendants = list(children)
    for child in children:
        descendants += _descendants(child)
    return descendants


def _memory(pid: int) -> Memory:
    """Return the memory of one process; nothing if it has ended."""
    fields = {}
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, size = line.partition(":")
            fields[name] = int(size.split()[0]) * 1024 / 1e6
    except OSError:
        return Memory(0.0, 0.0)
    return Memory(fields["Pss"], fields["Rss"])


def cause(stderr: str) -> str:
    """Return the line that says what went wrong: a traceback's exception, or else the last one."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    if not lines:
        return "nothing was printed"
    for line in reversed(lines):
        if re.match(r"[\w.]+(Error|Exception): ", line):
            return line
    return lines[-1]


class _Mark(NamedTuple):
    """The progress of a pass at a moment.

    Attributes:
        at: The moment, seconds.
        images: Images that have come.
        cpu: CPU seconds of the process and its workers.
        server: CPU seconds of the embedded server.
    """

    at: float
    images: int
    cpu: float
    server: float


def measure(name: str, wanted: Pass) -> dict[str, float]:
    """Make one pass in this process.

    Args:
        name: The loader.
        wanted: The dataset and the loader's settings.

    Returns:
        Counts, rates, seconds, CPU time and memory; the figures of a steady run if it is ours.

    Raises:
        WdsTrainError: No images came.
    """
    # Imports come first, since they are not counted.
    for module in CONTENDERS[name].modules:
        importlib.import_module(module)
    servers = _servers(wanted)
    cpu = _cpu_seconds()
    began = time.perf_counter()
    loader = CONTENDERS[name].batches(wanted)
    opened = time.perf_counter()

    # Read all batches, and note every now and then how far it has come.
    first = 0.0
    images = 0
    memory = Memory(0.0, 0.0)
    marks = [_mark(0, servers)]
    for batch in loader:
        if not images:
            first = time.perf_counter()
            memory = _memory_below(os.getpid())
        images += image_count(batch)
        if time.perf_counter() - marks[-1].at > MARK_SECONDS:
            marks.append(_mark(images, servers))
    ended = time.perf_counter()
    marks.append(_mark(images, servers))
    if not images:
        raise WdsTrainError(f"{name} yielded no images")

    # Ours alone has signed addresses to fall back from.
    fallbacks = getattr(loader, "fallbacks", 0)

    # End the workers: the kernel counts a child's CPU time only when it has ended.
    del loader
    gc.collect()
    for worker in multiprocessing.active_children():
        worker.join(WORKER_SECONDS)
    figures = {
        "images": images,
        "fallbacks": fallbacks,
        "img_per_s": images / (ended - opened),
        "open_s": opened - began,
        "first_batch_s": first - began,
        "cpu_ms_per_img": 1e3 * (_cpu_seconds() - cpu) / images,
    }
    figures |= _columns(memory)
    if name == OURS:
        figures |= _steady(marks, wanted.epochs)
    return figures


def _mark(images: int, servers: list[int]) -> _Mark:
    now = time.perf_counter()  # before the CPU times, which take a while to read
    workers = [worker.pid for worker in multiprocessing.active_children() if worker.pid]
    cpu = time.process_time() + _cpu_of(workers)
    return _Mark(now, images, cpu, _cpu_of(servers))


def _steady(marks: list[_Mark], epochs: int) -> dict[str, float]:
    """Return rates of a pass without its first and its last epoch.

    In the first all starts, and in the last all runs dry. To leave out less than an epoch would not
    do: its short first windows are read at once, and used for long.
    """
    epoch = marks[-1].images / epochs
    within = [mark for mark in marks if epoch <= mark.images <= (epochs - 1) * epoch]
    if len(within) < 2:
        within = marks  # a pass of a moment
    begin = within[0]
    end = within[-1]
    images = end.images - begin.images
    return {
        "steady_img_per_s": images / (end.at - begin.at),
        "steady_cpu_ms_per_img": 1e3 * (end.cpu - begin.cpu) / images,
        "server_cpu_ms_per_img": 1e3 * (end.server - begin.server) / images,
    }


def floor(wanted: Pass) -> dict[str, float]:
    """Measure what no loader does without: the crop out of an image's bytes, and the checksum.

    Args:
        wanted: The dataset and the settings; images of its first batches are measured.

    Returns:
        `decode_ms` and `checksum_ms`, CPU time in ms per image.
    """
    from wds_train.images.decode import decode_crop
    from wds_train.loader.transform import Place

    split, plan, transform = our_parts(wanted)
    index = split.index
    order = plan.order(0)
    steps = range(min(order.steps, -(-FLOOR_IMAGES // wanted.batch)))
    ids = np.concatenate([order.batch(step) for step in steps]).tolist()
    records = [split.record(i) for i in ids]

    # Checksums, of whole records.
    began = time.process_time()
    for record in records:
        crc32(record)
    checksums = time.process_time() - began

    # Lay out what is decoded, and the crops, before the clock starts.
    images = []
    crops = []
    for number, (i, record) in enumerate(zip(ids, records, strict=True)):
        # In memory that can be written, as the loader has it: of other, decoding makes a copy.
        images.append(memoryview(bytearray(image_of(index, i, record))))
        size = (int(index.width[i]), int(index.height[i]))
        crops.append(transform.draw(Place(i, size, 0, number)))

    # Decode the crops, all into the same pixels.
    out = np.empty((wanted.side, wanted.side, 3), np.uint8)
    began = time.process_time()
    for image, (box, flip) in zip(images, crops, strict=True):
        decode_crop(image, box, out, flip=flip)
    decoding = time.process_time() - began
    return {
        "decode_ms": 1e3 * decoding / len(ids),
        "checksum_ms": 1e3 * checksums / len(ids),
    }


def _servers(wanted: Pass) -> list[int]:
    """Return the embedded server's processes, if it serves the pass, and on its cores alone."""
    if not wanted.dataset.startswith(f"s3://{EMBEDDED_BUCKET}/"):
        return []
    ours = os.sched_getaffinity(0)
    return [pid for pid in embedded.pids(home() / "s3") if os.sched_getaffinity(pid) <= ours]


def _cpu_of(pids: list[int]) -> float:
    """Return user and system seconds of those of the processes that live."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            # User and system come after the name, which may hold spaces.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _cpu_seconds() -> float:
    """Return user and system seconds of this process, and of its children that have ended."""
    seconds = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        seconds += used.ru_utime + used.ru_stime
    return seconds


def _child_main() -> None:
    """Do the task that the command line names, and print its figures as a line of JSON."""
    task, name, given = sys.argv[1:]
    wanted = Pass(**json.loads(given))
    figures: dict[str, float] = {}
    if task == "copy":
        write_copy(name, wanted)
    elif task == "floor":
        figures = floor(wanted)
    else:
        figures = measure(name, wanted)
    # A line of its own, whatever the loader printed before.
    print(f"\n{json.dumps(figures)}")


if __name__ == "__main__":
    _child_main()
