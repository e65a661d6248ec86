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

`plain.py` calls it for the images of a conversion, and for those that a trained model is asked
about.
"""

import io
import sys
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin

from wds_train.errors import DataError
from wds_train.images.pillow import PNG, as_pillow_reads, load, png_chunks

FULL = 0xFFFF  # the largest number of 16 bits
# From this value on, 16 bits are taken for filled: a camera of 12 bits gives none so large.
FILLED = 0x1000
# Up to so many bits, only an almost black image leaves the upper ones of 16 bits empty.
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
# Tags of a range, and the name of it for messages. The first one with white is taken.
RANGE_TAGS = (
    (SMIN_VALUE, SMAX_VALUE, "SMaxSampleValue"),
    (MIN_VALUE, MAX_VALUE, "MaxSampleValue"),
)
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
        return f"{_format_number(self.low)} to {_format_number(self.high)} ({self.by})"


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
    """Return True if a sample has more than 8 bits, or a sign, by the header.

    Args:
        image: The image, opened and not decoded.
        data: The file that it is in.
    """
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
    colours = samples[..., :count]
    alpha = samples[..., count:]
    chunks = {}
    for chunk in png_chunks(data):
        chunks[chunk.kind] = data[chunk.content]

    # Colours and alpha may be of different ranges.
    bits = chunks.get(b"sBIT", b"")
    kind = f"mode {image.mode}, 16 bits"
    planes = [_eight(colours, _by_sbit(colours, bits[:count]), kind)]
    if alpha.size:
        planes.append(_eight(alpha, _by_sbit(alpha, bits[count:]), kind))
    elif b"tRNS" in chunks:  # one colour, of 16 bits, that is transparent
        key = np.frombuffer(chunks[b"tRNS"][: 2 * count], ">u2")
        hidden = (samples == key).all(axis=2, keepdims=True)
        planes.append(Plane(np.where(hidden, 0, 255).astype(np.uint8)))
    return _join(planes)


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
    colours = "RGBA"
    if kind == COLOUR:
        colours = "RGB"
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
    """Join the upper and lower 8 bits to numbers of 16."""
    return np.left_shift(upper, 8, dtype=np.uint16) | lower


def _by_sbit(samples: NDArray[np.uint16], bits: bytes) -> Range | None:
    """Return the range that sBIT says; None if it says nothing.

    By the standard its bits are the upper ones of a sample. A program that puts small numbers into
    16 bits means the lower ones. The samples show which: only an almost black image has none above
    the lower 12 bits.
    """
    if not bits or not 0 < max(bits) <= 16:
        return None
    # Numbers above what the bits can hold, or all scaled up: the upper bits are meant.
    count = max(bits)
    top = (1 << count) - 1
    if samples.max() > top or (count > SURE_BITS and _is_scaled_up(samples, count)):
        return Range(0, FULL, "sBIT")
    return Range(0, top, "sBIT")


def _is_scaled_up(samples: NDArray[np.uint16], bits: int) -> bool:
    """Return True if all samples are numbers of `bits` bits that were scaled up to 16.

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
    colours = samples[..., :count]
    alpha = samples[..., count:]

    # All channels are of the range that the tags say.
    kind = f"mode {image.mode}, {bits} bits"
    planes = [_eight(colours, stated, kind)]
    if _numbers(image, PHOTOMETRIC) == (WHITE_IS_ZERO,):  # Pillow inverts those of 8 bits alone
        planes = [Plane(255 - planes[0].pixels, planes[0].note)]
    if alpha.size:
        planes.append(_eight(alpha, stated, kind))
    mode = None
    if image.mode == "CMYK":  # four channels would be taken for RGBA
        mode = "CMYK"
    return _join(planes, mode)


def _tiff_samples(image: TiffImagePlugin.TiffImageFile, data: bytes, bits: int) -> NDArray[Any]:
    """Return the numbers in a loaded TIFF, [height, width, channels], in their own dtype."""
    pixels = np.asarray(image)
    unsigned = _numbers(image, FORMAT) in ((), (UNSIGNED,))
    if image.mode.startswith("I;16"):
        return pixels.astype(np.uint16)[..., None]
    if image.mode == "I" and unsigned and bits == 32:  # Pillow has no mode without a sign
        return pixels.view(np.uint32)[..., None]
    if image.mode == "I":
        return pixels[..., None]
    if image.mode == "F":
        return pixels[..., None]
    if image.mode == "L":  # with a sign, of which Pillow has not heard
        return pixels.view(np.int8)[..., None]
    return _sixteen(pixels, _lower_bytes(data))


