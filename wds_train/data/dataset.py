"""An existing dataset: its manifest, and the index of a split, both checked against what they say of themselves."""

import hashlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from wds_train.errors import DataError, NotFound
from wds_train.format import manifest as manifests
from wds_train.format.index import SampleIndex, flaws, read_index
from wds_train.format.manifest import DatasetManifest, Index, Shard, read_manifest
from wds_train.storage.address import announced, located, name_from, not_here
from wds_train.storage.base import Store
from wds_train.storage.open import open_store

REREADS = 3


def readings(store: Store) -> Iterator[None]:
    """The times that bytes are read which come damaged: once, and up to `REREADS` times more over new connections, since
    what damages bytes is likelier to be on a connection's way.
    """
    yield
    for _ in range(REREADS):
        store.reconnect()
        yield


def read_whole(store: Store, named: Index | Shard) -> bytes:
    """The bytes of an object that a manifest names: those of its sha256, if any reading brings them."""
    for _ in readings(store):
        data = store.read(named.name)
        if hashlib.sha256(data).hexdigest() == named.sha256:
            break
    return data


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
        """The dataset at the address `url`, or of that name below $WDS_BUCKET/datasets, else on the embedded server."""
        if not url.startswith("file:///"):
            url = not_here(announced(located(url, "datasets"), url), url)
        store = open_store(url)
        try:
            return cls(store, _manifest(store))
        except NotFound as error:
            remedy = f"check the address, or make one: wds-train shards SOURCE {url}"
            if not store.url.startswith("s3://") and any(Path(store.url).glob("*")):
                name = name_from(Path(store.url).name)
                remedy = (
                    f"make one of this folder: wds-train shards {shlex.quote(url)} {name}; it is then called {name}"
                )
            raise NotFound(f"there is no dataset at {store.url} (no {manifests.NAME}); {remedy}") from error

    @cached_property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def flaws(self, name: str, index: SampleIndex) -> Iterator[str]:
        """Why `index` cannot be that of the split `name`, a sentence each."""
        shards = [(shard.bytes, shard.samples) for shard in self.manifest.split(name).shards]
        return flaws(index, shards, len(self.manifest.classes))

    def split(self, name: str) -> SplitReader:
        """The split's reader; `DataError` when the index is damaged or disagrees with the manifest."""
        split = self.manifest.split(name)
        where = f"{self.store.url}/{split.index.name}"
        data = read_whole(self.store, split.index)
        if hashlib.sha256(data).hexdigest() != split.index.sha256:
            raise DataError(
                f"{where} is not the index that the manifest names (its sha256 differs); convert the dataset again"
            )
        index = read_index(data, where)
        for flaw in self.flaws(name, index):
            raise DataError(f"{where}: {flaw}; convert the dataset again")
        samples = tuple(shard.samples for shard in split.shards)
        return SplitReader(self.store, name, tuple(shard.name for shard in split.shards), samples, index)


def _manifest(store: Store) -> DatasetManifest:
    for _ in readings(store):
        try:
            return read_manifest(store)[0]
        except DataError as error:
            damage = error
    raise damage
