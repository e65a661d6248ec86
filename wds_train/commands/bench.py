"""`wds-train bench`: what the parts cost."""

import argparse
from importlib import import_module

from wds_train.console import loading

BENCHES = {
    "decode": "decode, random resized crop and flip, on one core",
    "loader": "an epoch from S3 to augmented batches",
    "train": "training steps on one device, beside a plain loop over timm's parts",
    "scale": "a dataset of up to 100 M samples: opening it, a first batch's rows, any step's order, memory",
    "gpu": "all that needs a GPU: speed, memory, resume, accuracy; a table in the end",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(metavar="BENCH", required=True)
    loading()
    for name, text in BENCHES.items():
        module = import_module(f"wds_train.bench.{name}")
        one = benches.add_parser(name, help=text)
        module.add_arguments(one)
        one.set_defaults(bench=module.run)


def run(args: argparse.Namespace) -> int:
    return args.bench(args)
