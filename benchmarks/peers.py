"""The loaders that `wds-train bench loader` compares: ours and its peers.

Each is set up as its own documentation does it. All read the same image bytes from the same S3
server, and yield batches of RandomResizedCrop + flip as uint8. Ours and webdataset read the dataset
as it is, the others a copy in their own format. Each imports what it needs when it runs: torch
takes seconds, and the peers do not belong to a training's environment.
"""

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from wds_train.config.recipe import DataRecipe
from wds_train.dataset.index import image_of
from wds_train.dataset.reader import Dataset, SplitReader
from wds_train.dataset.shard import IMAGE_EXTENSIONS
from wds_train.errors import UsageError
from wds_train.storage.open import open_store
from wds_train.storage.s3 import S3Store

if TYPE_CHECKING:
    import torch

    from wds_train.loader.plan import TrainPlan
    from wds_train.loader.transform import TrainTransform

OURS = "wds-train"
# The crops of ImageNet recipes: share of the area, width / height; and the chance of a flip.
SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
FLIP = 0.5
# Recommended by mosaicml-streaming and litdata; ours and the others get the same.
SHARD_BYTES = 64 << 20
SIGNED_SECONDS = 86_400  # until the signed addresses of a pass end
SHUFFLE_BUFFER = 1000  # samples; what the documentation of webdataset and datasets shows


@dataclass(frozen=True)
class Pass:
    """The settings of one pass over a dataset.

    Attributes:
        dataset: The dataset's address.
        copies: The URL below which the peers' copies of it lie.
        cache: An empty local folder.
        workers: Loader processes.
        batch: Images of a batch.
        side: Side of the crops, pixels.
        epochs: Epochs of the pass; more than 1 for ours alone.
    """

    dataset: str
    copies: str
    cache: str
    workers: int
    batch: int
    side: int
    epochs: int = 1


class Contender(NamedTuple):
    """A loader that takes part.

    Attributes:
        modules: What is imported before the clock starts.
        copy: Writes a dataset's samples into a local folder in the loader's own format.
        batches: Opens the loader, an iterable of batches.
    """

    modules: tuple[str, ...]
    copy: Callable[[Dataset, Path], None] | None
    batches: Callable[[Pass], Iterable[Any]]


def missing(name: str) -> list[str]:
    """Return the modules of a contender that are not installed."""
    lacking = []
    for module in CONTENDERS[name].modules:
        package = module.partition(".")[0]
        if find_spec(package) is None:
            lacking.append(module)
    return lacking


def write_copy(name: str, wanted: Pass) -> None:
    """Put the copy that a contender reads onto the S3 server, if it needs one."""
    copy = CONTENDERS[name].copy
    if copy is None:
        return
    store = open_store(f"{wanted.copies}/{name}")
    # The writers make local folders, which our own store uploads.
    with tempfile.TemporaryDirectory(dir=wanted.cache) as folder:
        copy(Dataset.open(wanted.dataset), Path(folder))
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                store.upload(path.relative_to(folder).as_posix(), path)


def image_count(batch: Any) -> int:
    """Return how many images a batch of any contender holds."""
    if isinstance(batch, dict):
        return len(batch["image"])
    if isinstance(batch, (list, tuple)):
        return len(batch[0])
    return len(batch.images)


def _samples(dataset: Dataset, shard: int) -> Iterator[dict[str, Any]]:
    """Yield the samples of one shard, as every peer's copy holds them."""
    split = dataset.split("train")
    index = split.index
    data = memoryview(dataset.store.read(split.shard_names[shard]))
    for row in (index.shard == shard).nonzero()[0]:
        begin = int(index.offset[row])
        record = data[begin : begin + int(index.length[row])]
        yield {"image": bytes(image_of(index, int(row), record)), "label": int(index.label[row])}


def _shards(dataset: Dataset) -> list[int]:
    return list(range(len(dataset.manifest.split("train").shards)))


