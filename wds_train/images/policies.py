"""Augmentation policies of timm and torchvision, for pixels that are cropped and flipped already.

Both libraries draw from global generators: Python's, NumPy's and PyTorch's. For the length of a
call these are pointed at the image's key, so that an image comes out the same in whichever process
it is decoded, and whenever. Then they go on where they were: without loader workers they are the
trainer's.
"""

import functools
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wds_train.config.recipe import DataRecipe
from wds_train.errors import UsageError
from wds_train.global_rng import generators_kept
from wds_train.rng import key

Policy = Callable[[Image.Image], Image.Image]

CPU = torch.device("cpu")
# A number in the name of a policy.
NUMBER = r"\d+(\.\d+)?"
# timm skips what it does not know in these names, and a training would run without it.
RAND_AUGMENT = re.compile(
    rf"rand(-(m\d+|n[1-9]|p{NUMBER}|mstd{NUMBER}|mmax\d+|inc[01]|t(weights|3aw|3a)))*"
)
AUTO_AUGMENT = re.compile(rf"(original|originalr|v0|v0r|3a)(-mstd{NUMBER})?")


def policies(data: DataRecipe, side: int) -> tuple[Policy, ...]:
    """Return the policies of a recipe, in timm's order: `auto_augment`, then `color_jitter`.

    They are made once for each side: RandAugment alone is 15 objects.

    Args:
        data: The recipe.
        side: The side of the images, pixels.

    Raises:
        UsageError: `data.auto_augment` is not a policy that is known.
    """
    return _policies(data.auto_augment, data.color_jitter, data.mean, side)


@functools.cache
def _policies(
    auto_augment: str, jitter: tuple[float, ...], mean: tuple[float, ...], side: int
) -> tuple[Policy, ...]:
    found: list[Policy] = []
    if auto_augment:
        found.append(_auto_augment(auto_augment, mean, side))
    if any(jitter):
        # An import of seconds, as with timm: only who uses it pays.
        from torchvision.transforms import ColorJitter

        found.append(ColorJitter(*jitter))
    return tuple(found)


def _auto_augment(name: str, mean: tuple[float, ...], side: int) -> Policy:
    """Return the policy `name`.

    It is timm's, with the settings of its `create_transform`; or torchvision's, with those of its
    training reference.
    """
    if name == "trivial":
        from torchvision.transforms import InterpolationMode, TrivialAugmentWide

        return TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
    if not RAND_AUGMENT.fullmatch(name) and not AUTO_AUGMENT.fullmatch(name):
        raise UsageError(
            f"data.auto_augment = {name!r} is no policy known; there are rand-m9-mstd0.5-inc1 and "
            "the like (m: magnitude, n: operations an image, p: probability of each, mstd, mmax, "
            "inc, t), original, originalr, v0, v0r, 3a, trivial"
        )
    from timm.data import auto_augment

    # Pixels that an operation uncovers get the mean colour.
    grey = tuple([min(255, round(255 * each)) for each in mean])
    settings: dict[str, Any] = {"translate_const": int(0.45 * side), "img_mean": grey}
    if name.startswith("rand"):
        policy = auto_augment.rand_augment_transform(name, settings)
        operations = policy.ops
    else:
        policy = auto_augment.auto_augment_transform(name, settings)
        operations = []
        for sub_policy in policy.policy:
            operations += sub_policy

    # timm's operation fails for some draws.
    for each in operations:
        if each.aug_fn is auto_augment.posterize:
            each.aug_fn = _posterize
    return policy


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Posterize as Pillow does, but make an image of no bits black.

    timm may ask to keep 0 bits or fewer, with `rand-m9-mstd0.5-inc1` for one image of 660. Older
    Pillows made it black. An exception, as of Pillow 13, would end the training.
    """
    if bits >= 8:
        return image
    if bits <= 0:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, bits)


def apply(chosen: tuple[Policy, ...], pixels: NDArray[np.uint8], *parts: str | int) -> None:
    """Apply policies to an image in place.

    Args:
        chosen: The policies.
        pixels: The image, uint8 [height, width, 3].
        parts: The parts of the key that all draws follow from.
    """
    if not chosen:
        return
    # The libraries draw from global generators, which are the trainer's if there are no workers.
    image = Image.fromarray(pixels)
    bits = key(*parts)
    with generators_kept(CPU):
        random.seed(bits >> 64)
        np.random.seed(bits & 0xFFFFFFFF)
        # torch.manual_seed would seed the GPUs' generators as well.
        torch.default_generator.manual_seed(bits >> 32 & 0xFFFFFFFF)
        for policy in chosen:
            image = policy(image)
    pixels[...] = np.asarray(image)
