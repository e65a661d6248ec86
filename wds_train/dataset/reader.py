"""An existing dataset: its manifest, and the index of each split, both checked.

The loaders, `verify` and all commands that read a dataset use `Dataset.open`.
"""

import hashlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from wds_train.dataset import manifest as manifests
from wds_train.dataset.index import SampleIndex, find_flaws, read_index
from wds_train.dataset.manifest import DatasetManifest, Index, Shard, read_manifest
from wds_train.dataset.shared_index import SharedRows, make_shared_index
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

# Damaged bytes are read so many times more. New connections are used for it, because the damage is
# most likely on a connection's way.
REREADS = 3


def readings(store: Store) -> Iterator[None]:
    """Yield for each time to read bytes: once, and up to REREADS times more while they are damaged.

    The caller leaves the loop once the bytes are right.

    Args:
        store: The store that they come from, which gets a new connection each time.
    """
    yield
    for _ in range(REREADS):
        store.reconnect()
        yield


def read_whole(store: Store, named: Index | Shard) -> bytes:
    """Read an object that a manifest names, again if its sha256 is not the manifest's.

    Args:
        store: The store of the dataset.
        named: The object.

    Returns:
        The object's bytes. Their sha256 may still be another: no reading brought the right ones.

    Raises:
        NotFound: There is no such object.
    """
    for _ in readings(store):
        data = store.read(named.name)
        if hashlib.sha256(data).hexdigest() == named.sha256:
            break
    return data


@dataclass(frozen=True)
class SplitReader:
    """One split of a dataset: its shards, and a row of the index for each sample.

    Attributes:
        store: The store of the dataset.
        name: The split's name.
        shard_names: The names of its shards, in dataset order.
        shard_samples: The number of samples in each shard.
        shard_bytes: The size of each shard.
        index: The rows of all samples.
    """

    store: Store
    name: str
    shard_names: tuple[str, ...]
    shard_samples: tuple[int, ...]
    shard_bytes: tuple[int, ...]
    index: SampleIndex

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.index)

    def shard_of(self, sample: int) -> str:
        """Return the name of the shard that holds `sample`."""
        return self.shard_names[self.index.shard[sample]]

    def record(self, sample: int) -> memoryview:
        """Read all bytes of `sample` from the store, from its first tar header to the last padding.

        They are not checked. `image_of` checks them, and returns the image's part.
        """
        offset = int(self.index.offset[sample])
        length = int(self.index.length[sample])
        return memoryview(self.store.read(self.shard_of(sample), offset, length))

    def image(self, sample: int) -> bytes:
        """Read the encoded image of `sample` from the store. Its bytes are not checked."""
        offset = int(self.index.data_offset[sample])
        length = int(self.index.data_length[sample])
        return self.store.read(self.shard_of(sample), offset, length)


