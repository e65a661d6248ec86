"""Encoded bytes -> a crop, resized, in place: uint8 HWC RGB straight into the batch array."""

import io
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wds_train.augment import Box
from wds_train.errors import DataError

cv2.setNumThreads(0)  # loader workers are the parallelism; OpenCV's own threads would fight them for the cores


class ImageInfo(NamedTuple):
    """`width` and `height` of the upright image, in pixels."""

    width: int
    height: int


def probe(data: bytes | memoryview) -> ImageInfo:
    """What the image's header says; `DataError` when it is no image that can be read."""
    return ImageInfo(*_open(data).size)


def decode_crop(data: bytes | memoryview, box: Box, out: NDArray[np.uint8], *, flip: bool = False) -> None:
    """Write `box` of the image, resized to `out`'s [height, width, 3] and mirrored if `flip`, into `out`."""
    left, top, width, height = box
    pixels = np.asarray(_open(data).convert("RGB"))[top : top + height, left : left + width]
    shrinks = height > out.shape[0]
    resized = cv2.resize(pixels, out.shape[1::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    out[...] = resized[:, ::-1] if flip else resized


def _open(data: bytes | memoryview) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"it cannot be decoded: {error}") from error
