"""How well an epoch is shuffled, beside a true permutation and beside what the peers do to the same shards.

    .venv/bin/python -m benchmarks.shuffle            (mosaic's py1e where mosaicml-streaming is installed)

100,000 samples of 1,000 classes in 80 shards of 1,250 samples, batches of 256. Two figures for class-sorted and for
shuffled shards: distinct classes in a batch, and the mean distance, in the dataset, of neighbours in the epoch.
"""

import random
from collections.abc import Callable

import numpy as np

from wds_train.loader.order import EpochOrder
from wds_train.rng import Ids

SHARDS, PER_SHARD, CLASSES, BATCH = 80, 1250, 1000, 256
SAMPLES = SHARDS * PER_SHARD


def ours() -> Ids:
    order = EpochOrder([PER_SHARD] * SHARDS, fingerprint="", seed=0, epoch=0, global_batch=BATCH)
    return np.concatenate([order.batch(step) for step in range(order.steps)])


def permutation() -> Ids:
    return np.random.default_rng(0).permutation(SAMPLES)


def webdataset_buffer(workers: int = 8, size: int = 1000) -> Ids:
    """Shards shuffled and split over the workers, each with `shuffle(1000)`, batches taken from the workers in turn."""
    import webdataset as wds

    shards = list(range(SHARDS))
    random.Random(0).shuffle(shards)
    streams = []
    for worker in range(workers):
        samples = (
            shard * PER_SHARD + i for shard in shards[worker::workers] for i in range(PER_SHARD)
        )
        streams.append(
            wds.filters.shuffle(bufsize=size, initial=size, rng=random.Random(worker))(samples)
        )
    batches: list[list[int]] = []
    while streams:
        for stream in list(streams):
            batch = [sample for sample, _ in zip(stream, range(BATCH), strict=False)]
            if len(batch) < BATCH:
                streams.remove(stream)
            else:
                batches.append(batch)
    return np.concatenate([np.asarray(batch) for batch in batches])


def mosaic_py1e(workers: int = 8) -> Ids:
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle.py1e import get_shuffle_py1e

    ids = get_shuffle_py1e(np.full(SHARDS, PER_SHARD), 1, 0, 0, 4 * PER_SHARD)
    # [nodes, ranks, workers, batches, batch]: batches come from the workers in turn
    parts = get_partitions("relaxed", SAMPLES, 1, 1, 1, workers, BATCH, 0)
    places = parts[0, 0].transpose(1, 0, 2).reshape(-1)
    return ids[places[places >= 0]]


def figures(order: Ids, label_of: Ids) -> tuple[float, float]:
    batches = label_of[order[: len(order) // BATCH * BATCH]].reshape(-1, BATCH)
    distinct = np.mean([len(np.unique(batch)) for batch in batches])
    return float(distinct), float(np.abs(np.diff(order)).mean())


def main() -> None:
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
        (in_sorted, distance), (in_mixed, _) = figures(order, in_order), figures(order, mixed)
        print(f"{name:38}{in_sorted:24.1f}{in_mixed:10.1f}{distance:20,.0f}")


if __name__ == "__main__":
    main()
