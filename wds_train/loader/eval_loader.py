"""Images of an evaluation: every sample of a split once."""

from collections.abc import Iterator

import torch

from wds_train.dataset.reader import Dataset
from wds_train.errors import RunError, WorkerDied
from wds_train.loader.arguments import Address, Normalisation, data_recipe, device_of, opened, place, whole
from wds_train.loader.batch import Batch
from wds_train.loader.custom_transform import Function
from wds_train.loader.pipeline import Loader, on_device
from wds_train.loader.plan import EvalPlan
from wds_train.loader.train_loader import Images, refuse_no_images
from wds_train.loader.transform import EvalTransform
from wds_train.loader.unreadable import Bound
from wds_train.loader.workers import default_workers


class EvalLoader:
    """Every sample of `split` once over all ranks, in dataset order; `samples` of them. Batches are of `batch` images, but for
    the last, and go to the ranks in turn.
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
        max_bad: float = 0.001,
    ) -> None:
        self.dataset, self.split, self.device = opened(dataset), split, device_of(device)
        refuse_no_images(self.dataset)
        self.samples = self.dataset.manifest.split(split).samples
        self._plan = EvalPlan(self.samples, whole("batch", batch, 1), *place(rank, world))
        self._workers = default_workers() if workers is None else whole("workers", workers, 0)
        data = data_recipe(eval_size=size, eval_crop=crop_ratio)
        self._bound = Bound(max_bad, self.samples)
        self._view = EvalTransform(data.eval_size, data.eval_crop)
        self._images = Images(transform, decode, normalize, self.device)
        self._loader: Loader | None = None

    def __len__(self) -> int:
        """The batches of this rank."""
        return len(self._plan.batches)

    def start(self) -> None:
        """Begin to read now, rather than with the first batch; see `TrainLoader.start`."""
        self._ready().start()

    def __iter__(self) -> Iterator[Batch]:
        self._bound.reset()
        seen = 0
        try:
            for batch in on_device(self._ready(), self.device):
                self._bound(0, batch.unreadable)
                seen += len(batch.ids)
                yield self._images.normalised(batch)
        except WorkerDied:
            self._loader = None  # the next iteration has workers of its own
            raise
        if seen != self._plan.own_samples:
            raise RunError(
                f"{seen} samples came, {self._plan.own_samples} are this rank's: the loader was iterated anew before this "
                "iteration ended; make a loader for each"
            )

    def _ready(self) -> Loader:
        if self._loader is None:
            split = self.dataset.split(self.split)
            transform = self._images.transform(split, 0) or self._view
            pinned = self.device.type == "cuda"
            self._loader = Loader(split, self._plan, transform, self._workers, pinned=pinned)
        return self._loader
