"""Pictures and tables for Weights & Biases."""

from typing import Any

import numpy as np
from PIL import Image

from wds_train.dataset.manifest import ClassInfo
from wds_train.evaluation.per_class import by_class, most_confused, title_of
from wds_train.models.mistakes import Findings

COLUMNS = 8  # of the images of a batch
ROWS = 8
SIDE = 128  # of a mistaken image at most, in pixels: a hundred of them come with every epoch
WORST = 100  # classes shown


def tiles(images: Any) -> Image.Image:
    """Return one picture of many.

    Args:
        images: A uint8 tensor [n, height, width, 3], of which the first COLUMNS * ROWS are shown.
    """
    shown = images[: COLUMNS * ROWS].cpu().numpy()
    height, width = shown.shape[1:3]
    rows = -(-len(shown) // COLUMNS)  # rounded up
    sheet = Image.new("RGB", (COLUMNS * width, rows * height))
    for number, image in enumerate(shown):
        row, column = divmod(number, COLUMNS)
        sheet.paste(Image.fromarray(image), (column * width, row * height))
    return sheet


def first_batch(sheet: Image.Image) -> dict[str, Any]:
    """Return the first batch, to be logged."""
    import wandb

    return {"train/first_batch": wandb.Image(sheet, file_type="jpg")}


def tables(findings: Findings, classes: tuple[ClassInfo, ...]) -> dict[str, Any]:
    """Return tables of mistakes, confused pairs and the worst classes, to be logged."""
    import wandb

    mistakes = wandb.Table(["sample", "image", "class", "taken for", "confidence, not calibrated"])
    for each in findings.mistakes:
        picture = wandb.Image(_small(each.image), file_type="jpg")
        label = title_of(classes[each.label])
        taken_for = title_of(classes[each.taken_for])
        mistakes.add_data(each.sample, picture, label, taken_for, each.confidence)

    labels = findings.labels
    predicted = findings.predicted
    confused = wandb.Table(["class", "taken for", "samples"])
    for pair in most_confused(labels, predicted, classes):
        confused.add_data(*pair.values())
    accuracy = wandb.Table(["class", "top-1", "samples"])
    rows = [row for row in by_class(labels, predicted, classes) if row["samples"]]
    for row in sorted(rows, key=lambda row: row["top1"])[:WORST]:
        accuracy.add_data(title_of(classes[row["label"]]), row["top1"], row["samples"])
    return {"val/mistakes": mistakes, "val/confused": confused, "val/classes": accuracy}


def _small(image: np.ndarray) -> Image.Image:
    small = Image.fromarray(image)
    small.thumbnail((SIDE, SIDE))
    return small
