"""Normalisation of pixels for a model, the same for training, evaluation and loops of users."""

import torch

from wds_train.config.recipe import DataRecipe


def memory_layout(device: torch.device) -> torch.memory_format:
    """Return the layout of weights and images on `device`.

    On a GPU it is channels_last, 1.47 x the speed on an RTX 3090 (timm's
    results/benchmark-train-amp-nhwc). On a CPU that is faster on some machines and slower on others
    (docs/benchmarks.md). To choose by measurement would change from one start of a run to the next,
    and the run's bits with it.
    """
    if device.type == "cuda":
        return torch.channels_last
    return torch.contiguous_format


class Normaliser:
    """Normalises the pixels of batches for a model.

    Args:
        data: Has the mean and deviation, of pixels in [0, 1].
        device: The device of the model.
    """

    def __init__(self, data: DataRecipe, device: torch.device) -> None:
        mean = torch.tensor(data.mean, device=device)
        std = torch.tensor(data.std, device=device)
        # (pixel / 255 - mean) / std, as one product and one sum
        self._scale = 1 / (255 * std)
        self._shift = -mean / std
        self._device = device

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return normalised images, float32 [n, 3, height, width], in the model's layout.

        Args:
            images: Pixels, uint8 [n, height, width, 3], on any device.
        """
        # In place from here on: the floats take four times the memory of the pixels.
        pixels = images.to(self._device, non_blocking=True).float()
        pixels = pixels.mul_(self._scale).add_(self._shift).permute(0, 3, 1, 2)
        # On a GPU, they have the model's layout already.
        return pixels.contiguous(memory_format=memory_layout(self._device))
