"""What conversion and training must agree on about an image file: which decoder reads it, which way is up, what its colours are.

JPEG is read by simplejpeg where that can (`jpeg.py`), all else by Pillow. A conversion asks here, too, so that nothing
passes it which the loader cannot decode. Neither PyTorch nor OpenCV is imported.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from wds_train.dataset.index import MAX_PIXELS
from wds_train.errors import DataError
from wds_train.images import jpeg

PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
PNG, RIFF, WEBP = b"\x89PNG\r\n\x1a\n", b"RIFF", b"WEBP"
# Chunks of a PNG that say nothing about its pixels as we read them. Pillow refuses the whole image where one of them is
# larger than it likes, and takes a text called "transparency" for a transparent colour.
UNREAD_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# Before PNG had a chunk for EXIF, ImageMagick and others wrote it as hexadecimal digits into a text of this name.
RAW_PROFILE = b"Raw profile type exif"
MOST_RAW_PROFILE = 1 << 20  # bytes of that text; EXIF of a JPEG has 64 KiB at most, and digits take twice as many
XMP = ("xmp", "XML:com.adobe.xmp")  # what Pillow calls it
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def fast_header(data: bytes | memoryview) -> jpeg.Header | None:
    """The header of a JPEG that simplejpeg decodes; None for what is left to Pillow. `DataError` where neither can."""
    if len(data) == 0:
        raise DataError("it is empty (0 bytes)")
    if data[:2] != jpeg.START:
        return None
    header = jpeg.read_header(memoryview(data))
    check_size(header.width, header.height)
    return header if jpeg.is_fast(memoryview(data), header) else None


def check_size(width: int, height: int) -> None:
    """`DataError` for an image without pixels, or of more than are read."""
    if not 0 < width * height <= MAX_PIXELS:
        raise DataError(
            f"it has {width}x{height} pixels, 1 to {MAX_PIXELS} are allowed; "
            "shrink it, or raise MAX_PIXELS in wds_train/dataset/index.py"
        )


def open_image(data: bytes | memoryview) -> ImageFile.ImageFile:
    """The image, opened by Pillow: its header is read and no pixel. `DataError` where Pillow cannot."""
    with foreign_errors(data):
        image = Image.open(io.BytesIO(as_pillow_reads(bytes(data))), formats=PILLOW_FORMATS)
        check_size(*image.size)
        return image


def open_upright(data: bytes | memoryview) -> Image.Image:
    """The upright image as Pillow decodes it, in the file's own mode. `DataError` as above, and for damaged pixels."""
    image = open_image(data)
    with foreign_errors(data):
        image.load()  # here, where what damage raises becomes a `DataError`
        return upright(image, data)


def whole(data: bytes | memoryview) -> Image.Image:
    """The upright image in RGB, every pixel of it, exactly as Pillow decodes it. `DataError` where the loader cannot."""
    if (header := fast_header(data)) is None:
        return to_rgb(open_upright(data))
    return upright(Image.fromarray(jpeg.decode_all(memoryview(data), header)), data)


def orientation(data: bytes | memoryview) -> int:
    """The orientation of an image file, 1 (upright) to 8, from its EXIF: wherever in the file that stands.

    Everything that asks goes through here, and for JPEG through `jpeg.read_header`: two readers that disagree give an index
    whose sizes are not the decoder's. XMP is not asked: browsers do not, nor does anything that reads EXIF alone.
    `DataError` for a JPEG without a header.
    """
    if data[:2] == jpeg.START:
        return jpeg.read_header(memoryview(data)).orientation
    return jpeg.exif_orientation(_exif(bytes(data)))


def turn_of(image: Image.Image, data: bytes | memoryview) -> Image.Transpose | None:
    """What turns the image that `data` holds upright, after `load`; None where it is. This is for images of every format.

    Of what shards do not hold, Pillow says it: it knows that AVIF is turned by boxes of its own, and has turned a TIFF.
    """
    if not isinstance(image, ImageFile.ImageFile) or image.format in (*PILLOW_FORMATS, "MPO"):
        return UPRIGHT.get(orientation(data))
    return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))


