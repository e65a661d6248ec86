"""The loader. What a batch goes through, all of it inside one loader worker:

    requests   (order.py)  for every lane of this worker, the windows that come next, in the order of the step that
                           first needs them: Request(step, epoch, lane, ids)
    fetch      (store.py)  ranged GETs of whole blocks by a few threads, a bounded number of bytes ahead; every
                           sample's CRC is checked, a damaged one is fetched again: Fetched(request, records)
    assemble               step by step, the next samples of each lane: Part(step, places, ids, records)
    decode     (decode.py) crop, resize and flip straight into the worker's slot of shared memory, then the policies of
                           the recipe (policies.py), in place: Decoded

and in the trainer's process:

    merge                  the parts of one step, of all workers, copied in lane order (into pinned memory, for a GPU): Batch

The stages are a `webdataset.DataPipeline` behind `webdataset.WebLoader`. Nothing is consumed that a state would have
to hold: a loader starts at any step, and its batches are the same for every number of ranks and workers.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from wds_train.data.dataset import Dataset
from wds_train.data.loader import Loader
from wds_train.data.plan import TrainPlan
from wds_train.errors import DataError, UsageError


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
    loaders = [Loader(split, replace(plan, from_step=first + from_step), None, workers) for plan in plans]
    for ranks in itertools.islice(zip(*loaders, strict=True), steps):
        for batch in ranks:
            for entry in batch.unreadable:
                raise DataError(f"{entry.shard}, key {entry.key}: {entry.cause}")
            for position, sample in zip(batch.positions.tolist(), batch.ids.tolist(), strict=True):
                yield batch.step - first, position, split.index.key_of(sample), int(split.index.label[sample])
