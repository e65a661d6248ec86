"""Transforms of one image on its way into a batch: for training, and for evaluation.

A `Transform` runs in a loader worker (`decoder.py`). Those that call a user's function are in
`custom_transform.py`.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from wds_train.config.recipe import DataRecipe
from wds_train.config.schedule import image_side
from wds_train.images.crop import Box, random_resized_crop
from wds_train.images.decode import decode_center, decode_crop
from wds_train.images.policies import apply, policies
from wds_train.rng import rekeyed

GREY = 128  # the pixels of an unreadable image: neither black nor white


class Form(NamedTuple):
    """The shape and dtype of the array that a sample becomes; dtype object holds anything."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"{self.dtype} {[*self.shape]}"

    @property
    def holds_objects(self) -> bool:
        """True if a sample is an object rather than an array."""
        return self.dtype == object

    @property
    def bytes(self) -> int:
        """The bytes that it takes of shared memory, into which no object can be put."""
        if self.holds_objects:
            return 0
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def blank(self) -> int | None:
        """The value that fills the array of an unreadable sample: grey for pixels."""
        if self.holds_objects:
            return None
        if self.dtype == np.uint8:
            return GREY
        return 0


def square(side: int) -> Form:
    """Return the form of an image of `side` x `side` pixels."""
    return Form((side, side, 3), np.dtype(np.uint8))


class Place(NamedTuple):
    """A sample of a split, and its position in the epoch's order.

    Attributes:
        sample: The sample's number in the split.
        size: Width and height of its image, as the index has them.
        epoch: The epoch.
        position: The sample's place in the epoch's order.
    """

    sample: int
    size: tuple[int, int]
    epoch: int
    position: int


class Transform(Protocol):
    """Makes an array of a sample's bytes, in a loader worker."""

    @property
    def largest(self) -> Form:
        """The largest form of any step."""

    def form(self, step: int) -> Form:
        """Return the form of the samples of `step`."""

    def draw(self, place: Place) -> Any:
        """Draw what is random about the sample at `place`, for `decode`.

        It is called for all samples of a part before one of them is decoded. Between two decodes,
        which leave nothing of a generator in the CPU's caches, drawing takes 3 times as long.
        """

    def decode(self, data: memoryview, place: Place, drawn: Any, out: NDArray[Any]) -> None:
        """Make the array of a sample.

        Args:
            data: The bytes of its image, or, for objects, of the whole sample.
            place: The sample.
            drawn: What `draw` returned for it.
            out: The array to fill, of the step's form.

        Raises:
            DataError: The sample is unreadable.
        """


@dataclass(frozen=True)
class TrainTransform:
    """Cut, resize, flip and augment an image for training, into uint8 pixels.

    The draws are keyed by (seed, epoch, position): they are the same in whichever process the image
    is decoded, and whenever.

    Args:
        data: Sizes, crops and augmentation.
        seed: The seed of all draws.
        epochs: The epochs of the training, over which the image's side may grow.
        steps_per_epoch: Optimizer steps of one of those epochs.
    """

    data: DataRecipe
    seed: int
    epochs: int
    steps_per_epoch: int

    def __post_init__(self) -> None:
        # Before loader workers fork: each would import timm and torchvision, and report a bad
        # policy too late.
        policies(self.data, self.data.size)

    @property
    def largest(self) -> Form:
        """The form of the last epochs' images."""
        return square(self.data.size)

    def form(self, step: int) -> Form:
        """Return the form of the images of a step."""
        return square(image_side(self.data, step // self.steps_per_epoch, self.epochs))

    def draw(self, place: Place) -> tuple[Box, bool]:
        """Draw the box to cut out, and whether to flip it."""
        # The order of the draws is a part of every run: the flip comes first.
        rng = rekeyed(self.seed, "augment", place.epoch, place.position)
        flip = bool(rng.random() < self.data.flip)
        box = random_resized_crop(rng, *place.size, self.data.scale, self.data.ratio)
        return box, flip

    def decode(
        self, data: memoryview, place: Place, drawn: tuple[Box, bool], out: NDArray[np.uint8]
    ) -> None:
        """Fill `out`, uint8 [side, side, 3], with the crop, resized, flipped and augmented."""
        # The policies come last: they are made for images of the final size.
        box, flip = drawn
        decode_crop(data, box, out, flip=flip)
        self.augment(place.epoch, place.position, out)

    def augment(self, epoch: int, position: int, pixels: NDArray[np.uint8]) -> None:
        """Apply the policies to an image in place.

        Args:
            epoch: The epoch.
            position: The sample's place in the epoch's order.
            pixels: The image, uint8 [side, side, 3].
        """
        apply(policies(self.data, len(pixels)), pixels, self.seed, "policy", epoch, position)


@dataclass(frozen=True)
class EvalTransform:
    """Cut the central square of an image, and resize it, as timm does.

    Attributes:
        side: The side of the result, pixels.
        crop_ratio: The share of the shorter side that the square keeps.
    """

    side: int
    crop_ratio: float

    @property
    def largest(self) -> Form:
        """The form of all images."""
        return square(self.side)

    def form(self, step: int) -> Form:
        """Return the form of all images."""
        return square(self.side)

    def draw(self, place: Place) -> None:
        """Draw nothing: the crop is always the central one."""

    def decode(self, data: memoryview, place: Place, drawn: None, out: NDArray[np.uint8]) -> None:
        """Fill `out`, uint8 [side, side, 3], with the central square."""
        decode_center(data, self.crop_ratio, out)