def upright(image: Image.Image, data: bytes | memoryview) -> Image.Image:
    """The `image`, which `data` holds, turned as its EXIF says."""
    turn = turn_of(image, data)
    return image if turn is None else image.transpose(turn)


def load(image: ImageFile.ImageFile) -> None:
    """Decode the pixels of an image of any format, which Pillow turns by XMP otherwise where EXIF says nothing."""
    for name in XMP:
        image.info.pop(name, None)
    image.load()


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB: of 16 bits the upper 8, which `convert` would clip at 255 instead."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def as_pillow_reads(data: bytes) -> bytes:
    """The file as it is given to Pillow: a PNG without its texts and colour profile. `DataError` for one that is none."""
    if data.startswith(PNG) and data[12:16] != b"IHDR":
        raise DataError(
            f"it is no PNG of the standard: it begins with {data[12:16]!r}, as Apple's programs write; convert it"
        )
    kept, start = [], 0
    for chunk in png_chunks(data):
        if chunk.kind in UNREAD_CHUNKS:
            kept.append(data[start : chunk.start])
            start = chunk.end
    return b"".join([*kept, data[start:]]) if start else data


class Chunk(NamedTuple):
    """A piece of a PNG or WebP file: `start` and `end` of all of it, and `content`, where its content lies."""

    kind: bytes
    start: int
    end: int
    content: slice


def png_chunks(data: bytes) -> Iterator[Chunk]:
    """The chunks of a PNG, in order; of another file none."""
    if data.startswith(PNG):
        yield from _chunks(data, len(PNG), ">I4s", 4)


@contextmanager
def foreign_errors(data: bytes | memoryview) -> Iterator[None]:
    """Make a `DataError` of whatever a reader raises on the bytes `data`."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"it is no JPEG, PNG, WebP or GIF; it begins with {bytes(data[:8])!r}") from error
    except Exception as error:  # on damaged bytes Pillow's readers raise nearly anything: struct.error, KeyError, ...
        raise DataError(f"it cannot be decoded: {error}") from error


def _exif(data: bytes) -> bytes:
    """The EXIF of a PNG or WebP: the content of its chunk for that, else of a PNG's raw profile; empty where there is none."""
    if data.startswith(RIFF) and data[8:12] == WEBP:
        return next((data[chunk.content] for chunk in _chunks(data, 12, "<4sI", 0) if chunk.kind == b"EXIF"), b"")
    raw = b""
    for chunk in png_chunks(data):
        if chunk.kind == b"eXIf":
            return data[chunk.content]
        if chunk.kind in UNREAD_CHUNKS and not raw:
            raw = _raw_profile(chunk.kind, data[chunk.content])
    return raw


def _raw_profile(kind: bytes, content: bytes) -> bytes:
    """The EXIF in a text of a PNG: three lines (nothing, a word, the size), then hexadecimal digits. Empty where there is none."""
    keyword, _, rest = content.partition(b"\0")
    if keyword != RAW_PROFILE:
        return b""
    text = b""
    with suppress(zlib.error, ValueError, IndexError):
        if kind == b"tEXt":
            text = rest[:MOST_RAW_PROFILE]
        elif kind == b"zTXt":
            text = _inflated(rest[1:])
        elif kind == b"iTXt":
            body = rest[2:].split(b"\0", 2)[2]  # behind a language and a translated keyword
            text = _inflated(body) if rest[0] else body[:MOST_RAW_PROFILE]
        return bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
    return b""


def _inflated(data: bytes) -> bytes:
    return zlib.decompressobj().decompress(data, MOST_RAW_PROFILE)


def _chunks(data: bytes, at: int, head: str, tail: int) -> Iterator[Chunk]:
    """Each chunk; `tail`: the bytes of a checksum that follow its content. RIFF pads to even sizes."""
    while at + 8 <= len(data):
        one, other = struct.unpack_from(head, data, at)
        kind, size = (other, one) if isinstance(one, int) else (one, other)
        end = at + 8 + size + (tail or size % 2)
        yield Chunk(kind, at, end, slice(at + 8, at + 8 + size))
        at = end
