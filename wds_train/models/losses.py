"""The functions that a training minimises: the loss of a recipe, and the distance to a teacher."""

import torch
from timm.loss import BinaryCrossEntropy
from torch.nn import functional as F

from wds_train.config.recipe import DistillRecipe, LossRecipe


class Criterion:
    """The loss of a recipe.

    Args:
        recipe: The kind of loss, and its label smoothing.
    """

    def __init__(self, recipe: LossRecipe) -> None:
        self._smoothing = recipe.smoothing
        # timm's, because its smoothing differs from torch's idea of targets: off is smoothing /
        # classes.
        self._bce = BinaryCrossEntropy(
            recipe.smoothing, target_threshold=recipe.bce_threshold or None
        )
        self._kind = recipe.kind

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss over a batch, float32 [].

        Args:
            logits: The model's logits, float32 [n, classes].
            targets: Class numbers, int64 [n], or distributions, float32 [n, classes].
        """
        if self._kind == "bce":
            return self._bce(logits, targets)
        smoothing = self._smoothing
        if targets.ndim == 2:  # mixing has smoothed them already
            smoothing = 0.0
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def distilled(
    recipe: DistillRecipe, loss: torch.Tensor, logits: torch.Tensor, teacher_logits: torch.Tensor
) -> torch.Tensor:
    """Mix the loss with the distance to a teacher (Hinton et al. 2015, arXiv:1503.02531).

    It is (1 - weight) * loss + weight * T^2 * KL(teacher / T || student / T), with the mean of the
    KL divergence over samples.

    Args:
        recipe: The weight, and the temperature T.
        loss: The loss for the labels, float32 [].
        logits: The student's logits, float32 [n, classes].
        teacher_logits: The teacher's logits, float32 [n, classes].
    """
    t = recipe.temperature
    student = F.log_softmax(logits / t, dim=1)
    teacher = F.log_softmax(teacher_logits / t, dim=1)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    # A temperature divides the gradient by T^2. The factor brings it back to its size.
    return (1 - recipe.weight) * loss + recipe.weight * t * t * divergence
