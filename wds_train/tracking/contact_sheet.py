"""A PNG with a row of thumbnails per class."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from wds_train.data.dataset import Dataset, SplitReader
from wds_train.errors import WdsTrainError, unwritable

ROWS, COLUMNS, SIDE, TEXT = 20, 10, 96, 14


def contact_sheet(dataset: Dataset, split: str, path: Path) -> None:
    """Write to `path` the first COLUMNS images of at most ROWS classes of `split`, evenly taken from all of them."""
    reader = dataset.split(split)
    count = len(dataset.manifest.classes)
    chosen = sorted({round(place) for place in np.linspace(0, count - 1, min(ROWS, count))})
    sheet = Image.new("RGB", (COLUMNS * SIDE, len(chosen) * (SIDE + TEXT)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(chosen):
        top = row * (SIDE + TEXT)
        entry = dataset.manifest.classes[label]
        title = entry.name if entry.name == entry.id else f"{entry.name}  ({entry.id})"
        draw.text((4, top + 1), f"{label}  {title}", "black")
        for column, sample in enumerate(np.flatnonzero(reader.index.label[:] == label)[:COLUMNS]):
            sheet.paste(thumbnail(reader, int(sample), SIDE - 2), (column * SIDE, top + TEXT))
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise unwritable(path, error, "give another --grid FILE") from error


def thumbnail(reader: SplitReader, sample: int, side: int) -> Image.Image:
    """The image, cut to a square of `side` pixels, or a crossed box for one that cannot be read."""
    try:
        image = Image.open(io.BytesIO(reader.image(sample)))
        return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (side, side))
    except (OSError, ValueError, SyntaxError, WdsTrainError):
        box = Image.new("RGB", (side, side), "lightgrey")
        ImageDraw.Draw(box).line([(0, 0), (side, side)], "red", 3)
        return box
