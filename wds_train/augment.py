"""Where to cut: crop boxes, drawn from a generator of the sample's own or computed. No pixels here."""

import math
from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
    """A rectangle in the pixels of the upright image."""

    left: int
    top: int
    width: int
    height: int


def random_resized_crop(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """The box of a RandomResizedCrop (Szegedy et al. 2014, arXiv:1409.4842; ten tries and a centre fallback as in
    torchvision): an area share uniform in `scale`, an aspect ratio log-uniform in `ratio`.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h)
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return Box((width - w) // 2, (height - h) // 2, w, h)


def center_crop(width: int, height: int, crop: float) -> Box:
    """The central square whose side is `crop` of the shorter side: what resize to size / crop, then a centre crop of
    size, keeps.
    """
    side = max(1, round(min(width, height) * crop))
    return Box((width - side) // 2, (height - side) // 2, side, side)
