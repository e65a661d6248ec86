"""`wds-train order`: print the samples of an epoch, as the real loader yields them."""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from wds_train.commands.flags import add_dataset, count, positive, resolve_dataset
from wds_train.config.numbers import whole
from wds_train.console import loading
from wds_train.dataset.reader import Dataset, SplitReader
from wds_train.errors import DataError, UsageError

if TYPE_CHECKING:
    # PyTorch takes seconds to import.
    from wds_train.loader.batch import Batch
    from wds_train.loader.plan import TrainPlan


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
    lines = list_order(
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


def list_order(
    dataset: Dataset,
    *,
    seed: int,
    epoch: int,
    global_batch: int,
    world: int,
    workers: int,
    from_step: int,
    steps: int | None,
) -> Iterator[tuple[int, int, str, int]]:
    """Yield the samples of an epoch in the order of a training.

    They are read through the real loader, as `world` ranks with `workers` each would read them, but
    not decoded.

    Args:
        dataset: The dataset.
        seed: Seed of the order.
        epoch: The epoch.
        global_batch: Samples of a step, over all ranks.
        world: The number of ranks.
        workers: Loader workers of each rank.
        from_step: The epoch's first step to list.
        steps: The number of steps to list; None: all that remain.

    Yields:
        The step within the epoch, the position in its order, the sample's key, and its label.

    Raises:
        UsageError: The epoch has fewer steps than `from_step`.
        DataError: A sample is unreadable.
    """
    from wds_train.loader.plan import TrainPlan

    split = dataset.split("train")
    epochs = range(epoch, epoch + 1)
    plan = TrainPlan(
        split.shard_samples, dataset.fingerprint, seed, global_batch, epochs, world=world
    )
    if from_step > plan.steps_per_epoch:
        raise UsageError(
            f"--from-step {from_step} is beyond the epoch, which has {plan.steps_per_epoch} steps"
        )
    first = epoch * plan.steps_per_epoch
    for batches in _read(split, replace(plan, from_step=first + from_step), workers, steps):
        for batch in batches:
            for position, number in zip(batch.positions.tolist(), batch.ids.tolist(), strict=True):
                label = int(split.index.label[number])
                yield batch.step - first, position, split.index.key_of(number), label


def _read(
    split: SplitReader, plan: "TrainPlan", workers: int, steps: int | None
) -> Iterator[tuple["Batch", ...]]:
    """Yield the batches of all ranks for each step.

    Raises:
        DataError: A sample is unreadable.
    """
    from wds_train.loader.pipeline import Pipeline

    ranks = []
    for rank in range(plan.world):
        ranks.append(Pipeline(split, replace(plan, rank=rank), None, workers))
    # All ranks have the same number of steps.
    for batches in itertools.islice(zip(*ranks, strict=True), steps):
        for batch in batches:
            for sample in batch.unreadable:
                raise DataError(sample.named)
        yield batches
