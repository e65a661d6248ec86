"""`wds-train order`: print the samples of an epoch, as the real loader yields them."""

import argparse

from wds_train.commands.flags import add_dataset, count, positive, resolve_dataset
from wds_train.config.numbers import whole
from wds_train.console import loading
from wds_train.dataset.reader import Dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    parser.add_argument("--seed", type=whole, default=0, help="seed of the order (%(default)s)")
    parser.add_argument("--epoch", type=count, default=0, help="counted from 0 (%(default)s)")
    parser.add_argument(
        "--global-batch",
        type=positive,
        default=256,
        metavar="B",
        help="samples per step over all ranks",
    )
    parser.add_argument("--world", type=positive, default=1, metavar="R", help="ranks to read as")
    parser.add_argument(
        "--workers", type=count, default=0, metavar="W", help="loader workers per rank"
    )
    parser.add_argument(
        "--from-step", type=count, default=0, metavar="K", help="first step of the epoch to print"
    )
    parser.add_argument(
        "--steps", type=count, metavar="N", help="how many steps (default: all that remain)"
    )


def run(args: argparse.Namespace) -> int:
    dataset = Dataset.open(resolve_dataset(args.dataset, args.bucket))
    loading()
    from wds_train.loader.order_listing import stream_order

    lines = stream_order(
        dataset,
        seed=args.seed,
        epoch=args.epoch,
        global_batch=args.global_batch,
        world=args.world,
        workers=args.workers,
        from_step=args.from_step,
        steps=args.steps,
    )
    for line in lines:
        print("\t".join(map(str, line)))
    return 0
