"""`wds-train bench`: measure the speed of the parts.

It works only in a clone of the repository: benchmarks are not installed.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from wds_train.console import loading
from wds_train.errors import UsageError

CLONE = Path(__file__).resolve().parents[2]  # site-packages, if this is an installed copy


class Benchmark(NamedTuple):
    """A benchmark, as a module with `add_arguments` and `run`."""

    module: str
    help: str


BENCHMARKS = {
    "decode": Benchmark(
        "benchmarks.decode_rates", "decode, random resized crop and flip, on one core"
    ),
    "loader": Benchmark("benchmarks.loader_rates", "an epoch from S3 to augmented batches"),
    "train": Benchmark(
        "benchmarks.train_rates",
        "training steps on one device, compared with a plain loop over timm's parts",
    ),
    "scale": Benchmark(
        "benchmarks.scale",
        "a dataset of up to 100 M samples: opening, a first batch's rows, any step's order, memory",
    ),
    "gpu": Benchmark(
        "benchmarks.gpu", "all that needs a GPU: speed, memory, resume, accuracy; ends with a table"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(metavar="BENCH", required=True)
    loading()
    for name, benchmark in BENCHMARKS.items():
        module = import_benchmark(benchmark.module)
        one = benches.add_parser(name, help=benchmark.help)
        module.add_arguments(one)
        one.set_defaults(bench=module.run)


def run(args: argparse.Namespace) -> int:
    return args.bench(args)


def import_benchmark(name: str) -> ModuleType:
    """Import a benchmark by its dotted name, such as "benchmarks.scale".

    Benchmarks import commands, so no command may import a benchmark. Names as strings avoid the
    circle, as in `wds_train.cli`.

    Raises:
        UsageError: There are no benchmarks, since this is an installed copy of wds-train.
    """
    if not (CLONE / "pyproject.toml").is_file():
        raise UsageError(
            "benchmarks are not installed; use wds-train from a clone of its repository"
        )
    # First, before the current folder, which may have a `benchmarks` too.
    if sys.path[0] != str(CLONE):
        sys.path.insert(0, str(CLONE))
    return import_module(name)
