"""What a model answers for an image, for people and for programs."""

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

TOP = 5


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, or, in `error`, why there are none."""

    image: str
    top: tuple[tuple[ClassInfo, float], ...] = ()
    error: str = ""

    @classmethod
    def of(
        cls, image: str, answer: NDArray[np.float32] | WdsTrainError, weights: Weights
    ) -> "Prediction":
        if isinstance(answer, WdsTrainError):
            return cls(image, error=str(answer))
        found = probabilities(answer[None], weights.calibration.temperature)[0]
        ranked = np.argsort(-found, kind="stable")[:TOP].tolist()
        return cls(image, tuple((weights.classes[label], float(found[label])) for label in ranked))

    @property
    def sure(self) -> bool:
        return bool(self.top) and self.top[0][1] >= SURE

    def to_json(self) -> str:
        if self.error:
            return json.dumps({"image": self.image, "error": self.error})
        top = [
            {"id": entry.id, "name": entry.name, "probability": round(share, 6)}
            for entry, share in self.top
        ]
        return json.dumps({"image": self.image, "sure": self.sure, "top": top})

    def to_csv(self) -> str:
        cells = [
            cell for entry, share in self.top for cell in (entry.id, entry.name, f"{share:.6f}")
        ]
        sure = "" if self.error else str(self.sure).lower()
        return csv_line([readable(self.image), self.error, sure, *cells])

    def to_lines(self, names: dict[str, str]) -> str:
        """For people, with the `names` of classes by their ids."""
        image = readable(self.image)
        if self.error:
            return f"{image}: {self.error}"
        lines = [f"{100 * share:7.2f} %  {names[entry.id]}" for entry, share in self.top]
        return "\n".join([f"{image}{'' if self.sure else ': not sure'}", *lines])


def csv_header(classes: int) -> str:
    ranks = range(1, min(TOP, classes) + 1)
    return csv_line(
        [
            "image",
            "error",
            "sure",
            *(f"{what}{n}" for n in ranks for what in ("id", "name", "probability")),
        ]
    )


def csv_line(cells: list[str]) -> str:
    out = io.StringIO()
    csv.writer(out).writerow(
        cells
    )  # a line's end in a cell is quoted if it is one of the writer's own
    return out.getvalue().removesuffix("\r\n")


def class_names(classes: tuple[ClassInfo, ...]) -> dict[str, str]:
    """What people call each class, by its id: its name, with the id where another class has the same: ImageNet has two
    cranes.
    """
    count = Counter(entry.name for entry in classes)
    return {
        entry.id: entry.name if count[entry.name] == 1 else f"{entry.name} ({entry.id})"
        for entry in classes
    }
