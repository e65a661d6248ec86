"""Estimate what a conversion will take: `wds-train shards --dry-run`."""

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

SAMPLED = 64  # images that are tried out
START_SECONDS = 2.0  # to start the processes, and for what follows the last shard
# S3 Standard in us-east-1, first 50 TB, and a PUT (aws.amazon.com/s3/pricing).
DOLLARS_PER_GB_MONTH = 0.023
DOLLARS_PER_PUT = 0.005 / 1000


def print_plan(plan: Plan, processes: int) -> None:
    """Print shards, bytes, time and cost, estimated from the rows and a few images; write nothing.

    Args:
        plan: The conversion.
        processes: How many make shards at once.
    """
    # The size of each split, by the share of an image's bytes that is kept.
    ratio, seconds = _try_out(plan)
    total = 0
    shards = 0
    for split, parts in plan.parts.items():
        rows = plan.source.splits[split]
        lengths = to_numpy(rows["length"]) * ratio
        size = int(record_bytes(lengths.astype(np.int64)).sum())
        print(f"{split}: {rows.num_rows:,} samples, {len(parts)} shards, {size / 1e6:,.1f} MB")
        total += size
        shards += len(parts)

    # Time and cost of all of them.
    work = duration(START_SECONDS + seconds * plan.source.samples / processes)
    plural = "es" if processes > 1 else ""
    print(
        f"about {work} of work with {processes} process{plural}, "
        f"and the time to upload {total / 1e6:,.1f} MB"
    )
    month = dollars(total / 1e9 * DOLLARS_PER_GB_MONTH)
    # Each shard is uploaded, and recorded when it is finished.
    requests = dollars(2 * shards * DOLLARS_PER_PUT)
    print(f"S3: {month} a month, {requests} for the upload's requests")


def _try_out(plan: Plan) -> tuple[float, float]:
    """Check a few images of the first split.

    Returns:
        The share of an image's bytes that is kept, and seconds per image.
    """
    # A random sample: neighbours in a source are often alike.
    rows = next(iter(plan.source.splits.values()))
    chosen = take(rows, permutation(rows.num_rows, "dry run")[:SAMPLED]).to_pylist()
    before = 0
    after = 0
    began = time.perf_counter()
    for row in chosen:
        if not row["path"]:  # a stream beyond the spool: its images are not here
            continue
        data = read_bytes(row["path"], row["offset"], row["length"])
        try:
            after += len(check(data, plan.options.policy).data)
            before += len(data)
        except DataError:
            continue
    seconds = (time.perf_counter() - began) / max(1, len(chosen))
    ratio = after / before if before else 1.0
    return ratio, seconds
