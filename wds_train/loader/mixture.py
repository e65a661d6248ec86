"""Batches that take fixed shares of several datasets."""

from collections.abc import Iterator

import numpy as np
import torch

from wds_train.dataset.reader import Dataset
from wds_train.errors import UsageError
from wds_train.loader.batch import Batch, empty_images
from wds_train.loader.pipeline import Pipeline
from wds_train.rng import permutation


def of_same_classes(other: Dataset, dataset: Dataset) -> Dataset:
    if other.manifest.classes != dataset.manifest.classes:
        raise UsageError(
            f"{other.store.url} cannot be mixed into {dataset.store.url}: its {len(other.manifest.classes)} classes are not "
            f"the same {len(dataset.manifest.classes)}, in the same order; convert it again with those: "
            f"wds-train inspect {dataset.store.url} --json > classes.json, then wds-train shards ... --classes classes.json"
        )
    return other


class Mixture:
    """Batches that take fixed shares of several loaders, one of each dataset, whose plans have the shares as batches.

    Every dataset keeps its own exact order and its own epochs, and step s takes step s of each: the state is still one
    integer. `seed` decides how a batch is interleaved, because mixup pairs samples by their place.
    """

    def __init__(self, loaders: "list[Pipeline]", seed: int, *, pinned: bool = False) -> None:
        self._loaders, self._seed, self._pinned = loaders, seed, pinned

    @property
    def fallbacks(self) -> int:
        return sum(loader.fallbacks for loader in self._loaders)

    def check_workers(self) -> None:
        """Raise `WorkerDied` if a worker of any loader is no more."""
        for loader in self._loaders:
            loader.check_workers()

    def start(self) -> None:
        for loader in self._loaders:
            loader.start()

    def __iter__(self) -> Iterator[Batch]:
        for parts in zip(
            *self._loaders, strict=False
        ):  # it ends with the first dataset's plan, which counts the epochs
            yield self._interleave(parts)

    def _interleave(self, parts: tuple[Batch, ...]) -> Batch:
        step, sizes = parts[0].step, [len(part.ids) for part in parts]
        places = np.split(permutation(sum(sizes), self._seed, "mixture", step), np.cumsum(sizes)[:-1])
        of_first = parts[0].images.numpy()
        images = empty_images((sum(sizes), *of_first.shape[1:]), of_first.dtype, pinned=self._pinned)
        labels = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=self._pinned)
        positions, ids = np.empty(sum(sizes), np.int64), np.empty(sum(sizes), np.int64)
        for part, place in zip(parts, places, strict=True):
            images[place], labels[place] = part.images, part.labels
            positions[place], ids[place] = part.positions, part.ids
        unreadable, items = (
            [each for part in parts for each in getattr(part, name)] for name in ("unreadable", "items")
        )
        at = np.argsort(np.concatenate(places)) if items else ()
        return Batch(step, positions, ids, images, labels, unreadable, parts[0].epoch, [items[i] for i in at])
