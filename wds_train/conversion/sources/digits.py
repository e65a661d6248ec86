"""Read scikit-learn's handwritten digits: 1,797 real images of 8 px, in its wheel.

No download is needed.
"""

import io
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from wds_train.conversion.sources.labels import to_classes
from wds_train.conversion.sources.sequential import Item, spool_items
from wds_train.conversion.sources.source import Source, Understood
from wds_train.conversion.sources.spool import Spool
from wds_train.rng import permutation

SIDE = 32  # of the images in the dataset, pixels
VAL_SAMPLES = 360  # a fifth


def open_digits(spool: Spool) -> Source:
    """Return the digits as 32 px RGB PNGs; 360 of them, drawn by a fixed key, are the val split."""
    from sklearn.datasets import load_digits

    # The split is a part of the dataset: it must not depend on a seed that a person gives.
    data = load_digits()
    held_out = set(permutation(len(data.images), "digits", "val")[:VAL_SAMPLES].tolist())

    def read() -> Iterator[Item]:
        for number, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
            split = "train"
            if number in held_out:
                split = "val"
            yield Item(split, f"{label}/{number:04d}", int(label), _png(pixels))

    classes = to_classes(list(map(str, range(10))))
    understood = Understood(
        layout="scikit-learn's handwritten digits, 360 of them held out as val",
        labels="the digit that was written",
    )
    return replace(spool_items("digits", classes, read, spool), understood=understood)


def _png(pixels: np.ndarray) -> bytes:
    """Return a PNG of `pixels`, float [8, 8] in 0..16."""
    grey = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
    out = io.BytesIO()
    grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB").save(out, "PNG")
    return out.getvalue()
