"""What conversion and training must agree on about an image that Pillow opens: which way is up, and what its colours are."""

import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

from wds_train.transforms import jpeg

PNG, RIFF, WEBP = b"\x89PNG\r\n\x1a\n", b"RIFF", b"WEBP"
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(data: bytes | memoryview) -> int:
    """The orientation of an image file, 1 (upright) to 8, from its EXIF: wherever in the file that stands.

    Everything that asks goes through here, and for JPEG through `jpeg.read_header`: two readers that disagree give an index
    whose sizes are not the decoder's. XMP is not asked: browsers do not, nor does anything that reads EXIF alone.
    `DataError` for a JPEG without a header.
    """
    if data[:2] == jpeg.START:
        return jpeg.read_header(memoryview(data)).orientation
    return jpeg.exif_orientation(_exif(bytes(data)))


def upright(image: Image.Image, data: bytes | memoryview) -> Image.Image:
    """The `image`, which `data` holds, turned as its EXIF says."""
    turn = UPRIGHT.get(orientation(data))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB: of 16 bits the upper 8, which `convert` would clip at 255 instead."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _exif(data: bytes) -> bytes:
    """The content of PNG's eXIf chunk or WebP's EXIF chunk; empty where there is none."""
    if data.startswith(PNG):
        return next((content for kind, content in _chunks(data, len(PNG), ">I4s", 4) if kind == b"eXIf"), b"")
    if data.startswith(RIFF) and data[8:12] == WEBP:
        return next((content for kind, content in _chunks(data, 12, "<4sI", 0) if kind == b"EXIF"), b"")
    return b""


def _chunks(data: bytes, at: int, head: str, tail: int) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each chunk; `tail`: the bytes of a checksum that follow. RIFF pads to even sizes."""
    while at + 8 <= len(data):
        one, other = struct.unpack_from(head, data, at)
        kind, size = (other, one) if isinstance(one, int) else (one, other)
        yield kind, data[at + 8 : at + 8 + size]
        at += 8 + size + (tail or size % 2)
