"""A trained model as one graph: from the pixels of square images to logits, the last feature map, and what heat maps take."""

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
INPUT, OUTPUTS = "pixels", ("logits", "features", "head")


class Graph(nn.Module):
    """Takes uint8 RGB [n, side, side, 3] to OUTPUTS: logits [n, classes]; features, the last map [n, channels, h, w] (or
    whatever shape the model has); and, where `mapped`, the head's weights [classes, channels]: the sum of the features, weighted
    by a class's row, is that class's activation map (Zhou et al. 2016, arXiv:1512.04150), which Grad-CAM comes to in such models.
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
        return (
            (logits, features, model.get_classifier().weight * 1.0)
            if self.mapped
            else (logits, features)
        )

    def example(self, images: int) -> torch.Tensor:
        """Pixels to try the graph on, the same every time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(
            0, 256, (images, self.side, self.side, 3), dtype=torch.uint8, generator=generator
        )

    @torch.inference_mode()
    def _is_mean_then_linear(self) -> bool:
        """Whether the logits are a linear function of the mean of the features over all places: found out by trying."""
        model: Any = self.model
        features = model.forward_features(self.normalise(self.example(1)))
        head = model.get_classifier()
        if (
            features.ndim != 4
            or not isinstance(head, nn.Linear)
            or features.shape[1] != head.in_features
        ):
            return False
        return torch.allclose(
            head(features.mean(dim=(2, 3))), model.forward_head(features), rtol=1e-3, atol=1e-4
        )


def facts(weights: Weights) -> dict[str, Any]:
    """What a program has to know of the model, as JSON holds it: `view` is the validation's, of the shorter side's central
    square, the image resized with an anti-aliased bilinear filter; the calibration's
    `temperature` divides the logits, and an answer is sure from the probability `sure` on.
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
