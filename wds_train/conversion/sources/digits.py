"""scikit-learn's handwritten digits: 1,797 real images of 8 px, in its wheel, so that no download is needed."""

import io
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from wds_train.conversion.sources.labels import to_classes
from wds_train.conversion.sources.sequential import Item, spooled
from wds_train.conversion.sources.source import Source, Understood
from wds_train.conversion.sources.spool import Spool
from wds_train.rng import permutation

SIDE = 32
VAL_SAMPLES = 360


def digits(spool: Spool) -> Source:
    """The digits as 32 px RGB PNGs; 360 of them, drawn by a fixed key, are the val split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    held_out = set(permutation(len(data.images), "digits", "val")[:VAL_SAMPLES].tolist())

    def read() -> Iterator[Item]:
        for number, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
            yield Item("val" if number in held_out else "train", f"{label}/{number:04d}", int(label), _png(pixels))

    understood = Understood(
        "scikit-learn's handwritten digits, 360 of them held out as val", "the digit that was written"
    )
    return replace(spooled("digits", to_classes([str(n) for n in range(10)]), read, spool), understood=understood)


def _png(pixels: np.ndarray) -> bytes:
    """A PNG of `pixels`, float [8, 8] in 0..16."""
    grey = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
    out = io.BytesIO()
    grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB").save(out, "PNG")
    return out.getvalue()
