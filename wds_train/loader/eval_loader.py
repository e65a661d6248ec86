"""EvalLoader: every sample of a split once, for an evaluation.

Users' loops, the training's validation and `wds-train eval` iterate it.
"""

from collections.abc import Iterator

import torch

from wds_train.dataset.reader import Dataset
from wds_train.errors import RunError, WorkerDied
from wds_train.loader.arguments import (
    Address,
    Normalisation,
    count_workers,
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


class EvalLoader:
    """Every sample of a split once over all ranks, in dataset order.

    Each iteration is a whole pass. All batches have `batch` images but the last. They go to the
    ranks in turn, so that one rank may have a batch more than another: call collectives of
    torch.distributed after the loop, not inside it.

    The pixels are those of timm's transform for evaluation, to the last bit.

    Args:
        dataset: An open `Dataset`, or its address: `s3://BUCKET/PREFIX`, a path like `./data`, or a
            name below `$WDS_BUCKET/datasets`.
        batch: Samples of a batch.
        split: The split to read.
        size: Side of the images, in pixels.
        crop_ratio: Share of the shorter side that the central square keeps, above 0 and up to 1.
        rank: This process's rank. Default: as torch.distributed says if it is initialised, or 0.
        world: The number of ranks. Give both `rank` and `world`, or neither.
        workers: Processes that read and decode for this rank; 0 does so in this process. Default:
            the cores that this rank may use less one, from 1 to 16.
        device: Where images and labels go: "cpu" (default) or "cuda".
        normalize: True subtracts ImageNet's mean and divides by its deviation; a pair
            `(mean, deviation)` does so with those, three numbers each for pixels in [0, 1]. None
            or False (default): images stay uint8.
        transform: A function that makes the image instead of the central crop:
            `transform(image, key, rng)`, as for `TrainLoader`.
        decode: False gives `transform` the encoded bytes instead of pixels.
        max_bad: The share of the samples, 0 to 1, that may be unreadable before `DataError` is
            raised. Each rank counts its own. None: the caller looks at `batch.unreadable`.

    Attributes:
        samples: The samples of the split, over all ranks.

    Yields:
        `Batch` objects. `images` is uint8 [n, size, size, 3]; with `normalize` float32
        [n, 3, size, size], in channels_last on a GPU; with `transform` its arrays, stacked.
        `labels` is int64 [n]. Pixels of unreadable samples are grey.

    Raises:
        UsageError: An argument cannot work; the message says which, and what would.
        NotFound: There is no dataset at the address.
        DataError: While iterating: more samples than `max_bad` allows could not be read.
        RunError: While iterating: another iteration of this loader began before this one ended.
        WorkerDied: While iterating: a worker was killed, as a rule for want of memory.

    Example:
        >>> import torch
        >>> from wds_train import EvalLoader
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
        >>> loader = EvalLoader("./photos-dataset", 8, size=32, normalize=True)
        >>> correct = 0
        >>> for batch in loader:
        ...     predicted = model(batch.images).argmax(dim=1)
        ...     correct += int((predicted == batch.labels).sum())
        >>> accuracy = correct / loader.samples
        >>> 0 <= accuracy <= 1
        True
    """

    def __init__(  # noqa: PLR0913
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
        # The samples, and this rank's part of them.
        self.dataset = open_dataset(dataset)
        self.split = split
        self.device = device_of(device)
        refuse_no_images(self.dataset)
        self.samples = self.dataset.manifest.split(split).samples
        self._plan = EvalPlan(self.samples, whole("batch", batch, 1), *place(rank, world))
        self._workers = count_workers(workers)

        # The images that are made of them.
        data = data_recipe(eval_size=size, eval_crop=crop_ratio)
        self._view = EvalTransform(data.eval_size, data.eval_crop)
        self._images = Images(transform, decode, normalize, self.device)

        # The state of a pass.
        self._unreadable: UnreadableCounter | None = None
        if max_bad is not None:
            self._unreadable = UnreadableCounter(UnreadableLimit(max_bad, self.samples))
        self._pipeline: Pipeline | None = None

    def __len__(self) -> int:
        """The batches of this rank."""
        return len(self._plan.batches)

    @property
    def fallbacks(self) -> int:
        """The ranges that took a second request, of this process and its workers."""
        if self._pipeline is None:
            return 0
        return self._pipeline.fallbacks

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
        # Two iterations at a time would share the workers' batches: the count finds it.
        seen = 0
        try:
            for batch in copy_to_device(self._ready(), self.device):
                if self._unreadable:
                    self._unreadable.add(0, batch.unreadable)
                seen += len(batch.ids)
                yield self._images.normalise(batch)
        except WorkerDied:
            self._pipeline = None  # the next iteration forks new workers
            raise
        if seen != self._plan.own_samples:
            raise RunError(
                f"{seen} samples came, {self._plan.own_samples} are this rank's: "
                "the loader was iterated anew before this iteration ended; make a loader for each"
            )

    def _ready(self) -> Pipeline:
        """Return the pipeline, whose workers are kept from one iteration to the next."""
        if self._pipeline is None:
            split = self.dataset.split(self.split)
            # The seed of a transform is 0: an evaluation has no seed, and is always the same.
            transform = self._images.transform(split, 0) or self._view
            # A GPU copies from pinned memory without stopping the loop.
            pinned = self.device.type == "cuda"
            self._pipeline = Pipeline(split, self._plan, transform, self._workers, pinned=pinned)
        return self._pipeline
