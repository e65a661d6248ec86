"""What comes before a model, in training as in evaluation: normalised pixels, and the precision that it computes in."""

import torch

from wds_train.config.precision import Precision
from wds_train.config.recipe import DataRecipe
from wds_train.models.model import memory_layout


def amp_dtype(device: torch.device, precision: Precision = "auto") -> torch.dtype | None:
    """What autocast computes in, None for float32. `auto`: on a GPU bf16, which has float32's range and needs no scaler;
    those before Ampere have only fp16.
    """
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def autocast(device: torch.device, amp: torch.dtype | None) -> torch.autocast:
    """A context in which models on `device` compute in `amp`, one of `amp_dtype`."""
    return torch.autocast(device.type, dtype=amp, enabled=amp is not None)


class Normaliser:
    """Takes the pixels of a batch to what a model on `device` is given, by the mean and deviation of `data`."""

    def __init__(self, data: DataRecipe, device: torch.device) -> None:
        mean, std = torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)
        self._scale, self._shift = 1 / (255 * std), -mean / std  # (pixel / 255 - mean) / std
        self._device = device

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise uint8 [n, h, w, 3] to float32 [n, 3, h, w] in the model's layout, which on a GPU they have already."""
        pixels = images.to(self._device, non_blocking=True).float()
        pixels = pixels.mul_(self._scale).add_(self._shift).permute(0, 3, 1, 2)
        return pixels.contiguous(memory_format=memory_layout(self._device))
