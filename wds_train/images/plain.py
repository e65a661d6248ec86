"""Images made plain: upright, 8 bits a sample, opaque.

An image that the loader would show otherwise than the file means is changed here. This is done for
shards, before the image comes into them, so that the loader, which sees every image in every epoch,
knows nothing of it; and for the images that a trained model is asked about. An image that the
loader shows right keeps its bytes.

Transparent pixels are laid on white, as every browser shows them. Their own colours belong to no
image: two icons that look alike may differ in them, and a model would learn that.
"""

import io
from typing import NamedTuple

from PIL import Image, ImageFile

from wds_train.images import jpeg
from wds_train.images.depth import eight_bits, is_deep
from wds_train.images.heic import is_heic, open_heic
from wds_train.images.pillow import (
    PNG,
    check_size,
    foreign_errors,
    load,
    open_image,
    to_rgb,
    turn_of,
)

BACKGROUND = "white"
OPAQUE = 255  # the largest alpha
# A grey PNG of 2 or 4 bits: Pillow scales its samples to 8 by this, but not the one that it calls
# transparent.
FEW_GREYS = {b"\2\0": 85, b"\4\0": 17}
TRANSPARENT = f"transparent pixels, laid on {BACKGROUND}"
INVISIBLE = f"nothing but transparency, laid on {BACKGROUND}"
UPPER_BITS = "16 bits a sample, the upper 8 kept"


class Plain(NamedTuple):
    """An upright image in 8-bit RGB.

    Attributes:
        image: The image.
        changed: The loader would make other pixels of the file.
        notes: What is odd about the file.
    """

    image: Image.Image
    changed: bool
    notes: list[str]


def may_change(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Return True if `plain` has to look at the pixels of an image, by its header.

    Args:
        image: The image, opened and not decoded.
        data: The file that it is in.
    """
    return image.has_transparency_data or is_deep(image, data)


def plain(image: ImageFile.ImageFile, data: bytes) -> Plain:
    """Make an image plain.

    Args:
        image: The image, opened and not decoded.
        data: The file that it is in.

    Raises:
        DataError: The file does not say what its samples mean.
    """
    # 8 bits a sample.
    notes = []
    if is_deep(image, data):
        shallow, stretched = eight_bits(image, data)
        notes.append(stretched or UPPER_BITS)
    else:
        load(image)
        shallow = _convert_colours(image, data)
        stretched = ""

    # Opaque, and upright. The loader turns an image by itself: that is no change.
    opaque, laid = _lay_on_background(shallow)
    if laid:
        notes.append(laid)
    turn = turn_of(image, data)
    if turn is not None:
        opaque = opaque.transpose(turn)
    return Plain(opaque, bool(stretched or laid), notes)


def plain_bytes(data: bytes) -> bytes:
    """Return the file as a conversion would put it into a shard.

    Args:
        data: The file of one image.

    Returns:
        `data` itself, or a PNG of the image made plain.

    Raises:
        DataError: The image cannot be read.
    """
    # A JPEG is opaque, and of 8 bits. An empty file is for the loader to refuse.
    if not data or data[:2] == jpeg.START:
        return data
    with foreign_errors(data):
        if is_heic(data):
            photo = open_heic(data, ", or convert it")
            check_size(*photo.size)
            return png_of(plain(photo, data).image)
        image = open_image(data)
        if not may_change(image, data):
            return data
        made = plain(image, data)
        if not made.changed:
            return data
        return png_of(made.image)


def png_of(image: Image.Image) -> bytes:
    """Return the image as PNG, which loses nothing."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _convert_colours(image: Image.Image, data: bytes) -> Image.Image:
    """Return the loaded image in RGB, or in RGBA if it may have transparent pixels."""
    if "transparency" in image.info and data.startswith(PNG) and data[24:26] in FEW_GREYS:
        image.info["transparency"] *= FEW_GREYS[data[24:26]]
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return to_rgb(image)


def _lay_on_background(image: Image.Image) -> tuple[Image.Image, str]:
    """Return the image in RGB, and a note on its transparent pixels, empty if it has none."""
    if image.mode != "RGBA":
        return image, ""
    # An alpha channel may say nothing: then the colours stay as they are.
    least, most = image.getchannel("A").getextrema()
    if least == OPAQUE:
        return image.convert("RGB"), ""
    below = Image.new("RGBA", image.size, BACKGROUND)
    opaque = Image.alpha_composite(below, image).convert("RGB")
    if not most:
        return opaque, INVISIBLE
    return opaque, TRANSPARENT
