"""An image's bytes, checked and, where they must be or the policy says so, encoded anew.

Whether an image can be read is asked of what reads it in training (`wds_train/images/pillow.py`), so that nothing
passes here and ends a training.
"""

import io
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

from wds_train.dataset.index import MAX_PIXELS
from wds_train.errors import DataError
from wds_train.images import jpeg
from wds_train.images.heic import FORMAT as HEIF
from wds_train.images.heic import is_heic, open_heic
from wds_train.images.pillow import as_pillow_reads, check_size, orientation, whole
from wds_train.images.plain import may_change, plain, png_of

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
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how one begins
PLAIN_MODES = {"RGB", "L"}


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
    `oddity`: what people may want to know of the image, and of what was done to it.
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
    except (DataError, MemoryError):
        raise
    except Exception as error:  # on damaged bytes Pillow's readers raise nearly anything
        raise DataError(f"it cannot be decoded: {error or type(error).__name__}".replace("\n", " ")) from error


def _check(data: bytes, policy: ImagePolicy) -> CheckedImage:
    if not data:
        raise DataError("zero bytes")
    header = _jpeg_header(data)
    image = _opened(data)
    if image.format not in EXTENSIONS:
        return _foreign(image, data, policy)
    if policy.resize_shorter and min(image.size) > policy.resize_shorter:
        return _reencoded(image, data, policy, [])
    stored = _size_read(image, data, header)
    if policy.verify == "full" or (header and not header.usual):
        whole(data)  # the header says too little of a rare kind of JPEG
    turn = header.orientation if header else orientation(data)
    width, height = stored[::-1] if turn >= 5 else stored
    odd = _oddities(image, turn)
    if may_change(image, data):
        made = plain(image, data)
        odd += made.notes
        if made.changed:
            return CheckedImage(png_of(made.image), "png", width, height, altered=True, oddity=", ".join(odd))
    return CheckedImage(data, EXTENSIONS[image.format], width, height, oddity=", ".join(odd))


def _jpeg_header(data: bytes) -> jpeg.Header | None:
    """The header of a JPEG, as training reads it, which says better than Pillow what it is that cannot be read."""
    if data[:2] != jpeg.START:
        return None
    try:
        return jpeg.read_header(memoryview(data))
    except DataError as error:
        raise DataError(f"it cannot be decoded: {error}") from error


def _opened(data: bytes) -> ImageFile.ImageFile:
    """The image, opened by Pillow: its header is read. `DataError` for what is none."""
    if is_heic(data):
        return open_heic(data, " and use --reencode, or convert it")
    try:
        return Image.open(io.BytesIO(as_pillow_reads(data)), formats=FORMATS)
    except UnidentifiedImageError as error:  # which tells where the bytes lie in memory
        if data[:4] in TIFF:
            raise DataError("it is a TIFF of a kind that is not read; convert it to one of 8 bits a sample") from error
        raise DataError("it cannot be decoded: it is no image, or of a format that is not known") from error


def _size_read(image: ImageFile.ImageFile, data: bytes, header: jpeg.Header | None) -> tuple[int, int]:
    """Width and height as stored, by what decodes the image in training: simplejpeg where it can, else Pillow."""
    width, height = image.size
    if header and jpeg.is_fast(memoryview(data), header):
        width, height = header.width, header.height
        if (cause := jpeg.contradiction(memoryview(data), height, width)) is not None:
            raise DataError(f"it cannot be decoded: {cause}")
    _refuse_size(width, height)
    check_size(width, height)
    return width, height


def _foreign(image: ImageFile.ImageFile, data: bytes, policy: ImagePolicy) -> CheckedImage:
    """An image of a format that shards do not hold, encoded anew if that is wanted."""
    if not policy.reencode:
        name = "HEIC" if image.format == HEIF else image.format
        raise DataError(
            f"its format is {name}; shards hold JPEG, PNG and WebP: convert it, leave it out, or encode it anew with --reencode"
        )
    _refuse_size(*image.size)
    frames = getattr(image, "n_frames", 1)
    return _reencoded(image, data, policy, [f"the first of {frames} frames"] if frames > 1 else [])


def _refuse_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"it has {width}x{height} pixels, the loader takes {MAX_PIXELS}; shrink it (--resize-shorter)")


def _oddities(image: ImageFile.ImageFile, turn: int) -> list[str]:
    odd = []
    if image.mode not in PLAIN_MODES:
        odd.append(f"mode {image.mode}")
    if turn != 1:
        odd.append(f"EXIF orientation {turn}")
    return odd


def _reencoded(image: ImageFile.ImageFile, data: bytes, policy: ImagePolicy, odd: list[str]) -> CheckedImage:
    """The image as a JPEG, made plain, its shorter side `policy.resize_shorter` at most. `odd`: what else it is."""
    made, shorter = plain(image, data), policy.resize_shorter
    small = made.image
    if shorter and min(small.size) > shorter:
        scale = shorter / min(small.size)
        size = (max(shorter, round(small.width * scale)), max(shorter, round(small.height * scale)))
        small = small.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=policy.quality)
    oddity = ", ".join([*odd, *made.notes])
    return CheckedImage(out.getvalue(), "jpg", small.width, small.height, altered=True, oddity=oddity)