def _lower_bytes(data: bytes) -> NDArray[np.uint8]:
    """Return the lower 8 of 16 bits in a TIFF of several channels, which Pillow leaves away."""
    image = Image.open(io.BytesIO(data), formats=("TIFF",))
    # Pillow takes the upper byte of 16 bits by their order: little (L), big (B) or the machine's
    # (N). With the other order, it takes the lower one.
    other = str.maketrans("LBN", "BLL")
    if sys.byteorder == "little":
        other = str.maketrans("LBN", "BLB")
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
    for least, most, name in RANGE_TAGS:
        highest = _numbers(image, most)
        lowest = _numbers(image, least) or (0,)
        if highest and min(lowest) < max(highest):
            return Range(min(lowest), max(highest), name)
    if 8 < bits < 16:
        return Range(0, (1 << bits) - 1, "BitsPerSample")
    return None


def _bits(image: TiffImagePlugin.TiffImageFile) -> int:
    """Return the bits of a TIFF's samples, the most of all channels."""
    return int(max(_numbers(image, BITS_PER_SAMPLE), default=1))


def _numbers(image: TiffImagePlugin.TiffImageFile, tag: int) -> tuple[float, ...]:
    """Return the numbers of a TIFF's tag; empty if it has none."""
    values = image.tag_v2.get(tag, ())
    if not isinstance(values, tuple):
        values = (values,)
    return tuple([each for each in values if isinstance(each, int | float)])


def _eight(samples: NDArray[Any], stated: Range | None, kind: str) -> Plane:
    """Bring samples to 8 bits.

    Args:
        samples: The samples, [height, width, channels].
        stated: The range that becomes 0 to 255; None if the file does not say it.
        kind: The kind of the samples, for messages.

    Raises:
        DataError: There is no range, or samples lie beyond it.
    """
    # Numbers that nobody can show.
    if samples.dtype.kind == "f" and not np.isfinite(samples).all():
        raise DataError(f"some of its samples ({kind}) are infinite, or no numbers; {REMEDY}")

    # The upper 8 bits, as the loader reads them; or the range that is stated.
    lowest = samples.min().item()
    highest = samples.max().item()
    seen = f"its samples ({kind}) are {_format_number(lowest)} to {_format_number(highest)}"
    if samples.dtype == np.uint16 and (highest == 0 or _is_filled(highest, stated)):
        return Plane((samples >> 8).astype(np.uint8))
    if stated is None:
        raise DataError(f"{seen}, and it does not say which number is white; {REMEDY}")
    # To clip would hide that the range, or the reading of it, is wrong.
    if lowest < stated.low or highest > stated.high:
        raise DataError(f"{seen}, beyond the range that it states, {stated}; {REMEDY}")
    scaled = np.rint((samples.astype(np.float64) - stated.low) * 255 / (stated.high - stated.low))
    return Plane(scaled.astype(np.uint8), f"{stated} stretched to 8 bits")


def _is_filled(highest: int, stated: Range | None) -> bool:
    """Return True if all of 16 unsigned bits are used.

    The file says so; or else `highest`, the largest sample, shows it.
    """
    if stated is not None:
        return (stated.low, stated.high) == (0, FULL)
    return highest >= FILLED


def _format_number(number: float) -> str:
    if isinstance(number, int):
        return str(number)
    return f"{number:g}"


def _join(planes: list[Plane], mode: str | None = None) -> Eight:
    """Join planes to one image.

    Args:
        planes: The colours, and then the alpha if there is one.
        mode: Pillow's mode of the joined image. Default: by the number of channels.
    """
    pixels = np.concatenate([plane.pixels for plane in planes], axis=2)
    if pixels.shape[2] == 1:  # Pillow wants a grey image without channels
        pixels = pixels[..., 0]
    image = Image.fromarray(pixels, mode)
    plain_mode = "RGB"
    if image.has_transparency_data:
        plain_mode = "RGBA"

    # Each note once.
    notes = []
    for plane in planes:
        if plane.note and plane.note not in notes:
            notes.append(plane.note)
    return Eight(image.convert(plain_mode), ", ".join(notes))
