"""EvalLoader: every sample of a split once, for an evaluation."""

from collections.abc import Iterator

import torch

from wds_train.dataset.reader import Dataset
from wds_train.errors import RunError, WorkerDied
from wds_train.loader.arguments import (
    Address,
    Normalisation,
    data_recipe,
    device_of,
    open_dataset,
    place,
    whole,
)
from wds_train.loader.batch import Batch
from wds_train.loader.custom_transform import Function
from wds_train.loader.pipeline import Pipeline, copy_to_device
from wds_train.loader.plan import EvalPlan
from wds_train.loader.train_loader import Images, refuse_no_images
from wds_train.loader.transform import EvalTransform
from wds_train.loader.unreadable import UnreadableCounter, UnreadableLimit
from wds_train.loader.workers import default_workers


class EvalLoader:
    """Every sample of a split once over all ranks, in dataset order.

    Batches go to the ranks in turn. All have `batch` images but the last. Each iteration is a
    whole pass.

    Args:
        dataset: An open `Dataset`, or its address, as for `TrainLoader`.
        batch: Samples of a batch.
        split: The split to read.
        size: Side of the images, pixels.
        crop_ratio: Share of the shorter side that the central square keeps.
        rank: This process's rank. Default: as torch.distributed says.
        world: The number of ranks. Give both `rank` and `world`, or neither.
        workers: Processes that decode; 0 decodes in this one. Default: the cores less one.
        device: Where images and labels go: "cpu" (default) or "cuda".
        normalize: As for `TrainLoader`.
        transform: A function of your own instead, as for `TrainLoader`.
        decode: False gives `transform` the encoded bytes.
        max_bad: The share of the samples that may be unreadable before `DataError` is raised. None:
            the caller looks at `batch.unreadable` itself.

    Attributes:
        samples: The samples of the split, over all ranks.

    Raises:
        UsageError: An argument cannot work; the message says which, and what would.
        DataError: While iterating: more samples than `max_bad` allows could not be read.

    Example:
        >>> loader = EvalLoader("imagenet", 256, normalize=True)  # doctest: +SKIP
        >>> correct = sum(
        ...     (model(batch.images).argmax(1) == batch.labels).sum() for batch in loader
        ... )  # doctest: +SKIP
        >>> correct / loader.samples  # doctest: +SKIP
    """

    def __init__(
        self,
        dataset: Dataset | Address,
        batch: int,
        *,
        split: str = "val",
        size: int = 224,
        crop_ratio: float = 0.875,
        rank: int | None = None,
        world: int | None = None,
        workers: int | None = None,
        device: torch.device | str | None = None,
        normalize: Normalisation = None,
        transform: Function | None = None,
        decode: bool = True,
        max_bad: float | None = 0.001,
    ) -> None:
        self.dataset = open_dataset(dataset)
        self.split = split
        self.device = device_of(device)
        refuse_no_images(self.dataset)
        self.samples = self.dataset.manifest.split(split).samples
        self._plan = EvalPlan(self.samples, whole("batch", batch, 1), *place(rank, world))
        self._workers = default_workers() if workers is None else whole("workers", workers, 0)
        data = data_recipe(eval_size=size, eval_crop=crop_ratio)
        self._view = EvalTransform(data.eval_size, data.eval_crop)
        self._images = Images(transform, decode, normalize, self.device)
        self._unreadable = None
        if max_bad is not None:
            self._unreadable = UnreadableCounter(UnreadableLimit(max_bad, self.samples))
        self._pipeline: Pipeline | None = None

    def __len__(self) -> int:
        """The batches of this rank."""
        return len(self._plan.batches)

    @property
    def fallbacks(self) -> int:
        """The ranges that took a second request, of this process and its workers."""
        return self._pipeline.fallbacks if self._pipeline else 0

    def start(self) -> None:
        """Begin to read now, rather than with the first batch; see `TrainLoader.start`."""
        self._ready().start()

    def check_workers(self) -> None:
        """Raise `WorkerDied` if a worker has died."""
        if self._pipeline:
            self._pipeline.check_workers()

    def __iter__(self) -> Iterator[Batch]:
        if self._unreadable:
            self._unreadable.reset()
        seen = 0
        try:
            for batch in copy_to_device(self._ready(), self.device):
                if self._unreadable:
                    self._unreadable.add(0, batch.unreadable)
                seen += len(batch.ids)
                yield self._images.normalised(batch)
        except WorkerDied:
            self._pipeline = None  # the next iteration has workers of its own
            raise
        if seen != self._plan.own_samples:
            raise RunError(
                f"{seen} samples came, {self._plan.own_samples} are this rank's: "
                "the loader was iterated anew before this iteration ended; make a loader for each"
            )

    def _ready(self) -> Pipeline:
        if self._pipeline is None:
            split = self.dataset.split(self.split)
            transform = self._images.transform(split, 0) or self._view
            pinned = self.device.type == "cuda"
            self._pipeline = Pipeline(split, self._plan, transform, self._workers, pinned=pinned)
        return self._pipeline
