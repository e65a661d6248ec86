"""An image's bytes, checked and, where the policy says so, encoded anew."""

import io
import struct
from dataclasses import asdict, dataclass
from typing import Any

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from wds_train.errors import DataError
from wds_train.format.index import MAX_PIXELS
from wds_train.transforms.pillow import orientation, to_rgb, upright

# Named one by one: Pillow loads its rarer plugins only when an image fits none of the others, ours must always be there.
PLUGINS = (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
# By content, not by name: ImageNet has a PNG called .JPEG. MPO is what Pillow calls a JPEG with more pictures behind the first.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# The last four recognised so that the message can name them, and for `ImagePolicy.reencode`; shards hold none of these.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
PLAIN_MODES = {"RGB", "L"}
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    KeyError,
    TypeError,
    IndexError,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class ImagePolicy:
    """What is done to the source's images. `resize_shorter`: pixels; images whose shorter side is longer are encoded
    anew as JPEG of `quality`; None leaves every byte alone. `verify`: `header` reads what the image says of itself,
    `full` decodes every pixel. `reencode`: images of formats that shards do not hold become JPEG of `quality`, which
    the loader decodes fastest.
    """

    resize_shorter: int | None = None
    quality: int = 90
    verify: str = "header"
    reencode: bool = False

    def to_json(self) -> dict[str, Any]:
        """The policy as the manifest holds it; what is off and came later is left out, so that older datasets still
        agree.
        """
        return {name: value for name, value in asdict(self).items() if name != "reencode" or value}


@dataclass(frozen=True)
class CheckedImage:
    """An image as the shard gets it. `width` and `height` in pixels of the upright image. `altered`: encoded anew.
    `oddity`: what people may want to know of an image that is kept as it is.
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
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:  # which tells where the bytes lie in memory
        raise DataError("it cannot be decoded: it is no image, or of a format that is not known") from error
    if image.format not in EXTENSIONS:
        if not policy.reencode:
            raise DataError(
                f"its format is {image.format}; shards hold JPEG, PNG and WebP: convert it, leave it out, or encode it "
                "anew with --reencode"
            )
        _refuse_size(*image.size)
        frames = getattr(image, "n_frames", 1)
        return _reencoded(image, data, policy, f"the first of {frames} frames" if frames > 1 else "")
    turn = orientation(data)
    width, height = image.size[::-1] if turn >= 5 else image.size
    if policy.resize_shorter and min(width, height) > policy.resize_shorter:
        return _reencoded(image, data, policy)
    _refuse_size(width, height)
    oddity = _oddity(image, turn)
    if policy.verify == "full":
        image.load()
    return CheckedImage(data, EXTENSIONS[image.format], width, height, oddity=oddity)


def _refuse_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"it has {width}x{height} pixels, the loader takes {MAX_PIXELS}; shrink it (--resize-shorter)")


def _oddity(image: ImageFile.ImageFile, turn: int) -> str:
    odd = []
    if image.mode not in PLAIN_MODES:
        odd.append(f"mode {image.mode}")
    if turn != 1:
        odd.append(f"EXIF orientation {turn}")
    return ", ".join(odd)


def _reencoded(image: Image.Image, data: bytes, policy: ImagePolicy, oddity: str = "") -> CheckedImage:
    """The image as a JPEG, upright and in RGB, its shorter side `policy.resize_shorter` at most."""
    small, shorter = to_rgb(upright(image, data)), policy.resize_shorter
    if shorter and min(small.size) > shorter:
        scale = shorter / min(small.size)
        size = (max(shorter, round(small.width * scale)), max(shorter, round(small.height * scale)))
        small = small.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=policy.quality)
    return CheckedImage(out.getvalue(), "jpg", small.width, small.height, altered=True, oddity=oddity)
