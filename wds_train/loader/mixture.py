"""Batches that take fixed shares of several datasets: the `mix` of a loader."""

from collections.abc import Iterator

import numpy as np
import torch

from wds_train.dataset.reader import Dataset
from wds_train.errors import UsageError
from wds_train.loader.batch import Batch, empty_images
from wds_train.loader.pipeline import Pipeline
from wds_train.rng import permutation


def check_same_classes(other: Dataset, dataset: Dataset) -> Dataset:
    """Return a dataset that is to be mixed into another one.

    Args:
        other: The dataset.
        dataset: The first dataset of the mixture.

    Raises:
        UsageError: They have different classes, or the same ones in another order.
    """
    if other.manifest.classes != dataset.manifest.classes:
        url = dataset.store.url
        raise UsageError(
            f"{other.store.url} cannot be mixed into {url}: its {len(other.manifest.classes)} "
            f"classes are not the same {len(dataset.manifest.classes)}, in the same order; "
            f"convert it again with those: wds-train inspect {url} --json > classes.json, "
            "then wds-train shards ... --classes classes.json"
        )
    return other


class Mixture:
    """Batches that take fixed shares of several datasets.

    Every dataset keeps its own exact order and its own epochs, and step s takes step s of each. So
    the state is still one integer.

    Args:
        loaders: The pipeline of each dataset, whose plan has the dataset's share as its batch. The
            first one's plan counts the epochs, and ends the mixture.
        seed: Decides how a batch is interleaved, which matters because mixup pairs samples by
            their place.
        pinned: Interleave into memory that a GPU copies from.
    """

    def __init__(self, loaders: list[Pipeline], seed: int, *, pinned: bool = False) -> None:
        self._loaders = loaders
        self._seed = seed
        self._pinned = pinned

    @property
    def fallbacks(self) -> int:
        """The ranges that took a second request, of all loaders."""
        return sum(loader.fallbacks for loader in self._loaders)

    def check_workers(self) -> None:
        """Raise `WorkerDied` if a worker of any loader has died."""
        for loader in self._loaders:
            loader.check_workers()

    def start(self) -> None:
        """Fork the workers of all loaders and begin to read; see `Pipeline.start`."""
        for loader in self._loaders:
            loader.start()

    def __iter__(self) -> Iterator[Batch]:
        # Not strict: the first dataset's plan ends it, and the others may have more steps.
        for parts in zip(*self._loaders, strict=False):
            yield self._interleave(parts)

    def _interleave(self, parts: tuple[Batch, ...]) -> Batch:
        """Make one batch of each dataset's part of it."""
        # The places in the batch, of each part's samples.
        first = parts[0]
        ends = np.cumsum([len(part.ids) for part in parts])
        total = int(ends[-1])
        shuffled = permutation(total, self._seed, "mixture", first.step)
        places = np.split(shuffled, ends[:-1])

        # Pixels are copied once, straight to their places.
        pixels = first.images.numpy()
        images = empty_images((total, *pixels.shape[1:]), pixels.dtype, pinned=self._pinned)
        labels = torch.empty(total, dtype=torch.int64, pin_memory=self._pinned)
        positions = np.empty(total, np.int64)
        ids = np.empty(total, np.int64)
        for part, place in zip(parts, places, strict=True):
            images[place] = part.images
            labels[place] = part.labels
            positions[place] = part.positions
            ids[place] = part.ids

        # Lists go the same way: the permutation is inverted by its argsort.
        unreadable = []
        items = []
        for part in parts:
            unreadable += part.unreadable
            items += part.items
        if items:
            items = [items[number] for number in np.argsort(shuffled)]
        return Batch(first.step, positions, ids, images, labels, unreadable, first.epoch, items)
