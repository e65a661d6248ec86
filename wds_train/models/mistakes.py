"""The mistakes of a validation: which samples were taken for which class."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from wds_train.loader.batch import Batch

# Images kept: the first ones, which are the same in every epoch that gets them wrong
MISTAKES = 100


class Mistake(NamedTuple):
    """A sample that was `taken_for` another class with a `confidence` of up to 1. `image` uint8
    [height, width, 3].
    """

    sample: int
    image: NDArray[np.uint8]
    label: int
    taken_for: int
    confidence: float


class Findings:
    """The predictions of one validation, of one rank's share on several; -1 where a sample could
    not be read.
    """

    def __init__(self) -> None:
        self.mistakes: list[Mistake] = []
        self._labels: list[torch.Tensor] = []
        self._predicted: list[torch.Tensor] = []

    def add(self, logits: torch.Tensor, batch: Batch) -> None:
        """Note a model's predictions for `batch`.

        Once there are mistakes enough, the GPU is not waited for.
        """
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        unreadable = np.isin(batch.ids, [entry.sample for entry in batch.unreadable])
        predicted[torch.from_numpy(unreadable).to(predicted.device)] = -1
        self._labels.append(batch.labels)
        self._predicted.append(predicted)
        if len(self.mistakes) < MISTAKES:
            wrong = (predicted.cpu() != batch.labels.cpu()).numpy() & ~unreadable
            for i in np.flatnonzero(wrong)[: MISTAKES - len(self.mistakes)].tolist():
                image = batch.images[i].cpu().numpy().copy()  # the batch's memory is used again
                label = int(batch.labels[i])
                taken_for = int(predicted[i])
                self.mistakes.append(
                    Mistake(int(batch.ids[i]), image, label, taken_for, float(confidence[i]))
                )

    @property
    def labels(self) -> NDArray[np.int64]:
        return torch.cat(self._labels).cpu().numpy()

    @property
    def predicted(self) -> NDArray[np.int64]:
        return torch.cat(self._predicted).cpu().numpy()
