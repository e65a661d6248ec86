"""Pictures and tables for Weights & Biases."""

from typing import Any

import numpy as np
from PIL import Image

from wds_train.dataset.manifest import ClassInfo
from wds_train.evaluation.per_class import by_class, most_confused, title_of
from wds_train.models.mistakes import Findings

COLUMNS, ROWS = 8, 8  # of a batch
SIDE = 128  # of a mistaken image at most, in pixels: a hundred of them come with every epoch
WORST = 100  # classes shown


def tiles(images: Any) -> Image.Image:
    """Images, a uint8 tensor [n, height, width, 3], as one; of a large batch the first."""
    shown = images[: COLUMNS * ROWS].cpu().numpy()
    height, width = shown.shape[1:3]
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(shown) // COLUMNS) * height))
    for number, image in enumerate(shown):
        sheet.paste(Image.fromarray(image), (number % COLUMNS * width, number // COLUMNS * height))
    return sheet


def first_batch(sheet: Image.Image) -> dict[str, Any]:
    import wandb

    return {"train/first_batch": wandb.Image(sheet, file_type="jpg")}


def tables(findings: Findings, classes: tuple[ClassInfo, ...]) -> dict[str, Any]:
    """The mistakes, the most confused pairs and the worst classes, bounded."""
    import wandb

    mistakes = wandb.Table(["sample", "image", "class", "taken for", "confidence, not calibrated"])
    for each in findings.mistakes:
        picture = wandb.Image(_small(each.image), file_type="jpg")
        names = title_of(classes[each.label]), title_of(classes[each.taken_for])
        mistakes.add_data(each.sample, picture, *names, each.confidence)
    labels, predicted = findings.labels, findings.predicted
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
