"""The answer of a model for an image, for people and for programs."""

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wds_train.console import readable
from wds_train.dataset.manifest import ClassInfo
from wds_train.errors import WdsTrainError
from wds_train.models.calibration import SURE, probabilities
from wds_train.models.weights import Weights

TOP = 5  # classes in an answer


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image.

    Attributes:
        image: The image's name.
        top: At most TOP classes with their probabilities, the likeliest first.
        error: Why there are none; empty if there are some.
    """

    image: str
    top: tuple[tuple[ClassInfo, float], ...] = ()
    error: str = ""

    @classmethod
    def of(
        cls, image: str, answer: NDArray[np.float32] | WdsTrainError, weights: Weights
    ) -> "Prediction":
        """Make a prediction of logits.

        Args:
            image: The image's name.
            answer: float32 [classes], or the reason why there are none.
            weights: The model that gave them.
        """
        if isinstance(answer, WdsTrainError):
            return cls(image, error=str(answer))
        found = probabilities(answer[None], weights.calibration.temperature)[0]
        # Stable: of equal probabilities, the class with the smaller label comes first.
        ranked = np.argsort(-found, kind="stable")[:TOP].tolist()
        return cls(image, tuple((weights.classes[label], float(found[label])) for label in ranked))

    @property
    def sure(self) -> bool:
        """True if the first class is likelier right than wrong."""
        return bool(self.top) and self.top[0][1] >= SURE

    def to_json(self) -> str:
        """Return the line of `predict --json`."""
        # JSON escapes what a terminal could not show; the name is the image's own.
        if self.error:
            return json.dumps({"image": self.image, "error": self.error})
        top = []
        for entry, share in self.top:
            top.append({"id": entry.id, "name": entry.name, "probability": round(share, 6)})
        return json.dumps({"image": self.image, "sure": self.sure, "top": top})

    def to_csv(self) -> str:
        """Return the row of `predict --csv`, for the columns of `csv_header`."""
        sure = ""
        if not self.error:
            sure = str(self.sure).lower()
        cells = [readable(self.image), self.error, sure]
        for entry, share in self.top:
            cells += [entry.id, entry.name, f"{share:.6f}"]
        return csv_line(cells)

    def to_lines(self, names: dict[str, str]) -> str:
        """Return the answer for people, on a line for the image and one for each class.

        Args:
            names: The names of classes by their ids, as `class_names` gives them.
        """
        image = readable(self.image)
        if self.error:
            return f"{image}: {self.error}"
        if not self.sure:
            image += ": not sure"
        lines = [image]
        for entry, share in self.top:
            lines.append(f"{100 * share:7.2f} %  {names[entry.id]}")
        return "\n".join(lines)


def csv_header(classes: int) -> str:
    """Return the first line of `predict --csv`.

    Args:
        classes: The number of classes of the model.
    """
    cells = ["image", "error", "sure"]
    for rank in range(1, min(TOP, classes) + 1):
        cells += [f"id{rank}", f"name{rank}", f"probability{rank}"]
    return csv_line(cells)


def csv_line(cells: list[str]) -> str:
    """Return cells as a line of CSV, without the end of the line."""
    out = io.StringIO()
    # With the writer's own end of a line, \r\n: it quotes cells that have a part of it. With
    # another end, a cell with \r would be read as two lines.
    csv.writer(out).writerow(cells)
    return out.getvalue().removesuffix("\r\n")


def class_names(classes: tuple[ClassInfo, ...]) -> dict[str, str]:
    """Return the name of each class for people, by the class's id.

    If two classes have the same name, the id is added: ImageNet has two that are named crane.
    """
    count = Counter(entry.name for entry in classes)
    names = {}
    for entry in classes:
        names[entry.id] = entry.name
        if count[entry.name] > 1:
            names[entry.id] = f"{entry.name} ({entry.id})"
    return names
