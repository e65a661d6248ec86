"""TrainLoader: the images of a training, in its exact order."""

from dataclasses import replace

import numpy as np
import torch

from wds_train.config.recipe import DataRecipe
from wds_train.dataset.reader import Dataset, SplitReader
from wds_train.errors import UsageError
from wds_train.images.normalise import Normaliser
from wds_train.loader.arguments import (
    Address,
    Mix,
    Normalisation,
    data_recipe,
    device_of,
    normalisation,
    place,
)
from wds_train.loader.batch import Batch
from wds_train.loader.custom_transform import ArrayTransform, Function
from wds_train.loader.step_loader import StepLoader
from wds_train.loader.transform import Form, TrainTransform, Transform


class TrainLoader(StepLoader[Batch]):
    """Batches of augmented images for a training, in an exact order.

    The same samples come in the same order for every number of ranks and workers, from any step.
    The order of an epoch is a pure function of the dataset's fingerprint, `seed` and the epoch.

    Args:
        dataset: An open `Dataset`, or its address: `s3://BUCKET/PREFIX`, a path like `./data`, or a
            name below `$WDS_BUCKET/datasets`.
        batch: Samples of a step, over all ranks.
        epochs: Passes over the dataset.
        size: Side of the images, pixels.
        seed: Seed of the order and of all random draws.
        from_step: The step to begin with.
        rank: This process's rank. Default: as torch.distributed says.
        world: The number of ranks. Give both `rank` and `world`, or neither.
        workers: Processes that decode; 0 decodes in this one. Default: the cores less one.
        device: Where images and labels go: "cpu" (default) or "cuda".
        normalize: True normalises by ImageNet's mean and deviation, a pair `(mean, deviation)` by
            those: images are then float32 [n, 3, size, size] on the device. Otherwise they are
            uint8 [n, size, size, 3].
        augment: A policy of timm, such as "rand-m6-mstd0.5-inc1", or "trivial".
        scale: Smallest and largest share of the image's area that a crop takes.
        ratio: Smallest and largest aspect ratio of a crop, width / height.
        flip: Probability of a horizontal flip.
        color_jitter: Largest changes of brightness, contrast, saturation and hue.
        transform: A function of your own instead: `transform(image, key, rng)` gets uint8
            [height, width, 3] and returns an array; all must have one shape and dtype.
        decode: False gives `transform` the encoded bytes.
        mix: Other datasets with their shares of each batch: `[("s3://bucket/more", 0.25)]`.
        cache: A local folder that keeps blocks of the dataset for later epochs.
        cache_gb: The most that the cache may hold, GB.
        split: The split to read.
        max_bad: The share of an epoch's samples that may be unreadable before `DataError` is
            raised. None: the caller looks at `batch.unreadable` itself.
        per_epoch: End each iteration at the end of an epoch.
        start_size: Side of the first epochs' images, which grows to `size`; 0: `size` throughout.
        size_ramp: The shares of the epochs between which the side grows.
        repeats: How often each sample stands in its batch, each time augmented again (repeated
            augmentation, Hoffer et al. 2019, arXiv:1901.09335). A pass then takes so many epochs.

    Raises:
        UsageError: An argument cannot work; the message says which, and what would.
        DataError: While iterating: more samples than `max_bad` allows could not be read.

    Example:
        >>> loader = TrainLoader("imagenet", 256, epochs=90, normalize=True)  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     loss = criterion(model(batch.images), batch.labels)
        ...     checkpoint = {"loader": loader.state_dict()}
    """

    def __init__(
        self,
        dataset: Dataset | Address,
        batch: int,
        *,
        epochs: int,
        size: int = 224,
        seed: int = 0,
        from_step: int = 0,
        rank: int | None = None,
        world: int | None = None,
        workers: int | None = None,
        device: torch.device | str | None = None,
        normalize: Normalisation = None,
        augment: str = "",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
        transform: Function | None = None,
        decode: bool = True,
        mix: Mix = (),
        cache: Address | None = None,
        cache_gb: float = 200,
        split: str = "train",
        max_bad: float | None = 0.001,
        per_epoch: bool = False,
        start_size: int = 0,
        size_ramp: tuple[float, float] = DataRecipe.size_ramp,
        repeats: int = 1,
    ) -> None:
        super().__init__(
            dataset,
            batch,
            epochs,
            seed=seed,
            from_step=from_step,
            ranks=place(rank, world),
            workers=workers,
            device=device_of(device),
            mix=mix,
            cache=cache,
            cache_gb=cache_gb,
            split=split,
            max_bad=max_bad,
            per_epoch=per_epoch,
            repeats=repeats,
        )
        refuse_no_images(*self.datasets)
        self._data = data_recipe(
            size=size,
            start_size=start_size,
            size_ramp=size_ramp,
            scale=scale,
            ratio=ratio,
            flip=flip,
            color_jitter=color_jitter,
            auto_augment=augment or "",
        )
        self._images = Images(transform, decode, normalize, self.device)

    def _transform(self, split: SplitReader) -> Transform:
        custom = self._images.transform(split, self.seed)
        return custom or TrainTransform(self._data, self.seed, self.epochs, self.steps_per_epoch)

    def _finish(self, batch: Batch) -> Batch:
        return self._images.normalised(batch)


class Images:
    """The transform and the normalisation of images that the caller asked for.

    Args:
        function: The caller's transform, whose arrays must all have one form.
        decode: Give it pixels; False: the encoded bytes.
        normalize: The `normalize` of `TrainLoader`.
        device: Where pixels are normalised.
    """

    def __init__(
        self,
        function: Function | None,
        decode: bool,
        normalize: Normalisation,
        device: torch.device,
    ) -> None:
        if not decode and function is None:
            raise UsageError(
                "decode = False gives the bytes to a transform; "
                "give transform=, too, or use SampleLoader"
            )
        self._function = function
        self._decode = decode
        self._form: Form | None = None
        data = normalisation(normalize)
        self._normalise = Normaliser(data, device) if data else None

    def transform(self, split: SplitReader, seed: int) -> ArrayTransform | None:
        """Return the caller's transform of the samples of `split`; None if there is none.

        Raises:
            UsageError: Its arrays are not images, but were to be normalised.
        """
        if self._function is None:
            return None
        custom = ArrayTransform(self._function, split, seed, decoded=self._decode, form=self._form)
        self._form = custom.largest
        if self._normalise and not _is_image(self._form):
            raise UsageError(
                "normalize is for images, uint8 [height, width, 3]; "
                f"the transform returns {self._form}: leave it out"
            )
        return custom

    def normalised(self, batch: Batch) -> Batch:
        """Return the batch with normalised images, if that was asked for."""
        if self._normalise is None:
            return batch
        return replace(batch, images=self._normalise(batch.images))


def refuse_no_images(*datasets: Dataset) -> None:
    """Raise `UsageError` if the samples of a dataset may hold anything, and no images."""
    for dataset in datasets:
        if dataset.manifest.image_policy.get("any"):
            raise UsageError(
                f"{dataset.store.url} was indexed with --any, whatever its samples hold; "
                "use SampleLoader"
            )


def _is_image(form: Form) -> bool:
    return form.dtype == np.uint8 and len(form.shape) == 3 and form.shape[2] == 3
