"""Samples of more than 8 bits, brought to 8: by the range that the file states, or not at all.

A file of 16 bits a sample is a container. A camera of 12 bits puts 0 to 4095 into it, a program
that knows only 16 bits puts 0 to 255 into it, and by its upper 8 bits either is black. Nothing is
stretched by what is found in an image: of two images in a dataset the darker one would become as
bright as the other.

* The range is what a PNG's sBIT chunk says, or a TIFF's BitsPerSample (12), SMinSampleValue,
  SMaxSampleValue, MinSampleValue or MaxSampleValue. It becomes 0 to 255.
* Unsigned 16 bits without such a statement, with a value of 4096 or more: the upper 8 bits, as the
  loader reads them.
* All else is refused, with the values that were seen.
"""

import io
import sys
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin

from wds_train.errors import DataError
from wds_train.images.pillow import PNG, as_pillow_reads, load, png_chunks

FULL = 0xFFFF
FILLED = 0x1000  # from this value on, 16 bits are taken for filled
SURE_BITS = 12
# Kinds of a PNG.
GREY = 0
COLOUR = 2
GREY_ALPHA = 4
COLOUR_ALPHA = 6
PNG_COLOURS = {GREY: 1, COLOUR: 3, GREY_ALPHA: 1, COLOUR_ALPHA: 3}
# Tags of TIFF, and values of PHOTOMETRIC and FORMAT.
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262
MIN_VALUE = 280
MAX_VALUE = 281
FORMAT = 339
SMIN_VALUE = 340
SMAX_VALUE = 341
WHITE_IS_ZERO = 0
UNSIGNED = 1
SIGNED = 2
REMEDY = (
    "convert it to 8 bits, or let the file say what is white "
    "(a PNG's sBIT chunk, a TIFF's MaxSampleValue): docs/shards.md, Images"
)


class Range(NamedTuple):
    """The samples that a file says are black and white.

    Attributes:
        low: The black one.
        high: The white one.
        by: The field of the file that says so.
    """

    low: float
    high: float
    by: str

    def __str__(self) -> str:
        return f"{_shown(self.low)} to {_shown(self.high)} ({self.by})"


class Eight(NamedTuple):
    """An image of 8 bits a sample, RGB or RGBA.

    Attributes:
        image: The image.
        note: The range that was stretched. Empty if it has the upper 8 bits.
    """

    image: Image.Image
    note: str


class Plane(NamedTuple):
    """Some channels of an image, uint8 [height, width, channels], and a note as of `Eight`."""

    pixels: NDArray[np.uint8]
    note: str = ""