@dataclass(frozen=True)
class Dataset:
    """A dataset that `wds-train shards` made: tar shards, their index, and a manifest.

    `Dataset.open` opens one by its address. `TrainLoader`, `EvalLoader` and `SampleLoader` take it,
    or open the address themselves.

    Args:
        store: The place where its objects are.
        manifest: Its manifest.

    Attributes:
        store: The place where its objects are. `store.url` is its address.
        manifest: Its manifest. `manifest.classes` has the id and name of each class, in the order
            of the labels; `manifest.splits` has the shards and the number of samples of each split.

    Example:
        >>> from wds_train import Dataset
        >>> dataset = Dataset.open("./photos-dataset")
        >>> [each.name for each in dataset.manifest.classes]
        ['cat', 'dog']
        >>> train = dataset.split("train")
        >>> len(train)
        40

        The index has a row for each sample, without a read of its image:

        >>> label = int(train.index.label[0])  # a number of a class
        >>> key = train.index.key_of(0)
        >>> width, height = int(train.index.width[0]), int(train.index.height[0])

        An image is read by its number, and is still encoded, as JPEG, PNG or the like:

        >>> encoded = train.image(0)
    """

    store: Store
    manifest: DatasetManifest

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> "Dataset":
        """Open a dataset. Its manifest is read now, the index of a split by `split`.

        Args:
            url: Its address: `s3://BUCKET/PREFIX`, a path like `/data` or `./data`, or a name below
                `$WDS_BUCKET/datasets`. Without a bucket, a name is one of the embedded server. A
                `pathlib.Path` is always a folder.

        Returns:
            The dataset.

        Raises:
            UsageError: `url` is not an address.
            NotFound: There is no dataset.
            DataError: Its manifest is damaged, or was written by a newer version.
        """
        # Path("./photos") has lost its "./". As a text, it would be a name.
        if isinstance(url, os.PathLike):
            url = str(Path(url).absolute())
        if not isinstance(url, str):
            raise UsageError(
                f"the dataset {url!r} is no address; "
                "it is s3://BUCKET/PREFIX, a path like /x or ./x, or a name"
            )
        # A name, or an address as people write it.
        if not url.startswith("file:///"):
            text = url
            url = resolve_address(text, "datasets")
            announce_embedded(url, text)
            announce_name(url, text)

        store = open_store(url)
        try:
            return cls(store, _read_manifest(store))
        except NotFound as error:
            raise NotFound(
                f"there is no dataset at {store.url} (no {manifests.NAME}); {_remedy(store, url)}"
            ) from error

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of its content, 64 hexadecimal digits; see `DatasetManifest.fingerprint`.

        Two datasets with the same fingerprint give the same batches, wherever they are.
        """
        return self.manifest.fingerprint

    def find_flaws(self, name: str, index: SampleIndex, shard: int | None = None) -> Iterator[str]:
        """Yield a sentence for each reason why `index` does not fit the manifest.

        Args:
            name: The split that it should be the index of.
            index: The index.
            shard: The number of the only shard that it should have rows of; None: all.
        """
        shards = self.manifest.split(name).shards
        if shard is not None:
            if (index.shard != shard).any():
                yield f"it is not that of shard {shard} alone"
                return
            shards = shards[shard : shard + 1]
            index = replace(index, shard=np.zeros_like(index.shard))
        sizes = [(each.bytes, each.samples) for each in shards]
        yield from find_flaws(index, sizes, len(self.manifest.classes))

    def split(self, name: str) -> SplitReader:
        """Return the reader of a split.

        If each shard has an index, it is read and checked when the first of its rows is asked
        for; the index of a whole split is read now.

        Args:
            name: The split's name: "train", "val" or another that the manifest has.

        Returns:
            The reader. `len(reader)` is the number of samples; `reader.index` has a row for each
            of them, with columns such as `label`, int32, and `width` and `height`, in pixels.

        Raises:
            DataError: There is no such split; or its index is damaged, or does not fit the
                manifest.
        """
        split = self.manifest.split(name)
        names = []
        samples = []
        sizes = []
        for shard in split.shards:
            names.append(shard.name)
            samples.append(shard.samples)
            sizes.append(shard.bytes)

        # The rows: of one index, or of one for each shard, which are read when they are needed.
        if isinstance(split.index, tuple):
            content = [each.sha256 for each in split.index]
            read_shard = partial(self._read_index, name)
            rows = SharedRows(samples, read_shard, home() / "index", content)
            index: SampleIndex = make_shared_index(rows)
        else:
            index = self._read_index(name)
        return SplitReader(
            self.store,
            name,
            shard_names=tuple(names),
            shard_samples=tuple(samples),
            shard_bytes=tuple(sizes),
            index=index,
        )

    def _read_index(self, name: str, shard: int | None = None) -> SampleIndex:
        """Read and check the index of the split `name`, or of its `shard` alone."""
        named = self.manifest.split(name).indexes[shard or 0]
        where = f"{self.store.url}/{named.name}"
        data = read_whole(self.store, named)
        if hashlib.sha256(data).hexdigest() != named.sha256:
            raise DataError(
                f"{where} is not the index that the manifest names (its sha256 differs); "
                "convert the dataset again"
            )
        index = read_index(data, where)
        for flaw in self.find_flaws(name, index, shard):
            raise DataError(f"{where}: {flaw}; convert the dataset again")
        return index


def _remedy(store: Store, url: str) -> str:
    """Return what to do about a place without a dataset."""
    # A folder with something else in it: photos, most likely.
    if not store.url.startswith("s3://") and any(Path(store.url).glob("*")):
        name = make_name(Path(store.url).name)
        return (
            f"make one of this folder: wds-train shards {shlex.quote(url)} {name}; "
            f"it is then called {name}"
        )
    return f"check the address, or make one: wds-train shards SOURCE {shlex.quote(url)}"


def _read_manifest(store: Store) -> DatasetManifest:
    """Read the manifest, again while it is damaged."""
    for _ in readings(store):
        try:
            return read_manifest(store)[0]
        except DataError as error:
            damage = error
    raise damage
