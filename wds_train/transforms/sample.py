"""What happens to one image on its way into a batch: in training, and in validation."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from wds_train.config.recipe import Recipe
from wds_train.config.schedule import image_side
from wds_train.rng import rekeyed
from wds_train.transforms.crop import Box, random_resized_crop
from wds_train.transforms.decode import decode_center, decode_crop
from wds_train.transforms.policies import apply, policies


class Transform(Protocol):
    @property
    def side(self) -> int:
        """The largest side of any step's images, in pixels."""

    def size(self, step: int) -> int:
        """The side of the square images of `step`, in pixels."""

    def decode(
        self, data: memoryview, epoch: int, position: int, size: tuple[int, int], out: NDArray[np.uint8]
    ) -> None:
        """Fill `out`, uint8 [side, side, 3], from the image `data` of `size`, which is at `position` of the epoch."""


@dataclass(frozen=True)
class TrainTransform:
    """What `recipe.data` asks for up to uint8 pixels. The images' side follows the recipe's epochs, of `steps_per_epoch`;
    the draws are keyed by (seed, epoch, position): the same whoever decodes it, whenever.
    """

    recipe: Recipe
    steps_per_epoch: int

    def __post_init__(self) -> None:
        # Before loader workers fork: they would each import timm and torchvision, and report a bad policy too late.
        policies(self.recipe.data, self.side)

    @property
    def side(self) -> int:
        return self.recipe.data.size

    def size(self, step: int) -> int:
        return image_side(self.recipe.data, step // self.steps_per_epoch, self.recipe.schedule.epochs)

    def crop(self, epoch: int, position: int, width: int, height: int) -> tuple[Box, bool]:
        data, rng = self.recipe.data, rekeyed(self.recipe.seed, "augment", epoch, position)
        flip = bool(rng.random() < data.flip)
        return random_resized_crop(rng, width, height, data.scale, data.ratio), flip

    def decode(
        self, data: memoryview, epoch: int, position: int, size: tuple[int, int], out: NDArray[np.uint8]
    ) -> None:
        box, flip = self.crop(epoch, position, *size)
        decode_crop(data, box, out, flip=flip)
        self.augment(epoch, position, out)

    def augment(self, epoch: int, position: int, pixels: NDArray[np.uint8]) -> None:
        apply(policies(self.recipe.data, len(pixels)), pixels, self.recipe.seed, "policy", epoch, position)


@dataclass(frozen=True)
class EvalTransform:
    """The central square, `crop_ratio` of the shorter side, as timm cuts it."""

    side: int
    crop_ratio: float

    def size(self, step: int) -> int:
        return self.side

    def decode(
        self, data: memoryview, epoch: int, position: int, size: tuple[int, int], out: NDArray[np.uint8]
    ) -> None:
        decode_center(data, self.crop_ratio, out)
