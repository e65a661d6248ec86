"""What comes between a batch's pixels and a model: one definition for training, evaluation and loops of others."""

import torch

from wds_train.config.recipe import DataRecipe


def memory_layout(device: torch.device) -> torch.memory_format:
    """The layout of weights and images: channels_last on a GPU, 1.47 x the speed on an RTX 3090 (timm's
    results/benchmark-train-amp-nhwc), but not on a CPU, where it is faster here and slower there (docs/benchmarks.md): a
    choice by measurement would differ from one start of a run to the next, and its bits with it.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


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