class _Augment:
    """Pillow's decoder and torchvision's transforms, as the documentation of every peer shows."""

    def __init__(self, side: int) -> None:
        from torchvision import transforms

        crop = transforms.RandomResizedCrop(side, SCALE, RATIO, antialias=True)
        self._transform = transforms.Compose(
            [crop, transforms.RandomHorizontalFlip(FLIP), transforms.PILToTensor()]
        )

    def __call__(self, image: Image.Image | bytes) -> "torch.Tensor":
        """Return the augmented image, uint8 [3, side, side]."""
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        return self._transform(image.convert("RGB"))

    def of_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the augmented image and the label, as Hugging Face datasets map rows."""
        return {"image": self(row["image"]), "label": row["label"]}

    def of_pair(self, row: dict[str, Any]) -> "tuple[torch.Tensor, int]":
        """Return the augmented image and the label, as a DataLoader collates pairs."""
        return self(row["image"]), row["label"]


def our_parts(wanted: Pass) -> "tuple[SplitReader, TrainPlan, TrainTransform]":
    """Return what our loader is made of: the split, the order of its samples, and the crops."""
    from wds_train.loader.plan import TrainPlan
    from wds_train.loader.transform import TrainTransform

    dataset = Dataset.open(wanted.dataset)
    split = dataset.split("train")
    epochs = range(wanted.epochs)
    plan = TrainPlan(
        split.shard_samples, dataset.fingerprint, seed=0, global_batch=wanted.batch, epochs=epochs
    )
    data = DataRecipe(size=wanted.side, scale=SCALE, ratio=RATIO, flip=FLIP)
    return split, plan, TrainTransform(data, 0, wanted.epochs, plan.steps_per_epoch)


def _ours(wanted: Pass) -> Iterable[Any]:
    from wds_train.loader.pipeline import Pipeline

    return Pipeline(*our_parts(wanted), wanted.workers)


def _webdataset(wanted: Pass) -> Iterable[Any]:
    import webdataset as wds

    dataset = Dataset.open(wanted.dataset)
    augment = _Augment(wanted.side)
    urls = [_curl(dataset, shard.name) for shard in dataset.manifest.split("train").shards]
    # Whole shards are shared by workers, so they are shuffled, too; then samples in a buffer.
    samples = (
        wds.WebDataset(urls, shardshuffle=len(urls))
        .shuffle(SHUFFLE_BUFFER)
        .decode("pil")
        .to_tuple(";".join(IMAGE_EXTENSIONS), "cls")
        .map_tuple(augment)
        .batched(wanted.batch)
    )
    return wds.WebLoader(samples, batch_size=None, num_workers=wanted.workers)


def _curl(dataset: Dataset, shard: str) -> str:
    """Return webdataset's address of a shard: it knows no s3://, but `pipe:` and a command.

    Raises:
        UsageError: The dataset is a local directory.
    """
    store = dataset.store
    if not isinstance(store, S3Store):
        raise UsageError(
            f"--peers compares reads from S3, and {store.url} is a local directory; "
            "give s3://BUCKET/PREFIX"
        )
    where = {"Bucket": store.bucket, "Key": f"{store.prefix}/{shard}".lstrip("/")}
    url = store.client.generate_presigned_url("get_object", where, ExpiresIn=SIGNED_SECONDS)
    return f"pipe:curl -sf '{url}'"


def _mosaic_copy(dataset: Dataset, folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(
        out=str(folder), columns={"image": "bytes", "label": "int"}, size_limit=SHARD_BYTES
    ) as writer:
        for shard in _shards(dataset):
            for sample in _samples(dataset, shard):
                writer.write(sample)


def _mosaic(wanted: Pass) -> Iterable[Any]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    augment = _Augment(wanted.side)

    class Images(StreamingDataset):
        def __getitem__(self, at: int) -> "tuple[torch.Tensor, int]":
            return augment.of_pair(super().__getitem__(at))

    # A pass that failed leaves names behind that the next would refuse.
    clean_stale_shared_memory()
    images = Images(
        remote=f"{wanted.copies}/mosaicml-streaming",
        local=f"{wanted.cache}/mosaic",
        shuffle=True,
        shuffle_algo="py1e",
        batch_size=wanted.batch,
    )
    return DataLoader(images, batch_size=wanted.batch, num_workers=wanted.workers)


class _Records:
    """A callable that litdata sends to its own processes, and calls for each shard."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, shard: int) -> Iterator[dict[str, Any]]:
        yield from _samples(Dataset.open(self._url), shard)


def _litdata_copy(dataset: Dataset, folder: Path) -> None:
    from litdata import optimize

    optimize(
        _Records(dataset.store.url),
        _shards(dataset),
        str(folder),
        chunk_bytes=SHARD_BYTES,
        num_workers=1,
    )


def _litdata(wanted: Pass) -> Iterable[Any]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    # It has no setting for an S3 server without TLS.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"
    images = StreamingDataset(
        f"{wanted.copies}/litdata",
        cache_dir=f"{wanted.cache}/litdata",
        shuffle=True,
        transform=_Augment(wanted.side).of_pair,
    )
    return StreamingDataLoader(images, batch_size=wanted.batch, num_workers=wanted.workers)


def _datasets_copy(dataset: Dataset, folder: Path) -> None:
    from datasets import Dataset as Table
    from datasets import Features, Image, Value

    features = Features({"image": Image(), "label": Value("int64")})
    for shard in _shards(dataset):
        rows = []
        for sample in _samples(dataset, shard):
            image = {"bytes": sample["image"], "path": None}
            rows.append({"image": image, "label": sample["label"]})
        Table.from_list(rows, features).to_parquet(folder / f"{shard:05d}.parquet")


def _datasets(wanted: Pass) -> Iterable[Any]:
    from datasets import load_dataset
    from torch.utils.data import DataLoader

    copy = open_store(f"{wanted.copies}/datasets")
    urls = [f"{copy.url}/{entry.key}" for entry in copy.list()]
    rows = load_dataset(
        "parquet",
        data_files=urls,
        split="train",
        streaming=True,
        cache_dir=f"{wanted.cache}/datasets",
    )
    rows = (
        rows.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER)
        .map(_Augment(wanted.side).of_row)
        .with_format("torch")
    )
    return DataLoader(rows, batch_size=wanted.batch, num_workers=wanted.workers)


# The keys are the names under which PyPI knows them.
TORCH = ("torch.utils.data", "torchvision.transforms")
CONTENDERS = {
    OURS: Contender(("wds_train.loader.pipeline",), None, _ours),
    "webdataset": Contender((*TORCH, "webdataset"), None, _webdataset),
    "mosaicml-streaming": Contender((*TORCH, "streaming"), _mosaic_copy, _mosaic),
    "litdata": Contender((*TORCH, "litdata"), _litdata_copy, _litdata),
    "datasets": Contender((*TORCH, "datasets", "s3fs"), _datasets_copy, _datasets),
}
