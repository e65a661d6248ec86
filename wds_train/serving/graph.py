"""A trained model as one graph: from the pixels of square images to logits and heat maps.

`exporters.py` writes it to files, together with the facts that a program needs to use it.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from wds_train.images.normalise import Normaliser
from wds_train.models.calibration import SURE
from wds_train.models.model import create_model
from wds_train.models.weights import Weights
from wds_train.serving.prediction import class_names

CPU = torch.device("cpu")
INPUT = "pixels"
OUTPUTS = ("logits", "features", "head")
# How far logits by way of the mean may be from the model's own, for the two to be one function.
RELATIVE = 1e-3
ABSOLUTE = 1e-4


class Graph(nn.Module):
    """A model with its normalisation inside, on the CPU.

    It takes uint8 RGB images [n, side, side, 3] to OUTPUTS:

    - logits: [n, classes].
    - features: The last feature map, [n, channels, h, w], or whatever shape the model has.
    - head: With `mapped`, the weights of the last layer, [classes, channels]. The sum of the
      features, weighted by a class's row, is the activation map of the class (Zhou et al. 2016,
      arXiv:1512.04150). Grad-CAM gives the same map for such models.

    Args:
        weights: The trained model.

    Attributes:
        side: The side of the images, pixels.
        mapped: The logits are a linear function of the features' mean, so that there is a head.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        recipe = weights.recipe
        self.model = create_model(recipe.model, len(weights.classes), recipe.seed, CPU).eval()
        self.model.load_state_dict(weights.tensors)
        self.normalise = Normaliser(recipe.data, CPU)
        self.side = recipe.data.eval_size
        self.mapped = self._is_mean_then_linear()

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model: Any = self.model
        features = model.forward_features(self.normalise(pixels))
        logits = model.forward_head(features)
        if not self.mapped:
            return logits, features
        # Multiplied: an output of the graph, rather than the parameter itself.
        head = model.get_classifier().weight * 1.0
        return logits, features, head

    def example(self, images: int) -> torch.Tensor:
        """Return pixels to try the graph on, the same every time.

        Returns:
            uint8 [images, side, side, 3].
        """
        generator = torch.Generator().manual_seed(0)
        shape = (images, self.side, self.side, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    @torch.inference_mode()
    def _is_mean_then_linear(self) -> bool:
        """Return True if the logits are a linear function of the features' mean over all places.

        It is found by trial: the names of layers differ from model to model.
        """
        model: Any = self.model
        features = model.forward_features(self.normalise(self.example(1)))
        head = model.get_classifier()
        # A vision transformer has tokens instead of places, [n, tokens, channels].
        if features.ndim != 4 or not isinstance(head, nn.Linear):
            return False
        if features.shape[1] != head.in_features:
            return False
        logits = model.forward_head(features)
        means = features.mean(dim=(2, 3))
        return torch.allclose(head(means), logits, rtol=RELATIVE, atol=ABSOLUTE)


def describe_model(weights: Weights) -> dict[str, Any]:
    """Return the facts of a model that a program needs to use it, for JSON.

    - `view` is that of the validation: the central square of the shorter side, the image resized
      with an anti-aliased bilinear filter.
    - The logits are divided by the `temperature` of `calibration`.
    - An answer is sure from the probability `sure` on.
    """
    data = weights.recipe.data
    return {
        "model": weights.recipe.model.name,
        "run": weights.run.rstrip("/").rpartition("/")[2],
        "weights": weights.kind,
        "step": weights.step,
        "epoch": weights.epoch,
        "metrics": weights.metrics,
        "view": {"side": data.eval_size, "crop": data.eval_crop, "flip": data.eval_flip},
        "normalised": {"mean": list(data.mean), "std": list(data.std)},
        "calibration": asdict(weights.calibration),
        "sure": SURE,
        "classes": [asdict(entry) for entry in weights.classes],
        "names": list(class_names(weights.classes).values()),
    }
