"""Images of a training, in its order."""

from dataclasses import replace

import torch

from wds_train.config.recipe import Recipe
from wds_train.dataset.reader import Dataset, SplitReader
from wds_train.errors import UsageError
from wds_train.images.normalise import Normaliser
from wds_train.loader.arguments import Address, Mix, Normalisation, data_recipe, device_of, normalisation
from wds_train.loader.batch import Batch
from wds_train.loader.custom_transform import Function, OwnArrays
from wds_train.loader.step_loader import Steps
from wds_train.loader.transform import Form, TrainTransform, Transform


class TrainLoader(Steps[Batch]):
    """Batches of a training: the same samples in the same order for every number of ranks and workers, from any step.
    docs/loader.md says what each argument is.
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
        max_bad: float = 0.001,
        per_epoch: bool = False,
    ) -> None:
        super().__init__(
            dataset,
            batch,
            epochs,
            seed=seed,
            from_step=from_step,
            rank=rank,
            world=world,
            workers=workers,
            device=device_of(device),
            mix=mix,
            cache=cache,
            cache_gb=cache_gb,
            split=split,
            max_bad=max_bad,
            per_epoch=per_epoch,
        )
        for each in self.datasets:
            refuse_no_images(each)
        data = data_recipe(
            size=size,
            scale=scale,
            ratio=ratio,
            flip=flip,
            color_jitter=color_jitter,
            auto_augment=augment or "",
        )
        self._recipe = Recipe("loader", self.batch, self.seed, data=data)
        self._images = Images(transform, decode, normalize, self.device)

    def _transform(self, split: SplitReader) -> Transform:
        return self._images.transform(split, self.seed) or TrainTransform(self._recipe, self.steps_per_epoch)

    def _finished(self, batch: Batch) -> Batch:
        return self._images.normalised(batch)


class Images:
    """What becomes of images by a person's wishes: `function` in the place of our transform, if there is one, whose arrays
    all have one form; and pixels normalised on the device.
    """

    def __init__(self, function: Function | None, decode: bool, normalize: Normalisation, device: torch.device) -> None:
        if not decode and function is None:
            raise UsageError("decode = False gives the bytes to a transform; give transform=, too, or use SampleLoader")
        self._function, self._decode = function, decode
        self._form: Form | None = None
        data = normalisation(normalize)
        self._normalise = Normaliser(data, device) if data else None

    def transform(self, split: SplitReader, seed: int) -> OwnArrays | None:
        if self._function is None:
            return None
        own = OwnArrays(self._function, split, seed, decoded=self._decode)
        self._form = own.largest = self._form or own.measure()
        if self._normalise and not (self._form.dtype == "uint8" and len(self._form.shape) == 3 == self._form.shape[2]):
            raise UsageError(
                f"normalize is for images, uint8 [height, width, 3]; the transform returns {self._form}: leave it out"
            )
        return own

    def normalised(self, batch: Batch) -> Batch:
        return replace(batch, images=self._normalise(batch.images)) if self._normalise else batch


def refuse_no_images(dataset: Dataset) -> None:
    if dataset.manifest.image_policy.get("any"):
        raise UsageError(f"{dataset.store.url} was indexed with --any, whatever its samples hold; use SampleLoader")
