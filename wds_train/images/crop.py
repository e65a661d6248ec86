"""Crop boxes, drawn at random. No pixels are touched here.

`loader/transform.py` draws a box for each sample of a training.
"""

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
    rng: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """Draw the box of a RandomResizedCrop (Szegedy et al. 2014, arXiv:1409.4842).

    As in torchvision, there are ten tries, and then the largest central box of an allowed ratio.

    Args:
        rng: The sample's generator.
        width: The width of the image, pixels.
        height: The height of the image, pixels.
        scale: Smallest and largest share of the image's area, drawn uniformly.
        ratio: Smallest and largest width / height, drawn log-uniformly.

    Returns:
        A box that lies inside the image.
    """
    for _ in range(10):
        # Doubles alone: NumPy may change how its other distributions use the bits (NEP 19), and
        # boxes with them.
        share, aspect, x, y = rng.random(4).tolist()
        area = width * height * (scale[0] + share * (scale[1] - scale[0]))
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** aspect
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(x * (width - w + 1)), int(y * (height - h + 1)), w, h)

    # No try fitted: as a rule, the image is much wider or higher than the allowed ratios.
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return Box((width - w) // 2, (height - h) // 2, w, h)
