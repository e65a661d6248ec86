"""`wds-train export`: a run's weights as a file that timm loads."""

import argparse
from pathlib import Path

from wds_train.checkpoint.find import SCORES, choose, find_run
from wds_train.commands.arguments import FILE, add_run, count, run_url
from wds_train.errors import UsageError
from wds_train.tracking.console import loading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--best", choices=SCORES, default="ema", help="which weights, by default of their best epoch")
    parser.add_argument("--step", type=count, metavar="N", help="of the checkpoint of this step instead")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="a .safetensors file")


def run(args: argparse.Namespace) -> int:
    if not args.to.parent.is_dir():
        raise UsageError(f"--to {args.to}: there is no folder {args.to.parent}; make it first")
    if args.to.suffix != FILE:
        raise UsageError(f"--to {args.to} must end in {FILE}")
    manifest, store = find_run(run_url(args.run, args.bucket))
    checkpoint = choose(manifest, args.best, args.step)
    loading()  # after all that can be refused without it
    from wds_train.checkpoint.read import weights_of

    weights = weights_of(store, manifest, checkpoint, args.best)
    weights.save(args.to)
    scores = ", ".join(f"{name} {value:.2f}" for name, value in weights.metrics.items()) or "not validated"
    print(f"{args.to}: {weights.kind} weights of step {weights.step} ({scores})")
    print(f"load it with {weights.timm_call(args.to)}")
    return 0
