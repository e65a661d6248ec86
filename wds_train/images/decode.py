"""Encoded bytes -> a crop, resized, in place: uint8 HWC RGB into the batch array.

JPEG goes through simplejpeg (libjpeg-turbo), down to the crop's last row (`jpeg.py`); PNG, WebP, GIF and the JPEGs that
simplejpeg does not read, those of four colours first of all, through Pillow (`pillow.py`). A crop of over twice the output's size is resized by PyTorch's anti-aliased filter, which equals
Pillow's; a smaller one by OpenCV's bilinear, which still reads every pixel. All of them release the GIL.
docs/benchmarks.md has the figures, what that costs in PSNR, and what else was tried.

Colours are those of Pillow's `convert("RGB")`: transparency and colour profiles are ignored; of 16 bits the upper 8 are
kept. A conversion lays transparent pixels on white, and stretches what is less than 16 bits, before they come here
(`plain.py`); what older shards hold is read as ever. Boxes are in the pixels of the upright image: EXIF's orientation is applied.
"""

import math
import warnings
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wds_train.errors import DataError
from wds_train.images import jpeg
from wds_train.images.crop import Box
from wds_train.images.pillow import fast_header, open_upright, to_rgb, whole

# From this factor on, plain bilinear skips source pixels. 1 makes every reduction anti-aliased.
BILINEAR_UP_TO = 2
THIN = 16  # from this ratio of its sides on, the middle of an image is all that is resized

cv2.setNumThreads(0)  # loader workers are the parallelism; OpenCV's own threads would fight them for the cores
# Pillow warns of odd files that it reads all the same; a line for each would bury the run's own.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageInfo(NamedTuple):
    """What an image's header says. `width` and `height` of the upright image, in pixels."""

    width: int
    height: int


def probe(data: bytes | memoryview) -> ImageInfo:
    """What the image's header says; `DataError` when it is no image that can be read, or one of over MAX_PIXELS."""
    if header := fast_header(data):
        return _upright_size(header)
    return ImageInfo(*open_upright(data).size)


def decode_crop(data: bytes | memoryview, box: Box, out: NDArray[np.uint8], *, flip: bool = False) -> None:
    """Write `box` of the image, resized to `out`'s [height, width, 3] and mirrored if `flip`, into `out`.

    `DataError` when the image is damaged, cut off, unreadable, of over MAX_PIXELS, or does not contain `box`. Damage
    below the crop may go unseen, and so may altered bits that still make sense: only a checksum finds those.
    It reads the header itself, at no cost that can be measured: `probe` is for those who need the size first.
    """
    if (header := fast_header(data)) is None:
        _resize(_pillow_crop(data, box), out, (False, False, flip))
        return
    transposed, mirror_rows, mirror_columns = ORIENTATIONS[header.orientation]
    left, top, width, height = _checked(box, info := _upright_size(header))
    if mirror_columns:
        left = info.width - left - width
    if mirror_rows:
        top = info.height - top - height
    if transposed:
        left, top, width, height = top, left, height, width
    pixels = jpeg.decode_rows(memoryview(data), header, top + height)
    _resize(pixels[top : top + height, left : left + width], out, (transposed, mirror_rows, mirror_columns != flip))


def decode_center(data: bytes | memoryview, crop: float, out: NDArray[np.uint8]) -> None:
    """Write the centre of the image into `out`, [side, side, 3], as timm and torchvision do for an evaluation, to the same
    pixels: decoded exactly, the shorter side resized by Pillow to side / `crop`, `side` of each cut from the middle. So
    an exported model scores elsewhere what it scored here; `decode_crop` is faster. `DataError` as there.
    """
    image, side = whole(data), len(out)
    shorter = min(image.size)
    if max(image.size) > THIN * shorter:  # resized, a strip of one pixel by a million would be gigabytes
        image = ImageOps.fit(
            image, (min(image.width, THIN * shorter), min(image.height, THIN * shorter)), Image.Resampling.NEAREST
        )
    resized = [int(math.floor(side / crop) * each / shorter) for each in image.size]
    left, top = (round((each - side) / 2) for each in resized)
    image = image.resize(resized, Image.Resampling.BILINEAR)
    out[...] = np.asarray(image.crop((left, top, left + side, top + side)))


def decode_whole(data: bytes | memoryview) -> NDArray[np.uint8]:
    """The whole upright image, uint8 [height, width, 3], exactly as Pillow decodes it. `DataError` as there."""
    return np.array(whole(data))


# How the stored image becomes the upright one, by EXIF orientation: transpose it? then mirror its rows? its columns?
ORIENTATIONS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
FLIP_CODES = {(True, False): 0, (False, True): 1, (True, True): -1}  # OpenCV's, by (mirror rows, mirror columns)


def _resize(pixels: NDArray[np.uint8], out: NDArray[np.uint8], turn: tuple[bool, bool, bool]) -> None:
    """Resize `pixels`, uint8 [height, width, 3], turn the result as ORIENTATIONS says, and write it into `out`."""
    assert out.flags.c_contiguous  # OpenCV would fill a copy of any other, and leave `out` as it was
    transposed, mirror_rows, mirror_columns = turn
    height, width = out.shape[1::-1] if transposed else out.shape[:2]
    if pixels.shape[0] > BILINEAR_UP_TO * height or pixels.shape[1] > BILINEAR_UP_TO * width:
        small = _resize_antialiased(pixels, height, width)
    elif any(turn):
        small = np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
    else:
        cv2.resize(pixels, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)
        return
    if transposed:
        small = np.asarray(cv2.transpose(small), np.uint8)
    if mirror_rows or mirror_columns:
        cv2.flip(small, FLIP_CODES[mirror_rows, mirror_columns], dst=out)
    else:
        out[...] = small


def _resize_antialiased(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    # Batched before permuted: in any other order PyTorch does not see channels-last strides and goes a slower way.
    image = torch.from_numpy(np.ascontiguousarray(pixels)).unsqueeze(0).permute(0, 3, 1, 2)
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def _upright_size(header: jpeg.Header) -> ImageInfo:
    transposed = ORIENTATIONS[header.orientation][0]
    return ImageInfo(header.height, header.width) if transposed else ImageInfo(header.width, header.height)


def _checked(box: Box, info: ImageInfo) -> Box:
    left, top, width, height = box
    if min(left, top) < 0 or min(width, height) < 1 or left + width > info.width or top + height > info.height:
        raise DataError(
            f"its size is {info.width}x{info.height}, which does not contain the crop {tuple(box)}: "
            "the index is not of this image; make the index again"
        )
    return box


def _pillow_crop(data: bytes | memoryview, box: Box) -> NDArray[np.uint8]:
    """The `box` of the upright image, uint8 [height, width, 3]."""
    image = open_upright(data)
    left, top, width, height = _checked(box, ImageInfo(*image.size))
    image = image.crop((left, top, left + width, top + height))
    return np.array(to_rgb(image))  # a copy: PyTorch warns of read-only arrays, which asarray gives
