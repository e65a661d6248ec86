"""`wds-train checkpoints`: a run's checkpoints, a line each."""

import argparse

from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.scores import SCORES, every_of, telling
from wds_train.commands.flags import add_run, run_url


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)


def run(args: argparse.Namespace) -> int:
    manifest, _ = find_run(run_url(args.run, args.bucket))
    print("step\tepochs\tMB\ttop-1\tEMA top-1\tkey")
    for checkpoint in manifest.checkpoints:
        metrics = telling(checkpoint.metrics, checkpoint.progress.step, every_of(manifest.recipe))
        scores = [f"{metrics[name]:.2f}" if name in metrics else "-" for name in SCORES.values()]
        size = f"{checkpoint.object.bytes / 1e6:.1f}"
        print(checkpoint.progress.step, checkpoint.progress.evaluated, size, *scores, checkpoint.object.key, sep="\t")
    return 0
