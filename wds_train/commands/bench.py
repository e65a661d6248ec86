"""`wds-train bench`: what the parts cost."""

import argparse

from wds_train.bench import decode as bench
from wds_train.bench import gpu as bench_gpu
from wds_train.bench import loader as bench_loader
from wds_train.bench import train as bench_train

BENCHES = {
    "decode": (bench, "decode, random resized crop and flip, on one core"),
    "loader": (bench_loader, "an epoch from S3 to augmented batches"),
    "train": (bench_train, "training steps on one device, beside a plain loop over timm's parts"),
    "gpu": (bench_gpu, "all that needs a GPU: speed, memory, resume, accuracy; a table in the end"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(metavar="BENCH", required=True)
    for name, (module, text) in BENCHES.items():
        one = benches.add_parser(name, help=text)
        module.add_arguments(one)
        one.set_defaults(bench=module.run)


def run(args: argparse.Namespace) -> int:
    return args.bench(args)
