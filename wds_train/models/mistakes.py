"""The mistakes of a validation: which samples were taken for which class.

The training's validation notes them here, for its confusion table and the images on its page.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from wds_train.loader.batch import Batch, mask_unreadable

# Images kept, from the first of the split on: in every epoch they are the same, if the model still
# gets them wrong.
MISTAKES = 100


class Mistake(NamedTuple):
    """A sample that was taken for another class.

    Attributes:
        sample: Its number in the split.
        image: Its pixels as the model saw them, uint8 [height, width, 3].
        label: Its class.
        taken_for: The class that the model predicted.
        confidence: The probability of that class, 0 to 1, not calibrated.
    """

    sample: int
    image: NDArray[np.uint8]
    label: int
    taken_for: int
    confidence: float


class Findings:
    """The predictions of one validation. With several ranks, each has those of its share.

    Attributes:
        mistakes: The first mistakes, at most MISTAKES.
    """

    def __init__(self) -> None:
        self.mistakes: list[Mistake] = []
        self._labels: list[torch.Tensor] = []
        self._predicted: list[torch.Tensor] = []

    def add(self, logits: torch.Tensor, batch: Batch) -> None:
        """Note a model's predictions for a batch.

        Args:
            logits: The model's logits, float32 [n, classes].
            batch: The batch, with uint8 images.
        """
        # The predictions stay on the GPU until somebody asks for them.
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        unreadable = mask_unreadable(batch)
        predicted[torch.from_numpy(unreadable).to(predicted.device)] = -1
        self._labels.append(batch.labels)
        self._predicted.append(predicted)
        # Once there are enough mistakes, nothing below waits for the GPU.
        missing = MISTAKES - len(self.mistakes)
        if missing <= 0:
            return
        wrong = (predicted.cpu() != batch.labels.cpu()).numpy() & ~unreadable
        for i in np.flatnonzero(wrong)[:missing].tolist():
            mistake = Mistake(
                sample=int(batch.ids[i]),
                image=batch.images[i].cpu().numpy().copy(),  # the batch's memory is used again
                label=int(batch.labels[i]),
                taken_for=int(predicted[i]),
                confidence=float(confidence[i]),
            )
            self.mistakes.append(mistake)

    @property
    def labels(self) -> NDArray[np.int64]:
        """The classes of all samples so far, int64 [n]."""
        return torch.cat(self._labels).cpu().numpy()

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The predicted classes, int64 [n]; -1 for a sample that could not be read."""
        return torch.cat(self._predicted).cpu().numpy()
