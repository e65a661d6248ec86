"""An image made plain: upright, 8 bits a sample, opaque.

What the loader would show otherwise than the file means it is laid open here: for shards before it comes into them, so
that the loader, which sees every image in every epoch, knows nothing of it; and for the images that a trained model is
asked about. What the loader shows right keeps its bytes.

Transparent pixels are laid on white, as every browser shows them. Their own colours are of no image: two icons that
look alike may differ in them, and a model learns that.
"""

import io
from typing import NamedTuple

from PIL import Image, ImageFile

from wds_train.images import jpeg
from wds_train.images.depth import eight_bits, is_deep
from wds_train.images.heic import is_heic, open_heic
from wds_train.images.pillow import PNG, check_size, foreign_errors, load, open_image, to_rgb, turn_of

BACKGROUND = "white"
OPAQUE = 255
# A grey PNG of 2 or 4 bits: Pillow scales its samples to 8 by this, but not the one that it calls transparent.
FEW_GREYS = {b"\2\0": 85, b"\4\0": 17}
TRANSPARENT = f"transparent pixels, laid on {BACKGROUND}"
INVISIBLE = f"nothing but transparency, laid on {BACKGROUND}"
UPPER_BITS = "16 bits a sample, the upper 8 kept"


class Plain(NamedTuple):
    """An upright image in 8-bit RGB. `changed`: the loader would make other pixels of the file. `notes`: what is odd about it."""

    image: Image.Image
    changed: bool
    notes: list[str]


def may_change(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether `plain` has to look at the pixels of the image that `data` holds. Its header says it."""
    return image.has_transparency_data or is_deep(image, data)


def plain(image: ImageFile.ImageFile, data: bytes) -> Plain:
    """The image that `data` holds, made plain. `DataError` where the file does not say what its samples mean."""
    notes = []
    if is_deep(image, data):
        shallow, stretched = eight_bits(image, data)
        notes.append(stretched or UPPER_BITS)
    else:
        load(image)
        shallow, stretched = _colours(image, data), ""
    opaque, laid = _on_background(shallow)
    if laid:
        notes.append(laid)
    turn = turn_of(image, data)
    upright = opaque if turn is None else opaque.transpose(turn)
    return Plain(upright, bool(stretched or laid), notes)


def plain_bytes(data: bytes) -> bytes:
    """The file as a conversion would put it into a shard: `data` itself, or a PNG of the image made plain. `DataError` where
    the image cannot be read.
    """
    if not data or data[:2] == jpeg.START:  # opaque, and of 8 bits
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
        return png_of(made.image) if made.changed else data


def png_of(image: Image.Image) -> bytes:
    """The image as PNG, which loses nothing."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _colours(image: Image.Image, data: bytes) -> Image.Image:
    """The loaded image in RGB, or RGBA where it has anything transparent to say."""
    if "transparency" in image.info and data.startswith(PNG) and data[24:26] in FEW_GREYS:
        image.info["transparency"] *= FEW_GREYS[data[24:26]]
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    return image.convert("RGBA") if image.has_transparency_data else to_rgb(image)


def _on_background(image: Image.Image) -> tuple[Image.Image, str]:
    """The image in RGB, and in words what its transparent pixels, if it has any, lie on now."""
    if image.mode != "RGBA":
        return image, ""
    least, most = image.getchannel("A").getextrema()
    if least == OPAQUE:
        return image.convert("RGB"), ""
    below = Image.new("RGBA", image.size, BACKGROUND)
    opaque = Image.alpha_composite(below, image).convert("RGB")
    return opaque, TRANSPARENT if most else INVISIBLE
