"""What happens to one image on its way into a batch: in training, and in validation."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from wds_train.config.recipe import Recipe
from wds_train.config.schedule import image_side
from wds_train.images.crop import Box, random_resized_crop
from wds_train.images.decode import decode_center, decode_crop
from wds_train.images.policies import apply, policies
from wds_train.rng import rekeyed


class Form(NamedTuple):
    """What becomes of a sample: an array of this `shape` and `dtype`. One of objects holds anything."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"{self.dtype} {[*self.shape]}"

    @property
    def holds_objects(self) -> bool:
        return self.dtype == object

    @property
    def bytes(self) -> int:
        """What it takes of shared memory, into which no object can be put."""
        return 0 if self.holds_objects else math.prod(self.shape) * self.dtype.itemsize

    @property
    def blank(self) -> int | None:
        """What an array of an unreadable sample is filled with: grey, where it is of pixels."""
        return None if self.holds_objects else 128 if self.dtype == np.uint8 else 0


def square(side: int) -> Form:
    """The form of an image of `side` pixels."""
    return Form((side, side, 3), np.dtype(np.uint8))


class Place(NamedTuple):
    """A sample of a split, its image's width and height by the index, and where it stands: at `position` of the epoch."""

    sample: int
    size: tuple[int, int]
    epoch: int
    position: int


class Transform(Protocol):
    @property
    def largest(self) -> Form:
        """The largest form of any step."""

    def form(self, step: int) -> Form:
        """What the samples of `step` become."""

    def draw(self, place: Place) -> Any:
        """What `decode` is to have that is random about the sample at `place`. Drawn for all samples of a part before one of
        them is decoded: between two decodes, which leave nothing of a generator in the CPU's caches, it takes 3 times as long.
        """

    def decode(self, data: memoryview, place: Place, drawn: Any, out: NDArray[Any]) -> None:
        """Fill `out`, of the step's form, from the bytes `data` of the sample at `place`."""


@dataclass(frozen=True)
class TrainTransform:
    """What `recipe.data` asks for up to uint8 pixels. The images' side follows the recipe's epochs, of `steps_per_epoch`;
    the draws are keyed by (seed, epoch, position): the same whoever decodes it, whenever.
    """

    recipe: Recipe
    steps_per_epoch: int

    def __post_init__(self) -> None:
        # Before loader workers fork: they would each import timm and torchvision, and report a bad policy too late.
        policies(self.recipe.data, self.recipe.data.size)

    @property
    def largest(self) -> Form:
        return square(self.recipe.data.size)

    def form(self, step: int) -> Form:
        return square(image_side(self.recipe.data, step // self.steps_per_epoch, self.recipe.schedule.epochs))

    def draw(self, place: Place) -> tuple[Box, bool]:
        """Where to cut, and whether to flip."""
        data, rng = self.recipe.data, rekeyed(self.recipe.seed, "augment", place.epoch, place.position)
        flip = bool(rng.random() < data.flip)
        return random_resized_crop(rng, *place.size, data.scale, data.ratio), flip

    def decode(self, data: memoryview, place: Place, drawn: tuple[Box, bool], out: NDArray[np.uint8]) -> None:
        box, flip = drawn
        decode_crop(data, box, out, flip=flip)
        self.augment(place.epoch, place.position, out)

    def augment(self, epoch: int, position: int, pixels: NDArray[np.uint8]) -> None:
        apply(policies(self.recipe.data, len(pixels)), pixels, self.recipe.seed, "policy", epoch, position)


@dataclass(frozen=True)
class EvalTransform:
    """The central square, `crop_ratio` of the shorter side, as timm cuts it."""

    side: int
    crop_ratio: float

    @property
    def largest(self) -> Form:
        return square(self.side)

    def form(self, step: int) -> Form:
        return square(self.side)

    def draw(self, place: Place) -> None:
        """Nothing."""

    def decode(self, data: memoryview, place: Place, drawn: None, out: NDArray[np.uint8]) -> None:
        decode_center(data, self.crop_ratio, out)
