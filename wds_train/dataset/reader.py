"""An existing dataset: its manifest, and the index of a split, both checked against what they say of themselves."""

import hashlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from wds_train.dataset import manifest as manifests
from wds_train.dataset.index import SampleIndex, flaws, read_index
from wds_train.dataset.manifest import DatasetManifest, Index, Shard, read_manifest
from wds_train.dataset.shared_index import SharedRows, shared_index
from wds_train.errors import DataError, NotFound, UsageError
from wds_train.files import home
from wds_train.storage.address import (
    announce_embedded,
    announce_name,
    make_name,
    resolve_address,
)
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
    shard_bytes: tuple[int, ...]
    index: SampleIndex

    def __len__(self) -> int:
        return len(self.index)

    def shard_of(self, sample: int) -> str:
        """The name of the shard that holds it."""
        return self.shard_names[self.index.shard[sample]]

    def record(self, sample: int) -> memoryview:
        """The sample's bytes from the store, header to padding, unchecked; `image_of` checks them, and has the image in them."""
        index = self.index
        data = self.store.read(self.shard_of(sample), int(index.offset[sample]), int(index.length[sample]))
        return memoryview(data)

    def image(self, sample: int) -> bytes:
        """Its image's bytes from the store, unchecked."""
        index = self.index
        return self.store.read(self.shard_of(sample), int(index.data_offset[sample]), int(index.data_length[sample]))


@dataclass(frozen=True)
class Dataset:
    store: Store
    manifest: DatasetManifest

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> "Dataset":
        """The dataset at the address `url`, or of that name below $WDS_BUCKET/datasets, else on the embedded server."""
        if isinstance(url, os.PathLike):  # Path("./photos") has lost its "./": as a text, it would be a name
            url = str(Path(url).absolute())
        if not isinstance(url, str):
            raise UsageError(
                f"the dataset {url!r} is no address; it is s3://BUCKET/PREFIX, a path like /x or ./x, or a name"
            )
        if not url.startswith("file:///"):
            text = url
            url = resolve_address(text, "datasets")
            announce_embedded(url, text)
            announce_name(url, text)
        store = open_store(url)
        try:
            return cls(store, _manifest(store))
        except NotFound as error:
            remedy = f"check the address, or make one: wds-train shards SOURCE {shlex.quote(url)}"
            if not store.url.startswith("s3://") and any(Path(store.url).glob("*")):
                name = make_name(Path(store.url).name)
                remedy = (
                    f"make one of this folder: wds-train shards {shlex.quote(url)} {name}; it is then called {name}"
                )
            raise NotFound(f"there is no dataset at {store.url} (no {manifests.NAME}); {remedy}") from error

    @cached_property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def flaws(self, name: str, index: SampleIndex, shard: int | None = None) -> Iterator[str]:
        """Why `index` cannot be that of the split `name`, or of its `shard` alone: a sentence each."""
        shards = self.manifest.split(name).shards
        if shard is not None:
            if (index.shard != shard).any():
                yield f"it is not that of shard {shard} alone"
                return
            shards, index = shards[shard : shard + 1], replace(index, shard=np.zeros_like(index.shard))
        yield from flaws(index, [(each.bytes, each.samples) for each in shards], len(self.manifest.classes))

    def split(self, name: str) -> SplitReader:
        """The split's reader; `DataError` when the index is damaged or disagrees with the manifest. What an index for each
        shard says is looked at when it is read.
        """
        split = self.manifest.split(name)
        names, samples, sizes = zip(*((shard.name, shard.samples, shard.bytes) for shard in split.shards), strict=True)
        if isinstance(split.index, tuple):
            rows = SharedRows(samples, partial(self._read_index, name))
            index: SampleIndex = shared_index(rows.open(home() / "index", *(each.sha256 for each in split.index)))
        else:
            index = self._read_index(name)
        return SplitReader(self.store, name, names, samples, sizes, index)

    def _read_index(self, name: str, shard: int | None = None) -> SampleIndex:
        named = self.manifest.split(name).indexes[shard or 0]
        where = f"{self.store.url}/{named.name}"
        data = read_whole(self.store, named)
        if hashlib.sha256(data).hexdigest() != named.sha256:
            raise DataError(
                f"{where} is not the index that the manifest names (its sha256 differs); convert the dataset again"
            )
        index = read_index(data, where)
        for flaw in self.flaws(name, index, shard):
            raise DataError(f"{where}: {flaw}; convert the dataset again")
        return index


def _manifest(store: Store) -> DatasetManifest:
    for _ in readings(store):
        try:
            return read_manifest(store)[0]
        except DataError as error:
            damage = error
    raise damage
