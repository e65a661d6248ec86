"""An image's bytes, checked and, where the policy says so, encoded anew."""

import io
from dataclasses import asdict, dataclass
from typing import Any

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from wds_train.errors import DataError
from wds_train.tario import MAX_PIXELS

# Named one by one: Pillow loads its rarer plugins only when an image fits none of the others, ours must always be there.
PLUGINS = (BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)
# By content, not by name: ImageNet has a PNG called .JPEG. MPO is what Pillow calls a JPEG with more pictures behind the first.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# Recognised so that the message can name them; shards hold none of these.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATION = 0x0112
PLAIN_MODES = {"RGB", "L"}
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImagePolicy:
    """`resize_shorter`: pixels; images whose shorter side is longer are encoded anew as JPEG of `quality`; None leaves
    every byte alone. `verify`: `header` reads what the image says of itself, `full` decodes every pixel.
    """

    resize_shorter: int | None = None
    quality: int = 90
    verify: str = "header"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class CheckedImage:
    """`width` and `height` in pixels of the upright image. `altered`: encoded anew. `oddity`: what people may want to
    know of an image that is kept as it is.
    """

    data: bytes
    extension: str
    width: int
    height: int
    altered: bool = False
    oddity: str = ""


def check(data: bytes, policy: ImagePolicy) -> CheckedImage:
    """The image in `data`; `DataError` with the cause when it is none that a trainer could read."""
    try:
        return _check(data, policy)
    except UNREADABLE as error:
        raise DataError(f"it cannot be decoded: {error or type(error).__name__}".replace("\n", " ")) from error


def _check(data: bytes, policy: ImagePolicy) -> CheckedImage:
    if not data:
        raise DataError("zero bytes")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.format not in EXTENSIONS:
        raise DataError(f"its format is {image.format}; shards hold JPEG, PNG and WebP: convert it, or leave it out")
    turned = _orientation(image) >= 5
    width, height = image.size[::-1] if turned else image.size
    if policy.resize_shorter and min(width, height) > policy.resize_shorter:
        return _reencoded(image, policy.resize_shorter, policy.quality)
    if width * height > MAX_PIXELS:
        raise DataError(f"it has {width}x{height} pixels, the loader takes {MAX_PIXELS}; shrink it (--resize-shorter)")
    oddity = _oddity(image)
    if policy.verify == "full":
        image.load()
    return CheckedImage(data, EXTENSIONS[image.format], width, height, oddity=oddity)


def _orientation(image: Image.Image) -> int:
    # A PNG's getexif() decodes the whole image in search of a late chunk; JPEG and WebP answer from the header.
    if image.format == "PNG" and not {"exif", "XML:com.adobe.xmp"} & image.info.keys():
        return 1
    return int(image.getexif().get(ORIENTATION, 1))


def _oddity(image: ImageFile.ImageFile) -> str:
    odd = []
    if image.mode not in PLAIN_MODES:
        odd.append(f"mode {image.mode}")
    if _orientation(image) != 1:
        odd.append(f"EXIF orientation {_orientation(image)}")
    return ", ".join(odd)


def _reencoded(image: Image.Image, shorter: int, quality: int) -> CheckedImage:
    upright = ImageOps.exif_transpose(image).convert("RGB")
    scale = shorter / min(upright.size)
    size = (max(shorter, round(upright.width * scale)), max(shorter, round(upright.height * scale)))
    small = upright.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=quality)
    return CheckedImage(out.getvalue(), "jpg", small.width, small.height, altered=True)
