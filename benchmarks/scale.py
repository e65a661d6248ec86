"""`wds-train bench scale`: what a dataset of up to 100 M samples costs a machine that trains on it.

Images are not counted, but the time to open the dataset, to know the samples of a first batch and
of any step, and the memory of it all.

The dataset lies in a local folder. It has manifest and index objects as a conversion writes them,
but no shards: all shards are said to hold the same `SHARD` images, so that one index is the
template of all. Two loader workers are forked as a training's.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.host import machine
from wds_train.config.numbers import Number
from wds_train.dataset.arrow import to_array, to_batch
from wds_train.dataset.index import SCHEMA, write_index
from wds_train.dataset.manifest import NAME, ClassInfo, DatasetManifest, Index, Shard, Split
from wds_train.dataset.reader import Dataset, SplitReader
from wds_train.dataset.shard import END_BYTES
from wds_train.dataset.shared_index import AT_ONCE
from wds_train.errors import UsageError, WdsTrainError
from wds_train.files import home
from wds_train.loader.fetch import read_rows_ahead
from wds_train.loader.order import EpochOrder
from wds_train.loader.plan import TrainPlan
from wds_train.rng import generator

SHARD = 1250  # samples
CLASSES = 1000
BATCH = 256
WORKERS = 2
SHARD_BYTES = 100_000  # at most, on disk: a shard's index object, and its rows
TAR_HEADERS = 1536  # bytes before the image in a record
TAR_BLOCK = 512  # bytes; tar pads to whole blocks
INDEXES_AT_ONCE = 100  # that a process writes between two messages
STEPS = 20  # that are computed, anywhere in the epoch; the median counts
FIGURES = (
    "samples",
    "shards",
    "open_s",
    "first_batch_s",
    "order_s",
    "step_ms",
    "first_mb",
    "full_mb",
    "bytes_per_sample",
)
INDENT = 6  # columns of the table between a title and that before it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `wds-train bench scale` to its parser."""
    size = Number(float, SHARD, 1e10)
    parser.add_argument(
        "--samples", type=size, nargs="+", default=[1e6, 1e7], help="sizes of datasets (1e6 1e7)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Run `wds-train bench scale` with the parsed flags, and return the exit status."""
    sizes = [_one_size(int(samples) // SHARD) for samples in args.samples]
    result = {"machine": machine(), "workers": WORKERS, "batch": BATCH, "sizes": sizes}
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(_table(result))
    return 0


def _one_size(shards: int) -> dict[str, Any]:
    """Measure a dataset of so many shards, in a process that has no memory of anything else.

    Raises:
        UsageError: The disk is too small.
    """
    home().mkdir(parents=True, exist_ok=True)
    needed = shards * SHARD_BYTES
    free = shutil.disk_usage(home()).free
    if needed > free:
        raise UsageError(
            f"{shards * SHARD:,} samples take {needed / 1e9:,.1f} GB in {home()}, "
            f"which has {free / 1e9:,.1f} free; measure "
            "fewer, or set WDS_HOME to a folder on a larger disk"
        )
    with tempfile.TemporaryDirectory(dir=home()) as folder:
        _write_dataset(Path(folder), shards)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(_measure, folder).result()


def _write_dataset(folder: Path, shards: int) -> None:
    """Write the manifest and the indexes of a dataset of so many equal shards."""
    # The indexes, all but equal: each has the number of its shard.
    template = _template()
    (folder / "train").mkdir()
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("forkserver")) as pool:
        write = partial(_write_index, folder, template)
        indexes = tuple(pool.map(write, range(shards), chunksize=INDEXES_AT_ONCE))

    # The manifest, whose shards need not exist: no image is read.
    last = template.slice(SHARD - 1).to_pylist()[0]
    size = last["offset"] + last["length"] + END_BYTES
    named = []
    for number in range(shards):
        named.append(Shard(f"train/shard-{number:06d}.tar", size, SHARD, f"{number:064x}"))
    classes = []
    for label in range(CLASSES):
        classes.append(ClassInfo(f"n{label:08d}", f"class {label}"))
    splits = {"train": Split(tuple(named), indexes)}
    manifest = DatasetManifest(tuple(classes), splits, "bench scale", 0, {})
    (folder / NAME).write_bytes(manifest.to_json())


def _template() -> pa.Table:
    """Return the index of a shard of photographs, of random sizes and labels, as shard 0."""
    rng = generator("scale")

    # Sizes as those of photographs, in a tar with headers and padding.
    data_length = rng.integers(20_000, 200_000, SHARD)
    length = TAR_HEADERS + data_length + -data_length % TAR_BLOCK
    offset = np.cumsum(length) - length
    width, height = rng.integers(200, 600, (2, SHARD))
    keys = []
    for number, label in enumerate(rng.integers(0, CLASSES, SHARD).tolist()):
        keys.append(f"n{label:08d}/{label:08d}_{number:06d}")
    labels = rng.integers(0, CLASSES, SHARD)
    checksums = rng.integers(0, 1 << 32, SHARD)

    # In the order of SCHEMA.
    columns = [
        np.zeros(SHARD),
        offset,
        length,
        offset + TAR_HEADERS,
        data_length,
        labels,
        keys,
        width,
        height,
        checksums,
    ]
    return pa.Table.from_batches([to_batch(columns, SCHEMA)])


def _write_index(folder: Path, template: pa.Table, shard: int) -> Index:
    numbers = to_array(np.full(SHARD, shard), pa.int32())
    data = write_index(template.set_column(0, SCHEMA.field("shard"), numbers))
    name = f"train/index-{shard:06d}.parquet"
    (folder / name).write_bytes(data)
    return Index(name, len(data), hashlib.sha256(data).hexdigest())


def _measure(folder: str) -> dict[str, Any]:
    """Open the dataset and fork workers, as a training does, and return the figures."""
    os.environ["WDS_HOME"] = folder  # the rows lie there, and are gone with it
    before = _megabytes(os.getpid())
    began = time.monotonic()
    dataset = Dataset.open(folder)
    split = dataset.split("train")
    opened = time.monotonic() - began
    plan = TrainPlan(split.shard_samples, dataset.fingerprint, 0, BATCH, range(1))

    # Each worker says when it knows a first batch, and when it has read all its rows. Memory is
    # looked at after both, while the workers wait.
    workers = [_Worker(split, plan, number) for number in range(WORKERS)]
    pids = [os.getpid(), *(worker.pid for worker in workers)]
    first_batch = max([worker.wait() for worker in workers]) - began
    first_mb = _total_megabytes(pids) - before
    for worker in workers:
        worker.go_on()
    for worker in workers:
        worker.wait()
    full_mb = _total_megabytes(pids) - before
    for worker in workers:
        worker.go_on()
    for worker in workers:
        worker.join()

    # The order of an epoch, and of steps anywhere in it.
    began = time.monotonic()
    order = plan.order(0)
    ordered = time.monotonic() - began
    step_ms = [_step_ms(order, number * order.steps // STEPS) for number in range(STEPS)]
    return {
        "samples": len(split),
        "shards": len(split.shard_names),
        "open_s": round(opened, 2),
        "first_batch_s": round(first_batch, 2),
        "order_s": round(ordered, 2),
        "step_ms": round(statistics.median(step_ms), 2),
        "first_mb": round(first_mb, 2),
        "full_mb": round(full_mb, 2),
        "bytes_per_sample": round(1e6 * full_mb / len(split), 2),
    }


class _Worker:
    """A loader worker, which is forked at once, and waits after each stage of `_work`."""

    def __init__(self, split: SplitReader, plan: TrainPlan, number: int) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(split, plan, number, theirs))
        self._process.start()
        self.pid = self._process.pid or 0

    def wait(self) -> float:
        """Wait for the end of a stage, and return its time on the monotonic clock.

        Raises:
            WdsTrainError: The worker has ended.
        """
        wait([self._pipe, self._process.sentinel])
        if not self._pipe.poll():
            raise WdsTrainError("a worker of the benchmark ended early; its error is above")
        return self._pipe.recv()

    def go_on(self) -> None:
        """Let it begin the next stage."""
        self._pipe.send("go on")

    def join(self) -> None:
        """Wait until it has ended."""
        self._process.join()


def _step_ms(order: EpochOrder, step: int) -> float:
    """Return the time to know the samples of a step, milliseconds."""
    began = time.monotonic()
    order.batch(step)
    return 1e3 * (time.monotonic() - began)


def _work(split: SplitReader, plan: TrainPlan, worker: int, pipe: Connection) -> None:
    """Find the images of the first batch, then those of this worker's share of the dataset.

    After each of the two it sends the time, and waits for a message.
    """
    index = split.index
    requests = plan.requests(worker, WORKERS)
    for request in read_rows_ahead(index, requests):
        if request.step > 0:
            break
        np.sort(index.offset[request.ids] + index.length[request.ids])
    pipe.send(time.monotonic())
    pipe.recv()

    # Whole shards, as many at once as the shared index reads.
    shards = np.array_split(np.arange(len(split) // SHARD), WORKERS)[worker]
    for some in np.array_split(shards, -(-len(shards) // AT_ONCE)):
        index.offset[np.arange(some[0] * SHARD, (some[-1] + 1) * SHARD)]
    pipe.send(time.monotonic())
    pipe.recv()


def _megabytes(pid: int) -> float:
    """Return a process's memory, MB. A page that n processes share counts as 1/n of a page."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise WdsTrainError(f"the kernel does not say what memory process {pid} takes")


def _total_megabytes(pids: list[int]) -> float:
    return sum(map(_megabytes, pids))


def _table(result: dict[str, Any]) -> str:
    """Return the figures as a table, and with several sizes the line through their memory."""
    rows = result["sizes"]
    header = ""
    for key in FIGURES:
        header += " " * INDENT + _title(key)
    lines = [result["machine"], header]
    for row in rows:
        line = ""
        for key in FIGURES:
            line += f"{row[key]:>{len(_title(key)) + INDENT},}"
        lines.append(line)
    if len(rows) > 1:
        samples = [row["samples"] for row in rows]
        memory = [row["full_mb"] for row in rows]
        slope, start = np.polyfit(samples, memory, 1)
        lines.append(f"a straight line: {1e6 * slope:.1f} bytes a sample, and {start:.0f} MB")
    return "\n".join(lines)


def _title(figure: str) -> str:
    return figure.replace("_", " ").replace("mb", "MB")
