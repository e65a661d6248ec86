"""HEIC, the photographs of telephones: recognised by its bytes, read by pillow-heif.

pillow-heif is installed with the extra `heic`.
"""

import io

from PIL import Image, ImageFile

from wds_train.errors import DataError

# The brands of a file say which codec its images have: HEVC, or AV1.
HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
AVIF_BRANDS = frozenset({b"avif", b"avis"})
FORMAT = "HEIF"  # pillow-heif's name
INSTALL = "HEIC: install pillow-heif (the extra `heic`)"


def is_heic(data: bytes) -> bool:
    """Return True if a file begins as HEIC does: with a box `ftyp` that has one of its brands.

    AVIF has the same box with other brands.

    Args:
        data: The file, or its first 256 bytes.
    """
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), 256)
    # The main brand, a version, and the brands that the file agrees with.
    brands = {data[at : at + 4] for at in (8, *range(16, end, 4))}
    return bool(brands & HEIC_BRANDS) and not brands & AVIF_BRANDS


def open_heic(data: bytes, otherwise: str) -> ImageFile.ImageFile:
    """Open a HEIC file; its pixels are not decoded yet.

    Args:
        data: The file.
        otherwise: The end of the message if pillow-heif is not installed: another remedy.

    Raises:
        DataError: pillow-heif is not installed.
    """
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise DataError(f"{INSTALL}{otherwise}") from error
    register_heif_opener()
    return Image.open(io.BytesIO(data), formats=(FORMAT,))
