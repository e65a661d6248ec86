"""A PNG with a few images of each class: a look at whether the labels are right."""

import functools
import io
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from wds_train.console import readable
from wds_train.dataset.manifest import ClassInfo
from wds_train.dataset.reader import Dataset, SplitReader
from wds_train.errors import WdsTrainError, unwritable
from wds_train.images.pillow import to_rgb, upright

CLASSES = 20  # at most on the sheet
IMAGES = 4  # at most of each class

# Lengths are in pixels. The sheet is as wide as a page on a small screen.
WIDTH = 1280
MARGIN = 24
GAP = 8

# Sizes of fonts, and the height of a line as a multiple of its font's size.
TITLE = 22
TEXT = 15
CAPTION = 12
LINE = 1.45

CAPTION_LINES = 2  # at most for a key
LONGEST = 160  # letters of a line: they are measured one by one
TINY = 32  # an image with no longer side than this is enlarged, so that its pixels are squares
FEW = 3  # up to so many classes take one column, with larger images; more take two

INK = "#1a1a1a"
FAINT = "#5f6368"
PAPER = "#ffffff"
MOUNT = "#eceff1"

# Pillow raises these for images whose bytes are damaged.
DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)


class Sheet:
    """A page of text and images."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH, height), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(self, left: int, top: int, line: str, size: int, ink: str = INK) -> None:
        self._draw.text((left, top), line, ink, _font(size))

    def picture(self, left: int, top: int, side: int, image: Image.Image | None) -> None:
        """Draw the whole image in the middle of a square of `side` pixels.

        Without an image, draw a crossed square.
        """
        self._draw.rectangle([left, top, left + side - 1, top + side - 1], MOUNT)
        if image is None:
            self._draw.line([(left, top), (left + side - 1, top + side - 1)], "red", 3)
            return
        scaled = _scale(image, side)
        x = left + (side - scaled.width) // 2
        y = top + (side - scaled.height) // 2
        self.image.paste(scaled, (x, y))


class _Cell(NamedTuple):
    """The place of a class on the sheet: its upper left corner, its width, its images' side."""

    left: int
    top: int
    width: int
    side: int


class _Title(NamedTuple):
    """The line above the images of a class: a name on the left, a remark on the right."""

    name: str
    remark: str


def contact_sheet(
    dataset: Dataset,
    split: str,
    path: Path,
    understood: Mapping[str, str],
) -> None:
    """Write to `path` the first `IMAGES` images of each of at most `CLASSES` classes.

    Args:
        dataset: The dataset.
        split: The split whose images are shown.
        path: The PNG to write.
        understood: What the conversion noted about its source, a line each: the `layout`, and where
            the `labels` came from.

    Raises:
        UsageError: The file cannot be written.
    """
    reader = dataset.split(split)
    classes = dataset.manifest.classes
    labels = reader.index.label[:]
    chosen = _choose_labels(len(classes))

    # The header has a line for each fact about the source; the classes follow below it.
    counted = _describe_classes(len(chosen), len(classes))
    header = f"{_last_part(dataset.store.url)}, {split}: {counted}, up to {IMAGES} images of each"
    origin = understood or {"source": dataset.manifest.source}
    top = MARGIN + _line(TITLE) + _line(TEXT) * len(origin) + GAP
    height, cells = _place_cells(len(chosen), top)

    sheet = Sheet(height + MARGIN)
    room = WIDTH - 2 * MARGIN
    sheet.text(MARGIN, MARGIN, _fit(header, room, TITLE), TITLE)
    for number, (name, text) in enumerate(origin.items()):
        below = MARGIN + _line(TITLE) + number * _line(TEXT)
        sheet.text(MARGIN, below, _fit(f"{name}: {text}", room, TEXT), TEXT, FAINT)

    # A cell for each class.
    for label, cell in zip(chosen, cells, strict=True):
        samples = np.flatnonzero(labels == label)
        title = _Title(_name(classes[label]), f"label {label}, {_count(len(samples))}")
        _put_class(sheet, cell, title, reader, samples)
    try:
        sheet.image.save(path, "PNG")
    except OSError as error:
        raise unwritable(path, error, "give another --grid FILE") from error


def _choose_labels(classes: int) -> list[int]:
    """Return at most `CLASSES` labels, evenly spaced."""
    places = np.linspace(0, classes - 1, min(CLASSES, classes))
    return sorted({round(place) for place in places})


def _place_cells(classes: int, top: int) -> tuple[int, list[_Cell]]:
    """Return the cells of the classes below `top`, column by column.

    Returns:
        The height at which the cells end, and the cells.
    """
    columns = 2
    if classes <= FEW:
        columns = 1
    rows = math.ceil(classes / columns)
    width = (WIDTH - MARGIN * (columns + 1)) // columns
    side = (width - GAP * (IMAGES - 1)) // IMAGES
    height = _line(TEXT) + side + CAPTION_LINES * _line(CAPTION) + 2 * GAP
    cells = []
    for place in range(classes):
        column, row = divmod(place, rows)
        cells.append(_Cell(MARGIN + column * (width + MARGIN), top + row * height, width, side))
    return top + rows * height, cells


