"""The functions that a training minimises: the loss of a recipe, and the distance to a teacher."""

import torch
from timm.loss import BinaryCrossEntropy
from torch.nn import functional as F

from wds_train.config.recipe import DistillRecipe, LossRecipe


class Criterion:
    """The mean loss of logits, float32 [n, classes], for targets.

    Targets are class numbers, int64 [n], or distributions, float32 [n, classes], which are taken as
    they are: mixing has smoothed them already.
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
        if self._kind == "bce":
            return self._bce(logits, targets)
        return F.cross_entropy(
            logits, targets, label_smoothing=0.0 if targets.ndim == 2 else self._smoothing
        )


def distilled(
    recipe: DistillRecipe, loss: torch.Tensor, logits: torch.Tensor, teacher_logits: torch.Tensor
) -> torch.Tensor:
    """Return the loss with the teacher's share: (1 - weight) * loss + weight * T^2 * KL(teacher / T
    || student / T), Hinton et al. 2015 (arXiv:1503.02531): T^2 keeps the gradient's size where T
    changes it. Logits float32 [n, classes]; the KL is the mean over samples.
    """
    t = recipe.temperature
    student = F.log_softmax(logits / t, dim=1)
    teacher = F.log_softmax(teacher_logits / t, dim=1)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return (1 - recipe.weight) * loss + recipe.weight * t * t * divergence
