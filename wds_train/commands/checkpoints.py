"""`wds-train checkpoints` and `wds-train rollback`: list checkpoints, go back to one."""

import argparse

from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.scores import SCORES, every_of, telling
from wds_train.commands.flags import add_run, count, resolve_run
from wds_train.console import loading
from wds_train.storage.proof import UNSAFE_HELP


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)


def list_checkpoints(args: argparse.Namespace) -> int:
    """Print a line for each checkpoint, its columns separated by tabs."""
    manifest, _ = find_run(resolve_run(args.run, args.bucket))
    every = every_of(manifest.recipe)
    print("step\tepochs\tMB\ttop-1\tEMA top-1\tkey")
    for checkpoint in manifest.checkpoints:
        progress = checkpoint.progress
        metrics = telling(checkpoint.metrics, progress.step, every)
        scores = [f"{metrics[name]:.2f}" if name in metrics else "-" for name in SCORES.values()]
        size = f"{checkpoint.object.bytes / 1e6:.1f}"
        print(progress.step, progress.evaluated, size, *scores, checkpoint.object.key, sep="\t")
    return 0


def add_rollback_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--to", type=count, required=True, metavar="STEP", help="the step of one of its checkpoints"
    )
    parser.add_argument("--unsafe-store", action="store_true", help=UNSAFE_HELP)


def roll_back(args: argparse.Namespace) -> int:
    """Make an older checkpoint the newest."""
    _, store = find_run(resolve_run(args.run, args.bucket))
    loading()
    from wds_train.checkpoint.run import Run

    before, after = Run.roll_back(store, args.to, print, unsafe=args.unsafe_store)
    if after == before:
        done = "done, and " if after.status == "done" else ""
        print(f"{store.url} is {done}at step {args.to}, its last; nothing is changed")
        return 0
    dropped = len(before.checkpoints) - len(after.checkpoints)
    print(
        f"{store.url} is at step {args.to} again, without {dropped} newer checkpoints; "
        "the next `wds-train train` goes on from there"
    )
    return 0
