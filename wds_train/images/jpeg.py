"""JPEG: its header, and the pixels of its first rows. `decode.py` and `pillow.py` call it.

A crop needs no row below it, and rows are coded top to bottom. So the height in the frame header is
lowered to the crop's bottom edge before libjpeg-turbo sees the file: it decodes that many rows, to
the same pixels, and warns that bytes were left over. The rows above the crop, and the columns on
its sides, cannot be skipped this way.
"""

from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from wds_train.errors import DataError

START = b"\xff\xd8"  # the first two bytes of every JPEG
# Markers, the second bytes of a segment's head.
SCAN = 0xDA
RESTART_INTERVAL = 0xDD
EXIF = 0xE1
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SEQUENTIAL_FRAMES = (0xC0, 0xC1)
USUAL_FRAMES = (0xC0, 0xC1, 0xC2)  # with Huffman codes, sequential or progressive
LOSSLESS_FRAME = 0xC3
# Processes that neither libjpeg-turbo nor Pillow decodes.
UNREAD_FRAMES = dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical JPEG") | {
    0xCB: "lossless JPEG of arithmetic codes"
}
JPEG_LS_FRAME = 0xF7
BITS = 8  # of a sample
# Numbers of components of a frame.
GREY = 1
COLOURS = 3
CMYK = 4
# Of the first colour, as two digits; the others are 0x11. All decoders know these: 4:4:4, 4:2:2,
# 4:4:0, 4:2:0 and 4:1:1.
USUAL_SAMPLING = (0x11, 0x21, 0x12, 0x22, 0x41)
# Stuffing, the markers without content, and fill bytes.
NO_SEGMENT = (0x00, 0x01, *range(0xD0, 0xD8), 0xFF)
ORIENTATION_TAG = 0x0112
# Sizes in bytes of TIFF's BYTE, SHORT and LONG.
INTEGERS = {1: 1, 3: 2, 4: 4}
# A progressive file may hold thousands of scans of a few bytes, each a pass over all pixels.
# Encoders write about ten.
MAX_SCANS = 100
# TurboJPEG reports its first warning only. If that is this one, every row was decoded without any.
# With restart markers, the bytes left over end at the first of those; but bytes before one may also
# be damage, so such files are decoded whole.
LEFT_OVER = "extraneous bytes before marker 0xd9"


class Header(NamedTuple):
    """The header of a JPEG.

    Attributes:
        width: The width as stored, pixels.
        height: The height as stored, pixels.
        components: The number of its colours.
        orientation: As in EXIF, 1 (upright) to 8.
        frame: The offset of the frame header's content.
        simple: All pixels are in one sequential scan, without restart markers.
        usual: It is of a process and a sampling that every decoder knows.
        lossless: It is of the lossless process.
    """

    width: int
    height: int
    components: int
    orientation: int
    frame: int
    simple: bool
    usual: bool
    lossless: bool


def read_header(data: memoryview) -> Header:
    """Read the header of a JPEG file.

    Args:
        data: The file.

    Raises:
        DataError: It has no header that makes sense, or is a kind of JPEG that no decoder here
            reads.
    """
    # All that segments before the first scan say.
    orientation = 1
    frame_marker = 0
    frame = 0
    restarts = False

    # Segment by segment: a marker of two bytes, the segment's length, and its content.
    at = len(START)
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker in NO_SEGMENT:
            at += 1  # as libjpeg does
            continue
        content = at + 4
        at += 2 + _uint16(data, at + 2)  # the next segment
        if marker == SCAN:
            if not frame or content >= len(data):
                break
            return _make_header(data, frame_marker, frame, content, orientation, restarts=restarts)
        if marker in FRAMES and not frame and content + 6 <= len(data):
            frame_marker = marker
            frame = content
        elif marker == JPEG_LS_FRAME:
            raise DataError(
                "it is a JPEG-LS, which is not read; convert it to an ordinary JPEG, or to PNG"
            )
        elif marker == RESTART_INTERVAL:
            restarts = True
        elif marker == EXIF and orientation == 1 and data[content : content + 6] == b"Exif\0\0":
            orientation = exif_orientation(bytes(data[content:at]))
    raise DataError("it is cut off or damaged: a JPEG without a frame and a scan header")


def _make_header(
    data: memoryview,
    frame_marker: int,
    frame: int,
    scan: int,
    orientation: int,
    *,
    restarts: bool,
) -> Header:
    """Make the header from the contents of the frame header and of the first scan's.

    Args:
        data: The file.
        frame_marker: The marker of the frame, which says the process.
        frame: The offset of the frame header's content.
        scan: The offset of the scan header's content.
        orientation: The orientation by EXIF.
        restarts: True if the file has restart markers.
    """
    components = data[frame + 5]
    _refuse_unread(frame_marker, data[frame], components)
    one_scan = data[scan] == components  # the scan has all colours
    simple = frame_marker in SEQUENTIAL_FRAMES and one_scan and not restarts
    if not simple:
        _check_scans(data)
    sampling = bytes(data[frame + 7 : frame + 7 + 3 * components : 3])
    return Header(
        width=_uint16(data, frame + 3),
        height=_uint16(data, frame + 1),
        components=components,
        orientation=orientation,
        frame=frame,
        simple=simple,
        usual=frame_marker in USUAL_FRAMES and _is_usual(sampling),
        lossless=frame_marker == LOSSLESS_FRAME,
    )


def is_fast(data: memoryview, header: Header) -> bool:
    """Return True if simplejpeg decodes a JPEG correctly, and to RGB.

    Pillow reads the others, such as those of four colours.

    Args:
        data: The file.
        header: Its header.
    """
    if header.lossless or header.components == CMYK:
        return False
    if header.usual:
        return True
    return not isinstance(_read_size(data), str)  # with a cause, it cannot read it


