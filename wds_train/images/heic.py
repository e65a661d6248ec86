"""HEIC, the photographs of telephones: recognised by its bytes, read by pillow-heif.

pillow-heif is installed with the extra `heic`.
"""

import io

from PIL import Image, ImageFile

from wds_train.errors import DataError

HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
AVIF_BRANDS = frozenset({b"avif", b"avis"})
FORMAT = "HEIF"  # pillow-heif's name
INSTALL = "HEIC: install pillow-heif (the extra `heic`)"


def is_heic(data: bytes) -> bool:
    """Return whether a file begins as HEIC does: with a box `ftyp` that has one of its brands.

    AVIF has the same box with other brands.
    """
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), 256)
    # The main brand, a version, and the brands that the file agrees with.
    starts = (8, *range(16, end, 4))
    brands = {data[at : at + 4] for at in starts}
    return bool(brands & HEIC_BRANDS) and not brands & AVIF_BRANDS


def open_heic(data: bytes, otherwise: str) -> ImageFile.ImageFile:
    """Open a HEIC file; its pixels are not decoded yet.

    Args:
        data: The file.
        otherwise: What else to do where pillow-heif is not installed, for the message.

    Raises:
        DataError: pillow-heif is not installed.
    """
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise DataError(f"{INSTALL}{otherwise}") from error
    register_heif_opener()
    return Image.open(io.BytesIO(data), formats=(FORMAT,))
