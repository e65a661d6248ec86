"""Encoded bytes to a crop, resized, in place: uint8 [height, width, 3] RGB in the batch's array.

JPEG goes through simplejpeg (libjpeg-turbo), down to the crop's last row (`jpeg.py`). PNG, WebP,
GIF and the JPEGs that simplejpeg does not read, such as those of four colours, go through Pillow
(`pillow.py`).

A crop of over twice the output's size is resized by PyTorch's anti-aliased filter, which equals
Pillow's; a smaller one by OpenCV's bilinear, which still reads every pixel. All of them release the
GIL. docs/benchmarks.md has the figures, what that costs in PSNR, and what else was tried.

Colours are those of Pillow's `convert("RGB")`: transparency and colour profiles are ignored, and of
16 bits the upper 8 are kept. A conversion lays transparent pixels on white, and stretches samples
of less than 16 bits, before they come here (`plain.py`); older shards are read as before. Boxes are
in the pixels of the upright image: EXIF's orientation is applied.

The transforms of the loader call it for each sample (`loader/transform.py`).
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
# From this ratio of the sides on, only the middle of an image is resized.
THIN = 16

# Loader workers are the parallelism: OpenCV's own threads would fight them for the cores.
cv2.setNumThreads(0)
# Pillow warns of odd files that it reads all the same; a line for each would bury the run's own.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageInfo(NamedTuple):
    """The size of the upright image by its header.

    Attributes:
        width: The width, pixels.
        height: The height, pixels.
    """

    width: int
    height: int


def probe(data: bytes | memoryview) -> ImageInfo:
    """Read the header of an image.

    Args:
        data: The encoded image.

    Raises:
        DataError: It is not an image that can be read, or has more than MAX_PIXELS.
    """
    header = fast_header(data)
    if header:
        return _upright_size(header)
    return ImageInfo(*open_upright(data).size)


def decode_crop(
    data: bytes | memoryview, box: Box, out: NDArray[np.uint8], *, flip: bool = False
) -> None:
    """Decode a crop of an image, and resize it into `out`.

    Damage below the crop may go unseen, and so may altered bits that still make sense: only a
    checksum finds those. The header is read here at no cost that can be measured; `probe` is for
    those who need the size first.

    Args:
        data: The encoded image.
        box: The crop, in pixels of the upright image.
        out: Where it goes, uint8 [height, width, 3].
        flip: Mirror it left to right.

    Raises:
        DataError: The image is damaged, cut off, unreadable, has more than MAX_PIXELS, or does not
            contain `box`.
    """
    header = fast_header(data)
    if header is None:
        _resize(_pillow_crop(data, box), out, (False, False, flip))
        return

    # Only the rows down to the box's bottom are decoded.
    stored = _to_stored(box, header)
    bottom = stored.top + stored.height
    pixels = jpeg.decode_rows(memoryview(data), header, bottom)
    crop = pixels[stored.top : bottom, stored.left : stored.left + stored.width]

    # The flip is one turn together with the orientation's.
    transposed, mirror_rows, mirror_columns = ORIENTATIONS[header.orientation]
    _resize(crop, out, (transposed, mirror_rows, mirror_columns != flip))


def decode_center(data: bytes | memoryview, crop: float, out: NDArray[np.uint8]) -> None:
    """Decode the centre of an image for an evaluation, to the pixels of timm and torchvision.

    The image is decoded exactly, its shorter side resized by Pillow to side / `crop`, and a square
    of `side` cut from the middle. So an exported model scores elsewhere what it scored here.
    `decode_crop` is faster.

    Args:
        data: The encoded image.
        crop: The share of the resized shorter side that the square keeps.
        out: Where it goes, uint8 [side, side, 3].

    Raises:
        DataError: As for `decode_crop`.
    """
    # Every pixel, exactly; of a strip only the middle.
    image = whole(data)
    side = len(out)
    shorter = min(image.size)
    if max(image.size) > THIN * shorter:
        # Resized, a strip of one pixel by a million would be gigabytes.
        size = (min(image.width, THIN * shorter), min(image.height, THIN * shorter))
        image = ImageOps.fit(image, size, Image.Resampling.NEAREST)

    # The order of multiplication, division and rounding is timm's: another one is a pixel off.
    width = int(math.floor(side / crop) * image.width / shorter)
    height = int(math.floor(side / crop) * image.height / shorter)
    left = round((width - side) / 2)
    top = round((height - side) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    out[...] = np.asarray(image.crop((left, top, left + side, top + side)))


def decode_whole(data: bytes | memoryview) -> NDArray[np.uint8]:
    """Decode the whole upright image, uint8 [height, width, 3], exactly as Pillow does.

    Raises:
        DataError: As for `decode_crop`.
    """
    return np.array(whole(data))


# The turn of the stored image into the upright one, by EXIF orientation: True to transpose it, then
# to mirror its rows, and its columns.
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
# OpenCV's codes, by (mirror rows, mirror columns).
FLIP_CODES = {(True, False): 0, (False, True): 1, (True, True): -1}


def _resize(
    pixels: NDArray[np.uint8], out: NDArray[np.uint8], turn: tuple[bool, bool, bool]
) -> None:
    """Resize `pixels`, uint8 [height, width, 3], turn the result, and write it into `out`.

    `turn` is a value of ORIENTATIONS.
    """
    # OpenCV would fill a copy of any other array, and leave `out` as it was.
    assert out.flags.c_contiguous
    transposed, mirror_rows, mirror_columns = turn
    height, width = out.shape[:2]
    if transposed:
        width, height = out.shape[:2]

    # Resized before turned: the result is smaller than the crop, as a rule.
    if pixels.shape[0] > BILINEAR_UP_TO * height or pixels.shape[1] > BILINEAR_UP_TO * width:
        small = _resize_antialiased(pixels, height, width)
    elif any(turn):
        small = np.asarray(
            cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8
        )
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
    """Resize by PyTorch's anti-aliased bilinear filter, to uint8 [height, width, 3]."""
    # Batched before permuted: in any other order PyTorch does not see channels-last strides, and
    # takes a slower way.
    image = torch.from_numpy(np.ascontiguousarray(pixels)).unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(image, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _upright_size(header: jpeg.Header) -> ImageInfo:
    transposed, _, _ = ORIENTATIONS[header.orientation]
    if transposed:
        return ImageInfo(header.height, header.width)
    return ImageInfo(header.width, header.height)


def _to_stored(box: Box, header: jpeg.Header) -> Box:
    """Return a box of the upright image in the pixels of the stored one.

    Raises:
        DataError: The image does not contain it.
    """
    transposed, mirror_rows, mirror_columns = ORIENTATIONS[header.orientation]
    info = _upright_size(header)
    left, top, width, height = _check_box(box, info)
    if mirror_columns:
        left = info.width - left - width
    if mirror_rows:
        top = info.height - top - height
    if transposed:
        return Box(left=top, top=left, width=height, height=width)
    return Box(left, top, width, height)


def _check_box(box: Box, info: ImageInfo) -> Box:
    """Return `box`; raise `DataError` if the image does not contain it."""
    # An index that was made of other images would cut at random.
    left, top, width, height = box
    inside = min(left, top) >= 0 and left + width <= info.width and top + height <= info.height
    if not inside or min(width, height) < 1:
        raise DataError(
            f"its size is {info.width}x{info.height}, which does not contain the crop "
            f"{tuple(box)}: the index is not of this image; make the index again"
        )
    return box


def _pillow_crop(data: bytes | memoryview, box: Box) -> NDArray[np.uint8]:
    """Decode `box` of the upright image by Pillow, uint8 [height, width, 3]."""
    # Pillow decodes a file as a whole, whatever is needed of it.
    image = open_upright(data)
    left, top, width, height = _check_box(box, ImageInfo(*image.size))
    image = image.crop((left, top, left + width, top + height))
    # A copy: np.asarray gives a read-only array, of which PyTorch warns.
    return np.array(to_rgb(image))
