"""HEIC, the photographs of telephones: known by its bytes, and read where pillow-heif is installed (the extra `heic`)."""

import io

from PIL import Image, ImageFile

from wds_train.errors import DataError

HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
AVIF_BRANDS = frozenset({b"avif", b"avis"})
FORMAT = "HEIF"  # pillow-heif's name
INSTALL = "HEIC: install pillow-heif (the extra `heic`)"


def is_heic(data: bytes) -> bool:
    """Whether the file begins as HEIC does: a box `ftyp`, with one of its brands. AVIF has the same box with others."""
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[at : at + 4] for at in (8, *range(16, end, 4))}  # the main one, a version, and those it agrees with
    return bool(brands & HEIC_BRANDS) and not brands & AVIF_BRANDS


def open_heic(data: bytes, otherwise: str) -> ImageFile.ImageFile:
    """The image, its header read. `DataError` where pillow-heif is not installed, with what to do `otherwise`."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise DataError(f"{INSTALL}{otherwise}") from error
    register_heif_opener()
    return Image.open(io.BytesIO(data), formats=(FORMAT,))
