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

CLASSES, IMAGES = 20, 4  # on the sheet at most, and of each class

# In pixels. The sheet is as wide as a page on a small screen.
WIDTH, MARGIN, GAP = 1280, 24, 8
TITLE, TEXT, CAPTION = 22, 15, 12  # the fonts' sizes
LINE = 1.45  # of a font's size
CAPTION_LINES = 2  # for a key
LONGEST = 160  # letters of a line, which are measured one by one
TINY = 32  # the longer side of an image whose pixels are shown as squares
FEW = 3  # classes that stand below one another, with larger images; more stand in two columns

INK, FAINT, PAPER, MOUNT = "#1a1a1a", "#5f6368", "#ffffff", "#eceff1"


# What Pillow raises for images whose bytes are damaged.
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
    """A page on which rows of text and images are put, from the top."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH, height), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(self, left: int, top: int, line: str, size: int, ink: str = INK) -> None:
        self._draw.text((left, top), line, ink, _font(size))

    def picture(self, left: int, top: int, side: int, image: Image.Image | None) -> None:
        """The whole image in the middle of a square; a crossed square for one that cannot be read."""
        self._draw.rectangle([left, top, left + side - 1, top + side - 1], MOUNT)
        if image is None:
            self._draw.line([(left, top), (left + side - 1, top + side - 1)], "red", 3)
            return
        shown = _scaled(image, side)
        beside, above = (side - shown.width) // 2, (side - shown.height) // 2
        self.image.paste(shown, (left + beside, top + above))


class _Cell(NamedTuple):
    """The place of a class on the sheet: its upper left corner, its width, its images' side."""

    left: int
    top: int
    width: int
    side: int


class _Title(NamedTuple):
    """What stands above the images of a class, to the left and to the right."""

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
        dataset: whose images are shown.
        split: of which.
        path: a PNG.
        understood: what the conversion made of its source, a line each: the `layout`, and where the
            `labels` came from.
    """
    reader = dataset.split(split)
    classes = dataset.manifest.classes
    labels = reader.index.label[:]
    chosen = _chosen(len(classes))

    # The header's lines are counted before the page is made: what follows begins below them.
    shown = _shown(len(chosen), len(classes))
    header = f"{_last_part(dataset.store.url)}, {split}: {shown}, up to {IMAGES} images of each"
    origin = understood or {"source": dataset.manifest.source}
    top = MARGIN + _line(TITLE) + _line(TEXT) * len(origin) + GAP
    height, cells = _cells(len(chosen), top)

    sheet = Sheet(height + MARGIN)
    room = WIDTH - 2 * MARGIN
    sheet.text(MARGIN, MARGIN, _fitting(header, room, TITLE), TITLE)
    for number, (name, text) in enumerate(origin.items()):
        below = MARGIN + _line(TITLE) + number * _line(TEXT)
        sheet.text(MARGIN, below, _fitting(f"{name}: {text}", room, TEXT), TEXT, FAINT)
    for label, cell in zip(chosen, cells, strict=True):
        samples = np.flatnonzero(labels == label)
        title = _Title(_name(classes[label]), f"label {label}, {_count(len(samples))}")
        _put_class(sheet, cell, title, reader, samples)
    try:
        sheet.image.save(path, "PNG")
    except OSError as error:
        raise unwritable(path, error, "give another --grid FILE") from error


def _chosen(classes: int) -> list[int]:
    """At most `CLASSES` labels, evenly taken from all of them."""
    places = np.linspace(0, classes - 1, min(CLASSES, classes))
    return sorted({round(place) for place in places})


def _cells(classes: int, top: int) -> tuple[int, list[_Cell]]:
    """Where the cells end that begin at `top`, and the cells, down one column after the other."""
    columns = 1 if classes <= FEW else 2
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
    """Put a class into the `cell`: its title, and the first of its `samples` with their keys."""
    remark_width = math.ceil(_font(CAPTION).getlength(title.remark))
    name = _fitting(title.name, cell.width - remark_width - 2 * GAP, TEXT)
    right = cell.left + cell.width - remark_width
    sheet.text(cell.left, cell.top, name, TEXT)
    sheet.text(right, cell.top + TEXT - CAPTION, title.remark, CAPTION, FAINT)

    top = cell.top + _line(TEXT)
    for place, sample in enumerate(samples[:IMAGES].tolist()):
        left = cell.left + place * (cell.side + GAP)
        sheet.picture(left, top, cell.side, _image(reader, sample))
        key = readable(reader.index.key_of(sample))
        for number, line in enumerate(_caption(key, cell.side)):
            below = top + cell.side + 2 + number * _line(CAPTION)
            sheet.text(left, below, line, CAPTION, FAINT)


def thumbnail(reader: SplitReader, sample: int, side: int) -> Image.Image:
    """The image, cut to a square of `side` pixels, or a crossed box for one that cannot be read."""
    image = _image(reader, sample)
    if image is not None:
        return ImageOps.fit(image, (side, side))
    box = Image.new("RGB", (side, side), "lightgrey")
    ImageDraw.Draw(box).line([(0, 0), (side, side)], "red", 3)
    return box


def _image(reader: SplitReader, sample: int) -> Image.Image | None:
    """The image as the training has it, upright and in RGB; None for one that cannot be read."""
    try:
        data = reader.image(sample)
        return to_rgb(upright(Image.open(io.BytesIO(data)), data))
    except (*DAMAGED, WdsTrainError):
        return None


def _scaled(image: Image.Image, side: int) -> Image.Image:
    """The whole image in at most `side` by `side` pixels. A tiny one grows by a whole factor, so that
    its pixels are seen as they are.
    """
    longer = max(image.size)
    if longer <= TINY:
        factor = side // longer
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    width = max(1, round(image.width * side / longer))
    height = max(1, round(image.height * side / longer))
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)


def _name(entry: ClassInfo) -> str:
    return readable(entry.name if entry.name == entry.id else f"{entry.name} ({entry.id})")


def _shown(chosen: int, classes: int) -> str:
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
    """The height of a line of text."""
    return round(size * LINE)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which has Latin, Greek and Cyrillic letters; Pillow's own has Latin ones alone."""
    import matplotlib as mpl  # which takes a third of a second

    path = Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def _fitting(line: str, room: int, size: int) -> str:
    """The line, or its start and its end with a mark between them, in `room` pixels: names that begin
    alike differ at the end.
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
    """The key in `CAPTION_LINES` lines of `room` pixels; of a longer one the end, which tells it from
    its neighbours.
    """
    lines = _wrapped(key[-LONGEST:], room)
    dropped = max(0, len(key) - LONGEST)
    while len(lines) > CAPTION_LINES:
        dropped += 1
        lines = _wrapped("…" + key[dropped:], room)
    return lines


def _wrapped(text: str, room: int) -> list[str]:
    """The text in lines of at most `room` pixels, broken anywhere: a key has no blanks."""
    font, lines = _font(CAPTION), [""]
    for letter in text:
        if font.getlength(lines[-1] + letter) <= room:
            lines[-1] += letter
        else:
            lines.append(letter)
    return lines
