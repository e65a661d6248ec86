"""Image files, as conversion and training must both read them: decoder, orientation and colours.

JPEG is read by simplejpeg where that can (`jpeg.py`), all else by Pillow. A conversion asks here,
too, so that it accepts nothing that the loader cannot decode. Neither PyTorch nor OpenCV is
imported.
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

# The formats that shards may hold.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
# The first bytes of files.
PNG = b"\x89PNG\r\n\x1a\n"
RIFF = b"RIFF"
WEBP = b"WEBP"
# Chunks of a PNG that say nothing about its pixels as we read them. Pillow refuses the whole image
# if one of them is larger than it likes, and takes a text called "transparency" for a transparent
# colour.
UNREAD_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# Before PNG had a chunk for EXIF, ImageMagick and others wrote it as hexadecimal digits into a text
# of this name.
RAW_PROFILE = b"Raw profile type exif"
# Bytes of that text. EXIF of a JPEG has 64 KiB at most, and digits take twice as many.
MOST_RAW_PROFILE = 1 << 20
# Pillow's names for a description that it would turn images by.
XMP = ("xmp", "XML:com.adobe.xmp")
# The turns that make an image upright, by EXIF orientation.
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
    """Return the header of a JPEG that simplejpeg decodes; None for what is left to Pillow.

    Raises:
        DataError: Neither can decode it.
    """
    if len(data) == 0:
        raise DataError("it is empty (0 bytes)")
    if data[:2] != jpeg.START:
        return None
    header = jpeg.read_header(memoryview(data))
    check_size(header.width, header.height)
    if not jpeg.is_fast(memoryview(data), header):
        return None
    return header


def check_size(width: int, height: int) -> None:
    """Raise `DataError` for an image without pixels, or of more than MAX_PIXELS."""
    if not 0 < width * height <= MAX_PIXELS:
        raise DataError(
            f"it has {width}x{height} pixels, 1 to {MAX_PIXELS} are allowed; "
            "shrink it, or raise MAX_PIXELS in wds_train/dataset/index.py"
        )


def open_image(data: bytes | memoryview) -> ImageFile.ImageFile:
    """Open an image by Pillow, which reads its header and no pixel.

    Raises:
        DataError: Pillow cannot read it, or it has more than MAX_PIXELS.
    """
    with foreign_errors(data):
        image = Image.open(io.BytesIO(as_pillow_reads(bytes(data))), formats=PILLOW_FORMATS)
        check_size(*image.size)
        return image


def open_upright(data: bytes | memoryview) -> Image.Image:
    """Decode the upright image by Pillow, in the file's own mode.

    Raises:
        DataError: As for `open_image`; or its pixels are damaged.
    """
    image = open_image(data)
    with foreign_errors(data):
        image.load()  # here, where what damage raises becomes a `DataError`
        return upright(image, data)


def whole(data: bytes | memoryview) -> Image.Image:
    """Decode the upright image in RGB, every pixel of it, exactly as Pillow does.

    Raises:
        DataError: The loader cannot decode it.
    """
    header = fast_header(data)
    if header is None:
        return to_rgb(open_upright(data))
    return upright(Image.fromarray(jpeg.decode_all(memoryview(data), header)), data)


def orientation(data: bytes | memoryview) -> int:
    """Return the orientation of an image file by its EXIF, 1 (upright) to 8.

    The EXIF may stand anywhere in the file. All code that asks goes through here, and for JPEG
    through `jpeg.read_header`: two readers that disagree would give an index whose sizes are not
    the decoder's. XMP is not read: browsers ignore it, and so does all that reads EXIF alone.

    Raises:
        DataError: It is a JPEG without a header.
    """
    if data[:2] == jpeg.START:
        return jpeg.read_header(memoryview(data)).orientation
    return jpeg.exif_orientation(_exif(bytes(data)))


def turn_of(image: Image.Image, data: bytes | memoryview) -> Image.Transpose | None:
    """Return the turn that makes an image upright after `load`; None if it is upright.

    The image may be of any format.

    For formats that shards do not hold, Pillow says it: it knows that AVIF is turned by its own
    boxes, and has turned a TIFF already.

    Args:
        image: The image.
        data: The file that it is in.
    """
    if not isinstance(image, ImageFile.ImageFile) or image.format in (*PILLOW_FORMATS, "MPO"):
        return UPRIGHT.get(orientation(data))
    return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))


def upright(image: Image.Image, data: bytes | memoryview) -> Image.Image:
    """Return the image in the file `data`, turned as its EXIF says."""
    turn = turn_of(image, data)
    if turn is None:
        return image
    return image.transpose(turn)


def load(image: ImageFile.ImageFile) -> None:
    """Decode the pixels of an image of any format, and do not let Pillow turn it by XMP."""
    for name in XMP:
        image.info.pop(name, None)
    image.load()


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in 8-bit RGB: of 16 bits the upper 8, where `convert` would clip at 255."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def as_pillow_reads(data: bytes) -> bytes:
    """Return the file for Pillow: a PNG without its texts and colour profile.

    Raises:
        DataError: It is a PNG that is not of the standard.
    """
    if data.startswith(PNG) and data[12:16] != b"IHDR":
        raise DataError(
            f"it is no PNG of the standard: it begins with {data[12:16]!r}, "
            "as Apple's programs write; convert it"
        )
    # The stretches between the chunks that are left out.
    kept = []
    start = 0
    for chunk in png_chunks(data):
        if chunk.kind in UNREAD_CHUNKS:
            kept.append(data[start : chunk.start])
            start = chunk.end
    if start == 0:
        return data
    return b"".join([*kept, data[start:]])


class Chunk(NamedTuple):
    """A chunk of a PNG or WebP file.

    Attributes:
        kind: Its type, four bytes.
        start: Where it starts in the file.
        end: Where it ends, with a checksum or padding.
        content: Where its content lies.
    """

    kind: bytes
    start: int
    end: int
    content: slice


def png_chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks of a PNG, in order; of another file none."""
    if data.startswith(PNG):
        yield from _chunks(data, len(PNG), ">I4s", 4)


