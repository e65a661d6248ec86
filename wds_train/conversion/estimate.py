"""What a conversion will take: `wds-train shards --dry-run`."""

import time

import numpy as np

from wds_train.console import dollars, duration
from wds_train.conversion.image_policy import check
from wds_train.conversion.shard_plan import Plan
from wds_train.conversion.sources.scan import read_bytes
from wds_train.conversion.sources.source import take
from wds_train.dataset.arrow import to_numpy
from wds_train.dataset.shard import record_bytes
from wds_train.errors import DataError
from wds_train.rng import permutation

SAMPLED = 64
START_SECONDS = 2.0  # to start the processes, and for what follows the last shard
# S3 Standard in us-east-1, first 50 TB, and a PUT (aws.amazon.com/s3/pricing).
DOLLARS_PER_GB_MONTH = 0.023
DOLLARS_PER_PUT = 0.005 / 1000


def print_plan(plan: Plan, processes: int) -> None:
    """Shards, bytes, time and cost, from the rows and a few images that are tried out; nothing is written."""
    ratio, seconds = _try_out(plan)
    total = shards = 0
    for split, parts in plan.parts.items():
        rows = plan.source.splits[split]
        size = int(record_bytes((to_numpy(rows["length"]) * ratio).astype(np.int64)).sum())
        print(f"{split}: {rows.num_rows:,} samples, {len(parts)} shards, {size / 1e6:,.1f} MB")
        total, shards = total + size, shards + len(parts)
    work = duration(START_SECONDS + seconds * plan.source.samples / processes)
    print(
        f"about {work} of work with {processes} process{'es' * (processes > 1)}, and the time to upload {total / 1e6:,.1f} MB"
    )
    print(
        f"S3: {dollars(total / 1e9 * DOLLARS_PER_GB_MONTH)} a month, {dollars(2 * shards * DOLLARS_PER_PUT)} for the "
        "upload's requests"
    )


def _try_out(plan: Plan) -> tuple[float, float]:
    """How much of an image's bytes is kept, and seconds per image, from a few images of the first split."""
    rows = next(iter(plan.source.splits.values()))
    chosen = take(rows, permutation(rows.num_rows, "dry run")[:SAMPLED]).to_pylist()
    began, before, after = time.perf_counter(), 0, 0
    for row in chosen:
        if not row["path"]:  # a stream beyond the spool: its images are not here
            continue
        data = read_bytes(row["path"], row["offset"], row["length"])
        try:
            after += len(check(data, plan.options.policy).data)
            before += len(data)
        except DataError:
            continue
    return after / before if before else 1.0, (time.perf_counter() - began) / max(1, len(chosen))
