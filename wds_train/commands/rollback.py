"""`wds-train rollback`: an older checkpoint becomes the newest."""

import argparse

from wds_train.checkpoint.find import find_run
from wds_train.commands.flags import add_run, count, run_url
from wds_train.console import loading
from wds_train.storage.proof import UNSAFE_HELP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--to", type=count, required=True, metavar="STEP", help="the step of one of its checkpoints")
    parser.add_argument("--unsafe-store", action="store_true", help=UNSAFE_HELP)


def run(args: argparse.Namespace) -> int:
    _, store = find_run(run_url(args.run, args.bucket))
    loading()
    from wds_train.checkpoint.run import Run

    before, after = Run.roll_back(store, args.to, print, unsafe=args.unsafe_store)
    if after == before:
        done = "done, and " if after.status == "done" else ""
        print(f"{store.url} is {done}at step {args.to}, its last; nothing is changed")
        return 0
    dropped = f"{len(before.checkpoints) - len(after.checkpoints)} newer checkpoints"
    print(f"{store.url} is at step {args.to} again, without {dropped}; the next `wds-train train` goes on from there")
    return 0
