"""What a dataset of up to 100 M samples takes on a machine that trains on it, but for its images: to open it, to know what a first
batch and any step is made of, and the memory of it all.

The dataset lies in a local folder and has manifest and index objects as a conversion writes them, but no shards: every shard is
said to hold the same `SHARD` images, so that one index serves as the template of all. Two loader workers are forked as a training's.
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
from itertools import takewhile
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

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

SHARD, CLASSES, BATCH, WORKERS = 1250, 1000, 256, 2
SHARD_BYTES = 100_000  # at most: a shard's index object, and its rows
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = Number(float, SHARD, 1e10)
    parser.add_argument(
        "--samples", type=size, nargs="+", default=[1e6, 1e7], help="sizes of datasets (1e6 1e7)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    from benchmarks.decode_rates import (
        machine,
    )  # with PyTorch, whose memory no process that is measured shall have

    sizes = [_one_size(int(samples) // SHARD) for samples in args.samples]
    result = {"machine": machine(), "workers": WORKERS, "batch": BATCH, "sizes": sizes}
    print(json.dumps(result, indent=1) if args.json else _table(result))
    return 0


def _one_size(shards: int) -> dict[str, Any]:
    """The figures of a dataset of so many shards, by a process of its own, which has no memory of anything else."""
    home().mkdir(parents=True, exist_ok=True)
    needed, free = shards * SHARD_BYTES, shutil.disk_usage(home()).free
    if needed > free:
        raise UsageError(
            f"{shards * SHARD:,} samples take {needed / 1e9:,.1f} GB in {home()}, which has {free / 1e9:,.1f} free; measure "
            "fewer, or set WDS_HOME to a folder on a larger disk"
        )
    with tempfile.TemporaryDirectory(dir=home()) as folder:
        _write_dataset(Path(folder), shards)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(_measure, folder).result()


def _write_dataset(folder: Path, shards: int) -> None:
    rng = generator("scale")
    data_length = rng.integers(20_000, 200_000, SHARD)
    length = 1536 + data_length + -data_length % 512
    offset = np.cumsum(length) - length
    sides = rng.integers(200, 600, (2, SHARD))
    keys = [
        f"n{label:08d}/{label:08d}_{n:06d}"
        for n, label in enumerate(rng.integers(0, CLASSES, SHARD).tolist())
    ]
    labels, sums = rng.integers(0, CLASSES, SHARD), rng.integers(0, 1 << 32, SHARD)
    columns = [
        np.zeros(SHARD),
        offset,
        length,
        offset + 1536,
        data_length,
        labels,
        keys,
        *sides,
        sums,
    ]
    template = pa.Table.from_batches([to_batch(columns, SCHEMA)])
    (folder / "train").mkdir()
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("forkserver")) as pool:
        indexes = list(
            pool.map(partial(_write_index, folder, template), range(shards), chunksize=100)
        )
    size = int(length.sum()) + END_BYTES
    named = [Shard(f"train/shard-{n:06d}.tar", size, SHARD, f"{n:064x}") for n in range(shards)]
    classes = tuple(ClassInfo(f"n{label:08d}", f"class {label}") for label in range(CLASSES))
    splits = {"train": Split(tuple(named), tuple(indexes))}
    (folder / NAME).write_bytes(DatasetManifest(classes, splits, "bench scale", 0, {}).to_json())


def _write_index(folder: Path, template: pa.Table, shard: int) -> Index:
    data = write_index(
        template.set_column(0, SCHEMA.field("shard"), to_array(np.full(SHARD, shard), pa.int32()))
    )
    name = f"train/index-{shard:06d}.parquet"
    (folder / name).write_bytes(data)
    return Index(name, len(data), hashlib.sha256(data).hexdigest())


def _measure(folder: str) -> dict[str, Any]:
    os.environ["WDS_HOME"] = folder  # the rows lie there, and are gone with it
    before, began = _megabytes(os.getpid()), time.monotonic()
    dataset = Dataset.open(folder)
    split = dataset.split("train")
    opened = time.monotonic() - began
    plan = TrainPlan(split.shard_samples, dataset.fingerprint, 0, BATCH, range(1))
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(WORKERS)]
    workers = [
        context.Process(target=_work, args=(split, plan, n, pipe[1]))
        for n, pipe in enumerate(pipes)
    ]
    pids = [os.getpid()]
    for worker in workers:
        worker.start()
        pids.append(worker.pid or 0)
    found = []  # of the first batch, and of the whole dataset
    for _ in range(2):
        seconds = max(map(_said, pipes, workers)) - began
        found.append((seconds, sum(map(_megabytes, pids)) - before))
        for pipe, _ in pipes:
            pipe.send("go on")
    for worker in workers:
        worker.join()
    began = time.monotonic()
    order = plan.order(0)
    ordered = time.monotonic() - began
    figures = {
        "samples": len(split),
        "shards": len(split.shard_names),
        "open_s": opened,
        "first_batch_s": found[0][0],
        "order_s": ordered,
        "step_ms": statistics.median(
            _step_ms(order, n * order.steps // STEPS) for n in range(STEPS)
        ),
        "first_mb": found[0][1],
        "full_mb": found[1][1],
        "bytes_per_sample": 1e6 * found[1][1] / len(split),
    }
    return {
        name: round(figure, 2) if isinstance(figure, float) else figure
        for name, figure in figures.items()
    }


def _said(pipe: tuple[Connection, Connection], worker: ForkProcess) -> float:
    wait([pipe[0], worker.sentinel])
    if not pipe[0].poll():
        raise WdsTrainError("a worker of the benchmark ended early; its error is above")
    return pipe[0].recv()


def _step_ms(order: EpochOrder, step: int) -> float:
    began = time.monotonic()
    order.batch(step)
    return 1e3 * (time.monotonic() - began)


def _work(split: SplitReader, plan: TrainPlan, worker: int, pipe: Connection) -> None:
    """A loader worker: finds the images of the first batch, then those of its share of the dataset, and says when."""
    index, requests = split.index, plan.requests(worker, WORKERS)
    for request in takewhile(lambda request: request.step == 0, read_rows_ahead(index, requests)):
        np.sort(index.offset[request.ids] + index.length[request.ids])
    pipe.send(time.monotonic())
    pipe.recv()
    shards = np.array_split(np.arange(len(split) // SHARD), WORKERS)[worker]
    for some in np.array_split(shards, -(-len(shards) // AT_ONCE)):
        index.offset[np.arange(some[0] * SHARD, (some[-1] + 1) * SHARD)]
    pipe.send(time.monotonic())
    pipe.recv()


def _megabytes(pid: int) -> float:
    """The process's memory, a page that n processes share as 1/n of a page."""
    fields = dict(
        line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    )
    return int(fields["Pss"].split()[0]) * 1024 / 1e6


def _table(result: dict[str, Any]) -> str:
    rows = result["sizes"]
    names = [name.replace("_", " ").replace("mb", "MB") for name in FIGURES]
    lines = [result["machine"], "".join(f"{name:>{len(name) + 6}}" for name in names)]
    lines += [
        "".join(f"{row[key]:>{len(name) + 6},}" for key, name in zip(FIGURES, names, strict=True))
        for row in rows
    ]
    if len(rows) > 1:
        slope, start = np.polyfit(
            [row["samples"] for row in rows], [row["full_mb"] for row in rows], 1
        )
        lines.append(f"a straight line: {1e6 * slope:.1f} bytes a sample, and {start:.0f} MB")
    return "\n".join(lines)
