"""TrainLoader: the images of a training, in its exact order.

Users' loops and `training/session.py` iterate it. What it shares with `SampleLoader` is in
`step_loader.py`; how a sample becomes an image is in `transform.py`.
"""

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
    So `step` is the whole state of a loader: see `state_dict` and `load_state_dict`.

    An epoch has only full batches. The remainder, less than one batch, is dropped, a different one
    in each epoch.

    Args:
        dataset: An open `Dataset`, or its address: `s3://BUCKET/PREFIX`, a path like `./data`, or a
            name below `$WDS_BUCKET/datasets`.
        batch: Samples of a step, over all ranks. Its largest power of two, up to 64, must be
            divisible by the number of ranks: 256 can be shared by 1, 2, 4, ... 64 ranks.
        epochs: Passes over the dataset.
        size: Side of the images, in pixels.
        seed: Seed of the order and of all random draws.
        from_step: The step to begin with, counted over all epochs.
        rank: This process's rank. Default: as torch.distributed says if it is initialised, or 0.
        world: The number of ranks. Give both `rank` and `world`, or neither.
        workers: Processes that read and decode for this rank; 0 does so in this process. Default:
            the cores that this rank may use less one, from 1 to 16.
        device: Where images and labels go: "cpu" (default) or "cuda". For a GPU, each batch is
            copied while the one before is worked on.
        normalize: True subtracts ImageNet's mean and divides by its deviation; a pair
            `(mean, deviation)` does so with those, three numbers each for pixels in [0, 1]. None
            or False (default): images stay uint8.
        augment: A policy: timm's RandAugment or AutoAugment, such as "rand-m6-mstd0.5-inc1" or
            "original", or torchvision's "trivial". Default: none.
        scale: Smallest and largest share of the image's area that a crop takes.
        ratio: Smallest and largest aspect ratio of a crop, width / height.
        flip: Probability of a horizontal flip.
        color_jitter: Largest changes of brightness, contrast and saturation (shares), and of hue
            (turns, at most 0.5), as in torchvision's ColorJitter.
        transform: A function that makes the image instead of crop, flip and policies.
            `transform(image, key, rng)` gets an upright RGB image, uint8 [height, width, 3], the
            sample's key, and a `numpy.random.Generator` that is the same whenever the sample is
            made. It returns an array; all must have one shape and dtype. It must draw from `rng`
            alone, or within `with keyed(rng):`. If it raises `DataError`, the sample counts as
            unreadable.
        decode: False gives `transform` the encoded bytes instead of pixels.
        mix: Other datasets of the same classes with their shares of each batch:
            `[("s3://bucket/more", 0.25)]`. `dataset` gives the rest, and counts the epochs.
        cache: A folder on a local disk that keeps blocks of `dataset`, so that later epochs do not
            read them again. Default: no cache.
        cache_gb: The most that the cache may hold, in GB (1e9 bytes).
        split: The split to read.
        max_bad: The share of an epoch's samples, 0 to 1, that may be unreadable before `DataError`
            is raised. Each rank counts its own. None: the caller looks at `batch.unreadable`.
        per_epoch: End each iteration at the end of an epoch; the next one goes on with the next
            epoch. By default, one iteration has all epochs.
        start_size: Side of the first epochs' images, in pixels, which grows to `size` in multiples
            of 32; 0: `size` throughout.
        size_ramp: The shares of the epochs between which the side grows.
        repeats: How often each sample stands in its batch, each time augmented again (repeated
            augmentation, Hoffer et al. 2019, arXiv:1901.09335). A pass over the dataset then takes
            so many epochs.

    Attributes:
        step: The number of batches that were handed out. Inside the loop it includes the current
            batch. Set it to go on elsewhere.
        steps: The steps of all epochs.
        steps_per_epoch: The steps of one epoch.

    Yields:
        `Batch` objects, of `batch / world` images each. `images` is uint8 [n, size, size, 3];
        with `normalize` float32 [n, 3, size, size], in channels_last on a GPU; with `transform`
        its arrays, stacked. `labels` is int64 [n]. Pixels of unreadable samples are grey.

    Raises:
        UsageError: An argument cannot work; the message says which, and what would.
        NotFound: There is no dataset at the address.
        DataError: While iterating: more samples than `max_bad` allows could not be read.
        WorkerDied: While iterating: a worker was killed, as a rule for want of memory.

    Example:
        A loop that saves the loader's state with the model's:

        >>> import torch
        >>> from wds_train import TrainLoader
        >>> loader = TrainLoader("./photos-dataset", 8, epochs=2, size=32, normalize=True)
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> for batch in loader:
        ...     loss = torch.nn.functional.cross_entropy(model(batch.images), batch.labels)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     checkpoint = {"model": model.state_dict(), "loader": loader.state_dict()}
        ...     if loader.step == 3:
        ...         break  # or the process is killed

        Another process goes on after the third step, with any number of ranks and workers:

        >>> loader = TrainLoader("./photos-dataset", 8, epochs=2, size=32, normalize=True)
        >>> loader.load_state_dict(checkpoint["loader"])
        >>> [batch.step for batch in loader]
        [3, 4, 5, 6, 7, 8, 9]
    """

    def __init__(  # noqa: PLR0913
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
        data = data_recipe(
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
        # Made here, so that an unknown policy is refused at once.
        self._own = TrainTransform(data, self.seed, self.epochs, self.steps_per_epoch)

    def _transform(self, split: SplitReader) -> Transform:
        return self._images.transform(split, self.seed) or self._own

    def _finish(self, batch: Batch) -> Batch:
        return self._images.normalise(batch)


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
        # The default transforms decode.
        if not decode and function is None:
            raise UsageError(
                "decode = False gives the bytes to a transform; "
                "give transform=, too, or use SampleLoader"
            )
        self._function = function
        self._decode = decode
        self._form: Form | None = None
        data = normalisation(normalize)
        self._normalise: Normaliser | None = None
        if data:
            self._normalise = Normaliser(data, device)

    def transform(self, split: SplitReader, seed: int) -> ArrayTransform | None:
        """Return the caller's transform for a split; None if there is none.

        Args:
            split: The split, of which the first readable sample is transformed to learn the form
                of the arrays.
            seed: The seed of the transform's generators.

        Raises:
            UsageError: Its arrays are not images, but were to be normalised.
        """
        if self._function is None:
            return None
        # A second dataset of a mixture must give arrays of the first one's form.
        custom = ArrayTransform(self._function, split, seed, decoded=self._decode, form=self._form)
        self._form = custom.largest
        if self._normalise and not _is_image(self._form):
            raise UsageError(
                "normalize is for images, uint8 [height, width, 3]; "
                f"the transform returns {self._form}: leave it out"
            )
        return custom

    def normalise(self, batch: Batch) -> Batch:
        """Return the batch with normalised images, float32 [n, 3, size, size].

        If that was not asked for, it is the batch itself.
        """
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
