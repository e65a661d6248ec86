"""An existing dataset: its manifest, and the index of a split, both checked against what they say of themselves."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from wds_train import manifest as manifests
from wds_train.errors import DataError, NotFound
from wds_train.manifest import DatasetManifest
from wds_train.store import Store, open_store
from wds_train.tario import SampleIndex, read_index


@dataclass(frozen=True)
class SplitReader:
    """One split of a dataset: where its shards are, and a row per sample."""

    store: Store
    name: str
    shard_names: tuple[str, ...]
    shard_samples: tuple[int, ...]
    index: SampleIndex

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Dataset:
    store: Store
    manifest: DatasetManifest

    @classmethod
    def open(cls, url: str) -> "Dataset":
        store = open_store(url)
        try:
            data = store.read(manifests.NAME)
        except NotFound as error:
            raise NotFound(
                f"there is no dataset at {store.url} (no {manifests.NAME}); "
                f"check the address, or make one: wds-train shards SOURCE {url}"
            ) from error
        return cls(store, DatasetManifest.from_json(data, f"{store.url}/{manifests.NAME}"))

    @cached_property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def split(self, name: str) -> SplitReader:
        """The split's reader; `DataError` when the index is damaged or disagrees with the manifest."""
        split = self.manifest.split(name)
        where = f"{self.store.url}/{split.index.name}"
        data = self.store.read(split.index.name)
        if hashlib.sha256(data).hexdigest() != split.index.sha256:
            raise DataError(
                f"{where} is not the index that the manifest names (its sha256 differs); convert the dataset again"
            )
        index = read_index(data, where)
        samples = tuple(shard.samples for shard in split.shards)
        if not np.array_equal(np.bincount(index.shard, minlength=len(samples)), samples):
            raise DataError(f"{where} and the manifest disagree on the samples per shard; convert the dataset again")
        classes = len(self.manifest.classes)
        if len(index) and not (index.label.min() >= 0 and index.label.max() < classes):
            raise DataError(
                f"{where} holds labels {index.label.min()}..{index.label.max()}, the dataset has {classes} classes"
            )
        return SplitReader(self.store, name, tuple(shard.name for shard in split.shards), samples, index)