@contextmanager
def foreign_errors(data: bytes | memoryview) -> Iterator[None]:
    """Turn whatever a reader raises on the bytes `data` into a `DataError`."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"it is no JPEG, PNG, WebP or GIF; it begins with {bytes(data[:8])!r}"
        ) from error
    # On damaged bytes Pillow's readers raise nearly anything: struct.error, KeyError, ...
    except Exception as error:
        raise DataError(f"it cannot be decoded: {error}") from error


def _exif(data: bytes) -> bytes:
    """Return the EXIF of a PNG or WebP; empty if there is none.

    It is the content of the chunk for EXIF. A PNG may have a raw profile instead.
    """
    if data.startswith(RIFF) and data[8:12] == WEBP:
        for chunk in _chunks(data, 12, "<4sI", 0):
            if chunk.kind == b"EXIF":
                return data[chunk.content]
        return b""
    raw = b""
    for chunk in png_chunks(data):
        if chunk.kind == b"eXIf":
            return data[chunk.content]
        if chunk.kind in UNREAD_CHUNKS and not raw:
            raw = _raw_profile(chunk.kind, data[chunk.content])
    return raw


def _raw_profile(kind: bytes, content: bytes) -> bytes:
    """Return the EXIF in a text of a PNG; empty if there is none.

    The text has three lines (nothing, a word, the size), and then hexadecimal digits.
    """
    keyword, _, rest = content.partition(b"\0")
    if keyword != RAW_PROFILE:
        return b""
    # A PNG has three kinds of text: plain, compressed, and international, which may be either.
    text = b""
    with suppress(zlib.error, ValueError, IndexError):
        if kind == b"tEXt":
            text = rest[:MOST_RAW_PROFILE]
        elif kind == b"zTXt":
            text = _inflate(rest[1:])
        elif kind == b"iTXt":
            body = rest[2:].split(b"\0", 2)[2]  # behind a language and a translated keyword
            text = body[:MOST_RAW_PROFILE]
            if rest[0]:  # the flag of compression
                text = _inflate(body)
        return bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
    return b""


def _inflate(data: bytes) -> bytes:
    """Decompress a text, of which no more than MOST_RAW_PROFILE bytes are looked at."""
    return zlib.decompressobj().decompress(data, MOST_RAW_PROFILE)


def _chunks(data: bytes, at: int, head: str, tail: int) -> Iterator[Chunk]:
    """Yield the chunks of a file from byte `at` on.

    Args:
        data: The file.
        at: Where the first one starts.
        head: The format of a chunk's head: its kind and the size of its content, in any order.
        tail: The bytes of a checksum behind the content. Without one, as in RIFF, content is padded
            to even sizes.
    """
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(head, data, at)
        if isinstance(kind, int):  # PNG has the size first
            kind, size = size, kind
        end = at + 8 + size + (tail or size % 2)
        yield Chunk(kind, at, end, slice(at + 8, at + 8 + size))
        at = end