def is_deep(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Return whether a sample has more than 8 bits, or a sign, by the header."""
    if data.startswith(PNG):
        return data[24] == 16
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _bits(image) > 8 or SIGNED in _numbers(image, FORMAT)
    return False


def eight_bits(image: ImageFile.ImageFile, data: bytes) -> Eight:
    """Bring an image that `is_deep` to 8 bits.

    Args:
        image: The image, opened and not decoded.
        data: The file that it is in.

    Raises:
        DataError: The file does not say what is white, or its samples contradict it.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _of_tiff(image, data)
    return _of_png(image, data)


def _of_png(image: ImageFile.ImageFile, data: bytes) -> Eight:
    samples = _png_samples(image, data)
    count = PNG_COLOURS[data[25]]
    colours, alpha = samples[..., :count], samples[..., count:]
    chunks = {chunk.kind: data[chunk.content] for chunk in png_chunks(data)}
    bits = chunks.get(b"sBIT", b"")
    kind = f"mode {image.mode}, 16 bits"
    planes = [_eight(colours, _by_sbit(colours, bits[:count]), kind)]
    if alpha.size:
        planes.append(_eight(alpha, _by_sbit(alpha, bits[count:]), kind))
    elif b"tRNS" in chunks:  # one colour, of 16 bits, that is transparent
        key = np.frombuffer(chunks[b"tRNS"][: 2 * count], ">u2")
        hidden = (samples == key).all(axis=2, keepdims=True)
        planes.append(Plane(np.where(hidden, 0, 255).astype(np.uint8)))
    return _joined(planes)


def _png_samples(image: ImageFile.ImageFile, data: bytes) -> NDArray[np.uint16]:
    """Return all 16 bits of a PNG's samples, uint16 [height, width, channels].

    Pillow itself gives the upper 8 bits if there are several channels.
    """
    kind = data[25]
    if kind == GREY:
        load(image)
        return np.asarray(image).astype(np.uint16)[..., None]
    if kind == GREY_ALPHA:  # the four bytes of a pixel, as if they were four colours of 8 bits
        return _png_as(data, "RGBA").view(">u2").astype(np.uint16)
    colours = "RGB" if kind == COLOUR else "RGBA"
    return _sixteen(_png_as(data, f"{colours};16B"), _png_as(data, f"{colours};16L"))


def _png_as(data: bytes, raw: str) -> NDArray[np.uint8]:
    """Return the pixels of a PNG, unpacked in another of Pillow's raw modes.

    Of two bytes 16B takes the first, 16L the second.
    """
    image = Image.open(io.BytesIO(as_pillow_reads(data)), formats=("PNG",))
    image.tile = [tile._replace(args=raw) for tile in image.tile]
    load(image)
    return np.asarray(image)


def _sixteen(upper: NDArray[np.uint8], lower: NDArray[np.uint8]) -> NDArray[np.uint16]:
    return np.left_shift(upper, 8, dtype=np.uint16) | lower


def _by_sbit(samples: NDArray[np.uint16], bits: bytes) -> Range | None:
    """Return the range that sBIT says; None if it says nothing.

    By the standard its bits are the upper ones of a sample. A program that puts small numbers into
    16 bits means the lower ones. The samples show which: only an almost black image has none above
    the lower 12 bits.
    """
    if not bits or not 0 < max(bits) <= 16:
        return None
    count = max(bits)
    top = (1 << count) - 1
    if samples.max() > top or (count > SURE_BITS and _is_scaled_up(samples, count)):
        return Range(0, FULL, "sBIT")
    return Range(0, top, "sBIT")


def _is_scaled_up(samples: NDArray[np.uint16], bits: int) -> bool:
    """Return whether all samples are numbers of `bits` that were scaled up to 16 bits.

    The lower bits of such numbers are zeros, or their own first bits again.
    """
    behind = samples & (FULL >> bits)
    return bool(((behind == 0) | (behind == samples >> bits)).all())


def _of_tiff(image: TiffImagePlugin.TiffImageFile, data: bytes) -> Eight:
    load(image)
    bits = _bits(image)
    stated = _by_tags(image, bits)
    samples = _tiff_samples(image, data, bits)
    count = samples.shape[2] - image.has_transparency_data
    colours, alpha = samples[..., :count], samples[..., count:]
    kind = f"mode {image.mode}, {bits} bits"
    planes = [_eight(colours, stated, kind)]
    if _numbers(image, PHOTOMETRIC) == (WHITE_IS_ZERO,):  # Pillow inverts those of 8 bits alone
        planes = [Plane(255 - planes[0].pixels, planes[0].note)]
    if alpha.size:
        planes.append(_eight(alpha, stated, kind))
    return _joined(planes, "CMYK" if image.mode == "CMYK" else None)


def _tiff_samples(image: TiffImagePlugin.TiffImageFile, data: bytes, bits: int) -> NDArray[Any]:
    """Return the numbers in a loaded TIFF, [height, width, channels], in their own dtype."""
    pixels = np.asarray(image)
    unsigned = _numbers(image, FORMAT) in ((), (UNSIGNED,))
    if image.mode.startswith("I;16"):
        return pixels.astype(np.uint16)[..., None]
    if image.mode == "I":  # Pillow has no mode for 32 bits without a sign
        return (pixels.view(np.uint32) if unsigned and bits == 32 else pixels)[..., None]
    if image.mode == "F":
        return pixels[..., None]
    if image.mode == "L":  # with a sign, of which Pillow has not heard
        return pixels.view(np.int8)[..., None]
    return _sixteen(pixels, _lower_bytes(data))


def _lower_bytes(data: bytes) -> NDArray[np.uint8]:
    """Return the lower 8 of 16 bits in a TIFF of several channels, which Pillow leaves away."""
    image = Image.open(io.BytesIO(data), formats=("TIFF",))
    other = str.maketrans("LBN", "BLB" if sys.byteorder == "little" else "BLL")
    tiles = []
    for tile in image.tile:
        assert isinstance(tile.args, tuple)
        mode, _, order = tile.args[0].partition(";16")
        tiles.append(tile._replace(args=(f"{mode};16{order.translate(other)}", *tile.args[1:])))
    image.tile = tiles
    load(image)
    return np.asarray(image)


def _by_tags(image: TiffImagePlugin.TiffImageFile, bits: int) -> Range | None:
    """Return the range that a TIFF's tags say. Black is 0 if they say white alone."""
    for least, most, name in (
        (SMIN_VALUE, SMAX_VALUE, "SMaxSampleValue"),
        (MIN_VALUE, MAX_VALUE, "MaxSampleValue"),
    ):
        if highest := _numbers(image, most):
            lowest = _numbers(image, least) or (0,)
            if min(lowest) < max(highest):
                return Range(min(lowest), max(highest), name)
    if 8 < bits < 16:
        return Range(0, (1 << bits) - 1, "BitsPerSample")
    return None


def _bits(image: TiffImagePlugin.TiffImageFile) -> int:
    return int(max(_numbers(image, BITS_PER_SAMPLE), default=1))


def _numbers(image: TiffImagePlugin.TiffImageFile, tag: int) -> tuple[float, ...]:
    """Return the numbers of a TIFF's tag; empty if it has none."""
    found = image.tag_v2.get(tag, ())
    values = found if isinstance(found, tuple) else (found,)
    return tuple(each for each in values if isinstance(each, int | float))


def _eight(samples: NDArray[Any], stated: Range | None, kind: str) -> Plane:
    """Bring samples to 8 bits.

    Args:
        samples: The samples, [height, width, channels].
        stated: The range that becomes 0 to 255; None if the file does not say it.
        kind: The kind of the samples, for messages.

    Raises:
        DataError: There is no range, or samples lie beyond it.
    """
    if samples.dtype.kind == "f" and not np.isfinite(samples).all():
        raise DataError(f"some of its samples ({kind}) are infinite, or no numbers; {REMEDY}")
    lowest = samples.min().item()
    highest = samples.max().item()
    seen = f"its samples ({kind}) are {_shown(lowest)} to {_shown(highest)}"
    if samples.dtype == np.uint16 and (highest == 0 or _is_filled(highest, stated)):
        return Plane((samples >> 8).astype(np.uint8))
    if stated is None:
        raise DataError(f"{seen}, and it does not say which number is white; {REMEDY}")
    if lowest < stated.low or highest > stated.high:
        raise DataError(f"{seen}, beyond the range that it states, {stated}; {REMEDY}")
    scaled = np.rint((samples.astype(np.float64) - stated.low) * 255 / (stated.high - stated.low))
    return Plane(scaled.astype(np.uint8), f"{stated} stretched to 8 bits")


def _is_filled(highest: int, stated: Range | None) -> bool:
    """Return whether all of 16 unsigned bits are used, by what the file says.

    Otherwise, `highest`, the largest sample, shows it.
    """
    if stated is not None:
        return (stated.low, stated.high) == (0, FULL)
    return highest >= FILLED


def _shown(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _joined(planes: list[Plane], mode: str | None = None) -> Eight:
    """Join planes to one image.

    Args:
        planes: The colours, and then the alpha if there is one.
        mode: Pillow's mode of the joined image. Default: by the number of channels.
    """
    pixels = np.concatenate([plane.pixels for plane in planes], axis=2)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels, mode)
    notes = dict.fromkeys(plane.note for plane in planes if plane.note)
    plain_mode = "RGBA" if image.has_transparency_data else "RGB"
    return Eight(image.convert(plain_mode), ", ".join(notes))
