"""Check an image, and encode it again where it must be or the policy says so.

An image is readable if the code can read it that reads it in training
(`wds_train/images/pillow.py`), so that nothing passes here and ends a training.
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

# Named one by one: Pillow loads its rarer plugins only when an image fits none of the others; ours
# must always be there.
PLUGINS = (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
# By content, not by name: ImageNet has a PNG called .JPEG. Pillow calls a JPEG with more pictures
# behind the first MPO.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# The last four are recognised so that the message can name them, and for `ImagePolicy.reencode`;
# shards hold none of these.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the first bytes of one
PLAIN_MODES = {"RGB", "L"}


@dataclass(frozen=True)
class ImagePolicy:
    """The rules by which a source's images are checked and encoded.

    Attributes:
        resize_shorter: Pixels. Images whose shorter side is longer are encoded again as JPEG; None
            leaves every byte as it is.
        quality: Of those JPEGs.
        verify: `header` reads what the image says of itself, `full` decodes every pixel.
        reencode: Images of formats that shards do not hold become JPEG, which the loader decodes
            fastest.
    """

    resize_shorter: int | None = None
    quality: int = 90
    verify: str = "header"
    reencode: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the policy as the manifest holds it.

        A later field is left out where it is off, so that older datasets still agree.
        """
        policy = asdict(self)
        if not self.reencode:
            del policy["reencode"]
        return policy


@dataclass(frozen=True)
class CheckedImage:
    """An image as the shard gets it.

    Attributes:
        data: The encoded bytes.
        extension: That of its member in the tar, without the dot.
        width: Of the upright image, pixels.
        height: Of the upright image, pixels.
        altered: The image was encoded again.
        oddity: What people may want to know of the image, and of how it was changed.
    """

    data: bytes
    extension: str
    width: int
    height: int
    altered: bool = False
    oddity: str = ""


def check(data: bytes, policy: ImagePolicy) -> CheckedImage:
    """Check an image, and encode it again if it needs that.

    Args:
        data: The encoded bytes.
        policy: How.

    Raises:
        DataError: A trainer could not read it; the message says why.
    """
    try:
        return _check(data, policy)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # on damaged bytes Pillow's readers raise nearly anything
        cause = f"it cannot be decoded: {error or type(error).__name__}"
        raise DataError(cause.replace("\n", " ")) from error


def _check(data: bytes, policy: ImagePolicy) -> CheckedImage:
    if not data:
        raise DataError("zero bytes")
    header = _jpeg_header(data)
    image = _open(data)
    if image.format not in EXTENSIONS:
        return _encode_foreign(image, data, policy)
    if policy.resize_shorter and min(image.size) > policy.resize_shorter:
        return _encode(image, data, policy, [])

    # The image can stay as it is if training can read it.
    width, height = _stored_size(image, data, header)
    if policy.verify == "full" or (header and not header.usual):
        whole(data)  # the header says too little of a rare kind of JPEG
    turn = header.orientation if header else orientation(data)
    if turn >= 5:  # it lies on its side
        width, height = height, width
    oddities = _oddities(image, turn)

    # Pixels that training would read in another way than people see them are written as a PNG.
    if may_change(image, data):
        made = plain(image, data)
        oddities += made.notes
        if made.changed:
            return CheckedImage(
                data=png_of(made.image),
                extension="png",
                width=width,
                height=height,
                altered=True,
                oddity=", ".join(oddities),
            )
    extension = EXTENSIONS[image.format]
    return CheckedImage(data, extension, width, height, oddity=", ".join(oddities))


def _jpeg_header(data: bytes) -> jpeg.Header | None:
    """Return the header of a JPEG, read as in training; None for other formats.

    It says better than Pillow what is wrong with an unreadable JPEG.
    """
    if data[:2] != jpeg.START:
        return None
    try:
        return jpeg.read_header(memoryview(data))
    except DataError as error:
        raise DataError(f"it cannot be decoded: {error}") from error


def _open(data: bytes) -> ImageFile.ImageFile:
    """Open the image by Pillow, which reads its header.

    Raises:
        DataError: It is no image, or of an unknown format.
    """
    if is_heic(data):
        return open_heic(data, " and use --reencode, or convert it")
    try:
        return Image.open(io.BytesIO(as_pillow_reads(data)), formats=FORMATS)
    except UnidentifiedImageError as error:  # whose text says where the bytes lie in memory
        if data[:4] in TIFF:
            raise DataError(
                "it is a TIFF of a kind that is not read; convert it to one of 8 bits a sample"
            ) from error
        raise DataError(
            "it cannot be decoded: it is no image, or of a format that is not known"
        ) from error


def _stored_size(
    image: ImageFile.ImageFile, data: bytes, header: jpeg.Header | None
) -> tuple[int, int]:
    """Return width and height as stored, pixels.

    They are those of the decoder that training uses: simplejpeg where it can, else Pillow.

    Raises:
        DataError: That decoder could not read the image.
    """
    width, height = image.size
    if header and jpeg.is_fast(memoryview(data), header):
        width = header.width
        height = header.height
        cause = jpeg.contradiction(memoryview(data), height, width)
        if cause is not None:
            raise DataError(f"it cannot be decoded: {cause}")
    _refuse_size(width, height)
    check_size(width, height)
    return width, height


def _encode_foreign(image: ImageFile.ImageFile, data: bytes, policy: ImagePolicy) -> CheckedImage:
    """Encode an image of a format that shards do not hold, if the policy says so."""
    if not policy.reencode:
        name = "HEIC" if image.format == HEIF else image.format
        raise DataError(
            f"its format is {name}; shards hold JPEG, PNG and WebP: "
            "convert it, leave it out, or encode it anew with --reencode"
        )
    _refuse_size(*image.size)
    oddities = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        oddities.append(f"the first of {frames} frames")
    return _encode(image, data, policy, oddities)


def _refuse_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(
            f"it has {width}x{height} pixels, the loader takes {MAX_PIXELS}; "
            "shrink it (--resize-shorter)"
        )


def _oddities(image: ImageFile.ImageFile, turn: int) -> list[str]:
    """List what is unusual: the mode, and an EXIF orientation `turn` other than upright."""
    oddities = []
    if image.mode not in PLAIN_MODES:
        oddities.append(f"mode {image.mode}")
    if turn != 1:
        oddities.append(f"EXIF orientation {turn}")
    return oddities


def _encode(
    image: ImageFile.ImageFile, data: bytes, policy: ImagePolicy, oddities: list[str]
) -> CheckedImage:
    """Encode the image as a JPEG, its shorter side `policy.resize_shorter` at most.

    Args:
        image: The image, opened.
        data: Its bytes.
        policy: Size and quality.
        oddities: What else is unusual about it.
    """
    # As people see it: upright, without transparency, in 8 bits a channel.
    made = plain(image, data)
    small = made.image
    shorter = policy.resize_shorter
    if shorter and min(small.size) > shorter:
        # Rounding must not make the shorter side a pixel too short.
        scale = shorter / min(small.size)
        width = max(shorter, round(small.width * scale))
        height = max(shorter, round(small.height * scale))
        small = small.resize((width, height), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=policy.quality)
    return CheckedImage(
        data=out.getvalue(),
        extension="jpg",
        width=small.width,
        height=small.height,
        altered=True,
        oddity=", ".join([*oddities, *made.notes]),
    )
