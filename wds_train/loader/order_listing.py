"""An epoch's samples in the order of the training, read through the real loader."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from wds_train.dataset.reader import Dataset
from wds_train.errors import DataError, UsageError
from wds_train.loader.pipeline import Pipeline
from wds_train.loader.plan import TrainPlan


def stream_order(
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
    """Yields (step, position, key, label) of every sample of an epoch from `from_step` on, read through the real loader
    as `world` ranks with `workers` each would, but not decoded.
    """
    split = dataset.split("train")
    plans = [
        TrainPlan(
            split.shard_samples,
            dataset.fingerprint,
            seed,
            global_batch,
            range(epoch, epoch + 1),
            rank=rank,
            world=world,
        )
        for rank in range(world)
    ]
    first = epoch * plans[0].steps_per_epoch
    if from_step > plans[0].steps_per_epoch:
        raise UsageError(f"--from-step {from_step} is beyond the epoch, which has {plans[0].steps_per_epoch} steps")
    loaders = [Pipeline(split, replace(plan, from_step=first + from_step), None, workers) for plan in plans]
    for ranks in itertools.islice(zip(*loaders, strict=True), steps):
        for batch in ranks:
            for entry in batch.unreadable:
                raise DataError(f"{entry.shard}, key {entry.key}: {entry.cause}")
            for position, sample in zip(batch.positions.tolist(), batch.ids.tolist(), strict=True):
                yield batch.step - first, position, split.index.key_of(sample), int(split.index.label[sample])
