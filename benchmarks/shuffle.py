"""The quality of the shuffle of an epoch, compared with a true permutation and with other loaders.

All read the same shards: 100,000 samples of 1,000 classes in 80 shards of 1,250 samples, in batches
of 256. There are two figures, for class-sorted and for shuffled shards: distinct classes in a
batch, and the mean distance, in the dataset, of neighbours in the epoch.

    .venv/bin/python -m benchmarks.shuffle   (with mosaicml-streaming installed, its py1e too)
"""

import random
from collections.abc import Callable, Iterator

import numpy as np

from wds_train.loader.order import EpochOrder
from wds_train.rng import Ids

SHARDS = 80
PER_SHARD = 1250
SAMPLES = SHARDS * PER_SHARD
CLASSES = 1000
BATCH = 256


def ours() -> Ids:
    """Return the order of the first epoch of a wds-train training."""
    order = EpochOrder([PER_SHARD] * SHARDS, fingerprint="", seed=0, epoch=0, global_batch=BATCH)
    return np.concatenate([order.batch(step) for step in range(order.steps)])


def permutation() -> Ids:
    """Return all samples in an order that is random throughout: the best possible."""
    return np.random.default_rng(0).permutation(SAMPLES)


def webdataset_buffer(workers: int = 8, size: int = 1000) -> Ids:
    """Return webdataset's order: shards shuffled and split over workers, batches from each in turn.

    Args:
        workers: How many workers there are.
        size: The samples in the shuffle buffer of each.
    """
    import webdataset as wds

    shards = list(range(SHARDS))
    random.Random(0).shuffle(shards)

    # Each worker shuffles the samples of its shards in a buffer.
    streams = []
    for worker in range(workers):
        shuffle = wds.filters.shuffle(bufsize=size, initial=size, rng=random.Random(worker))
        streams.append(shuffle(_samples_of(shards[worker::workers])))

    # A worker leaves when it has no whole batch any more.
    batches: list[list[int]] = []
    while streams:
        for stream in list(streams):
            # zip takes a sample more from the stream than it gives, which is lost. The figures in
            # docs/benchmarks.md were measured like that.
            batch = [sample for sample, _ in zip(stream, range(BATCH), strict=False)]
            if len(batch) < BATCH:
                streams.remove(stream)
            else:
                batches.append(batch)
    return np.concatenate(batches)


def _samples_of(shards: list[int]) -> Iterator[int]:
    """Yield the numbers of the samples of `shards`, one shard after the other."""
    for shard in shards:
        yield from range(shard * PER_SHARD, (shard + 1) * PER_SHARD)


def mosaic_py1e(workers: int = 8) -> Ids:
    """Return the order of mosaicml-streaming's shuffle `py1e`, over so many workers."""
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle.py1e import get_shuffle_py1e

    ids = get_shuffle_py1e(np.full(SHARDS, PER_SHARD), 1, 0, 0, 4 * PER_SHARD)
    # [nodes, ranks, workers, batches, batch]: batches come from the workers in turn
    parts = get_partitions("relaxed", SAMPLES, 1, 1, 1, workers, BATCH, 0)
    places = parts[0, 0].transpose(1, 0, 2).reshape(-1)
    return ids[places[places >= 0]]


def figures(order: Ids, label_of: Ids) -> tuple[float, float]:
    """Describe how well samples are shuffled.

    Args:
        order: The samples of an epoch, as numbers in the dataset, int64 [samples].
        label_of: The label of every sample of the dataset, int64 [SAMPLES].

    Returns:
        The mean number of distinct classes in a batch, and the mean distance of neighbours.
    """
    batches = label_of[order[: len(order) // BATCH * BATCH]].reshape(-1, BATCH)

    # Sorted, each label that differs from the one before is another class.
    in_order = np.sort(batches, axis=1)
    distinct = 1 + np.count_nonzero(np.diff(in_order, axis=1), axis=1).mean()
    return float(distinct), float(np.abs(np.diff(order)).mean())


def main() -> None:
    """Print a line of figures for every way to shuffle that is installed."""
    # Labels of the samples in class-sorted shards, and in shuffled ones.
    in_order = np.arange(SAMPLES) * CLASSES // SAMPLES
    mixed = np.random.default_rng(1).permutation(in_order)
    ways: dict[str, Callable[[], Ids]] = {
        "true permutation": permutation,
        "wds-train": ours,
        "webdataset, shuffle(1000), 8 workers": webdataset_buffer,
        "mosaicml-streaming, py1e, 8 workers": mosaic_py1e,
    }
    print(f"{'':38}{'classes a batch: sorted':>24}{'shuffled':>10}{'neighbour distance':>20}")
    for name, make in ways.items():
        try:
            order = make()
        except ImportError as error:
            print(f"{name:38}not installed ({error.name})")
            continue
        in_sorted, distance = figures(order, in_order)
        in_mixed, _ = figures(order, mixed)
        print(f"{name:38}{in_sorted:24.1f}{in_mixed:10.1f}{distance:20,.0f}")


if __name__ == "__main__":
    main()