def _put_class(
    sheet: Sheet,
    cell: _Cell,
    title: _Title,
    reader: SplitReader,
    samples: np.ndarray,
) -> None:
    """Draw a class into its cell: the title, and the first of its `samples` with their keys."""
    # The title; a long name leaves room for the remark.
    remark_width = math.ceil(_font(CAPTION).getlength(title.remark))
    name = _fit(title.name, cell.width - remark_width - 2 * GAP, TEXT)
    right = cell.left + cell.width - remark_width
    sheet.text(cell.left, cell.top, name, TEXT)
    sheet.text(right, cell.top + TEXT - CAPTION, title.remark, CAPTION, FAINT)

    # The images in a row, with their keys below.
    top = cell.top + _line(TEXT)
    for place, sample in enumerate(samples[:IMAGES].tolist()):
        left = cell.left + place * (cell.side + GAP)
        sheet.picture(left, top, cell.side, _read_image(reader, sample))
        key = readable(reader.index.key_of(sample))
        for number, line in enumerate(_caption(key, cell.side)):
            below = top + cell.side + 2 + number * _line(CAPTION)
            sheet.text(left, below, line, CAPTION, FAINT)


def thumbnail(reader: SplitReader, sample: int, side: int) -> Image.Image:
    """Return an image cropped to a square of `side` pixels; a crossed box if it is unreadable."""
    image = _read_image(reader, sample)
    if image is not None:
        return ImageOps.fit(image, (side, side))
    box = Image.new("RGB", (side, side), "lightgrey")
    ImageDraw.Draw(box).line([(0, 0), (side, side)], "red", 3)
    return box


def _read_image(reader: SplitReader, sample: int) -> Image.Image | None:
    """Return the image as the training sees it, upright and in RGB; None if it is unreadable."""
    try:
        data = reader.image(sample)
        return to_rgb(upright(Image.open(io.BytesIO(data)), data))
    except (*DAMAGED, WdsTrainError):
        return None


def _scale(image: Image.Image, side: int) -> Image.Image:
    """Return the whole image in at most `side` by `side` pixels.

    A tiny image is enlarged by a whole number, so that its pixels are visible.
    """
    longer = max(image.size)
    if longer <= TINY:
        factor = side // longer
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    width = max(1, round(image.width * side / longer))
    height = max(1, round(image.height * side / longer))
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)


def _name(entry: ClassInfo) -> str:
    if entry.name == entry.id:
        return readable(entry.name)
    return readable(f"{entry.name} ({entry.id})")


def _describe_classes(chosen: int, classes: int) -> str:
    if chosen < classes:
        return f"{chosen} of {classes:,} classes"
    return f"{classes} class{'es' * (classes != 1)}"


def _count(samples: int) -> str:
    if not samples:
        return "no images"
    return f"{samples:,} image{'s' * (samples != 1)}"


def _last_part(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2]


def _line(size: int) -> int:
    """Return the height of a line of text."""
    return round(size * LINE)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans: it has Latin, Greek and Cyrillic letters, Pillow's font only Latin."""
    import matplotlib as mpl  # its import takes a third of a second

    path = Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def _fit(line: str, room: int, size: int) -> str:
    """Return the line, shortened in its middle until it takes at most `room` pixels.

    The end is kept because names that begin alike differ there.
    """
    font = _font(size)
    if len(line) <= LONGEST and font.getlength(line) <= room:
        return line
    for length in range(min(len(line) - 1, LONGEST), 1, -1):
        shorter = line[: length - length // 2] + "…" + line[-(length // 2) :]
        if font.getlength(shorter) <= room:
            return shorter
    return "…"


def _caption(key: str, room: int) -> list[str]:
    """Return the key in at most `CAPTION_LINES` lines of `room` pixels.

    Of a longer key only the end is shown, which distinguishes it from its neighbours.
    """
    lines = _wrap(key[-LONGEST:], room)
    dropped = max(0, len(key) - LONGEST)
    while len(lines) > CAPTION_LINES:
        dropped += 1
        lines = _wrap("…" + key[dropped:], room)
    return lines


def _wrap(text: str, room: int) -> list[str]:
    """Return the text in lines of at most `room` pixels, broken anywhere: a key has no blanks."""
    font = _font(CAPTION)
    lines = [""]
    for letter in text:
        if font.getlength(lines[-1] + letter) <= room:
            lines[-1] += letter
        else:
            lines.append(letter)
    return lines