def contradiction(data: memoryview, height: int, width: int) -> str | None:
    """Check the header of a JPEG as simplejpeg reads it. No pixel is decoded.

    Args:
        data: A JPEG that `is_fast`.
        height: The rows that it should have.
        width: The columns that it should have.

    Returns:
        The fault, in words; None if there is none.
    """
    size = _read_size(data)
    if isinstance(size, str):
        return size
    # Rows that libjpeg does not see would keep what was in their memory.
    if size != (height, width):
        return (
            f"its header says {height, width} rows and columns or {size}, "
            "depending on how it is read"
        )
    return None


def _read_size(data: memoryview) -> tuple[int, int] | str:
    """Return the rows and columns as simplejpeg reads them, or why it cannot."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        return str(error)
    except KeyError as error:  # a sampling that libjpeg-turbo knows, and simplejpeg cannot name
        return f"its chroma sampling is not known ({error})"
    return height, width


def decode_all(data: memoryview, header: Header) -> NDArray[np.uint8]:
    """Decode all rows to Pillow's pixels, uint8 [height, width, 3] RGB.

    They come from the exact inverse DCT and the smooth chroma upsampling.

    Args:
        data: The JPEG.
        header: Its header.

    Raises:
        DataError: The image is damaged or cut off.
    """
    return _decode_whole(data, header, fast=False)


def decode_rows(data: memoryview, header: Header, rows: int) -> NDArray[np.uint8]:
    """Decode the first `rows` rows, or more.

    They come from the fast inverse DCT and the plain chroma upsampling. docs/benchmarks.md says
    what these cost in PSNR.

    Args:
        data: The JPEG. If it can be written, the height is lowered in it, and put right again;
            otherwise in a copy.
        header: Its header.
        rows: The rows that are needed.

    Returns:
        Pixels, uint8 [>= rows, width, 3] RGB.

    Raises:
        DataError: One of these rows is damaged or missing.
    """
    # With the height of its header lowered, the file ends at the last row that is needed.
    if header.simple and rows < header.height:
        pixels = np.empty((rows, header.width, 3), np.uint8)
        shortened = data
        if data.readonly:
            shortened = memoryview(bytearray(data))
        height = slice(header.frame + 1, header.frame + 3)
        shortened[height] = rows.to_bytes(2, "big")
        try:
            cause = _decode(shortened, pixels)
        finally:
            # The sample may be decoded again, to another crop.
            shortened[height] = header.height.to_bytes(2, "big")
        if cause is None:
            return pixels

    # All rows are decoded of other kinds of files, and of one that seems damaged, for its cause.
    return _decode_whole(data, header)


def _decode_whole(data: memoryview, header: Header, *, fast: bool = True) -> NDArray[np.uint8]:
    pixels = np.empty((header.height, header.width, 3), np.uint8)
    cause = _decode(data, pixels, fast=fast)
    if cause is not None:
        raise DataError(f"it cannot be decoded: {cause}")
    return pixels


def _decode(data: memoryview, pixels: NDArray[np.uint8], *, fast: bool = True) -> str | None:
    """Fill `pixels`. Return None, or the cause if it cannot be done."""
    height, width, _ = pixels.shape
    cause = contradiction(data, height, width)
    if cause is not None:
        return cause
    try:
        simplejpeg.decode_jpeg(data, fastdct=fast, fastupsample=fast, buffer=pixels)
    except ValueError as error:
        if LEFT_OVER not in str(error):
            return str(error)
    return None


def _refuse_unread(process: int, precision: int, components: int) -> None:
    """Raise `DataError` for what neither simplejpeg nor Pillow decodes.

    They would call it damaged, or no image.
    """
    kind = UNREAD_FRAMES.get(process)
    if precision != BITS:
        kind = f"JPEG of {precision} bits a sample"
    if components not in (GREY, COLOURS, CMYK):
        kind = f"JPEG of {components} colours"
    if kind is not None:
        raise DataError(
            f"it is a {kind}, which is not read; convert it to an ordinary JPEG, or to PNG"
        )


def _is_usual(sampling: bytes) -> bool:
    """Return True if every decoder knows a sampling, which has a byte for each colour."""
    if len(sampling) == GREY:  # the sampling of a single colour has no meaning
        return True
    first, *chroma = sampling
    if len(sampling) == CMYK and chroma.pop() != first:  # black is sampled as the first
        return False
    return first in USUAL_SAMPLING and chroma == [0x11, 0x11]


def _check_scans(data: memoryview) -> None:
    """Raise `DataError` for a file of more than MAX_SCANS scans."""
    scans = bytes(data).count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise DataError(
            f"it is a JPEG of {scans} scans, at most {MAX_SCANS} are read; encode it again"
        )


def exif_orientation(exif: bytes) -> int:
    """Return the orientation in EXIF data, 1 to 8; 1 if there is none that makes sense.

    It is tag 0x0112 of the first directory, a BYTE, SHORT or LONG (EXIF 2.32, 4.6.4).

    Args:
        exif: The EXIF data, with or without their own header.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "big"
    if tiff[:2] == b"II":
        order = "little"

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    # A directory has a count, and 12 bytes for each entry: tag, type, count and value.
    if tiff[:2] in (b"II", b"MM") and number(2, 2) == 42:
        directory = number(4, 4)
        end = min(directory + 2 + 12 * number(directory, 2), len(tiff))
        for entry in range(directory + 2, end, 12):
            if number(entry, 2) == ORIENTATION_TAG:
                value = number(entry + 8, INTEGERS.get(number(entry + 2, 2), 0))
                if 1 <= value <= 8:
                    return value
                return 1
    return 1


def _uint16(data: memoryview, at: int) -> int:
    return data[at] << 8 | data[at + 1]
