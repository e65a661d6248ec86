"""Scoring a classifier: what the training's validation and `wds-train eval` share, so that their numbers are the same.

uint8 images -> `Predictor`: normalise, one or more views, the model, the mean of the views' logits
            -> `sums`, which add up over batches and ranks -> `metrics`
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from wds_train.config.recipe import DataRecipe
from wds_train.data.batch import Batch
from wds_train.errors import RunError
from wds_train.models.model import memory_layout

EVAL_BATCH = 256  # samples at most: enough to fill a GPU, and little memory beside a training step's


Precision = Literal["auto", "bf16", "fp16", "fp32"]


def amp_dtype(device: torch.device, precision: Precision = "auto") -> torch.dtype | None:
    """What autocast computes in, None for float32. `auto`: on a GPU bf16, which has float32's range and needs no scaler;
    those before Ampere have only fp16.
    """
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


class Predictor:
    """From a batch of images to logits on `device`, as `data` says. With `flip`, and where the images are larger than
    `side`, to the mean of the logits of several views; `side` 0 takes the images whole.
    """

    def __init__(
        self,
        data: DataRecipe,
        device: torch.device,
        *,
        side: int = 0,
        flip: bool = False,
        precision: Precision = "auto",
    ) -> None:
        mean, std = torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)
        self._scale, self._shift = 1 / (255 * std), -mean / std  # (pixel / 255 - mean) / std
        self._device, self._amp = device, amp_dtype(device, precision)
        self._side, self._flip = side, flip

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, h, w, 3] to float32 [n, 3, h, w] in the model's layout, which on a GPU they have already."""
        pixels = images.to(self._device, non_blocking=True).float()
        pixels = pixels.mul_(self._scale).add_(self._shift).permute(0, 3, 1, 2)
        return pixels.contiguous(memory_format=memory_layout(self._device))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=self._amp, enabled=self._amp is not None)

    @torch.inference_mode()
    def logits(self, model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """float32 [n, classes] of `normalised` images. `model` is in evaluation mode."""
        assert not model.training
        with self.autocast():
            views = [model(view).float() for view in self._views(pixels)]
        return torch.stack(views).mean(dim=0)

    def _views(self, pixels: torch.Tensor) -> Iterator[torch.Tensor]:
        """The images, or the four corners and the centre of larger ones; each followed by its mirror image."""
        larger = pixels.shape[-1] - self._side if self._side else 0
        corners = [(0, 0), (0, larger), (larger, 0), (larger, larger), (larger // 2, larger // 2)]
        for top, left in corners if larger else [(0, 0)]:
            view = pixels[:, :, top : top + self._side, left : left + self._side] if larger else pixels
            yield view
            if self._flip:
                yield view.flip(3)


def sums(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Of a batch, to be added up over batches and ranks: cross-entropy, top-1 hits, top-5 hits and samples, float64 [4].

    A lost sample counts, as wrong, since its grey pixels say nothing of the model.
    """
    labels = batch.labels.to(logits.device, non_blocking=True)
    readable = torch.from_numpy(~np.isin(batch.ids, [entry.sample for entry in batch.lost])).to(logits.device)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (ranked == labels[:, None]) & readable[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none").double().sum()
    count = torch.full_like(loss, len(labels))
    return torch.stack([loss, hits[:, 0].sum().double(), hits.any(dim=1).sum().double(), count])


def metrics(total: torch.Tensor, samples: int) -> dict[str, float]:
    """`loss`, the mean cross-entropy, `top1` and `top5` in percent, of the `sums` of a whole pass over `samples`."""
    loss, top1, top5, seen = total.tolist()
    if seen != samples:
        raise RunError(f"validation saw {seen:.0f} samples of {samples}; each must count exactly once")
    return {"loss": loss / seen, "top1": percent(top1, seen), "top5": percent(top5, seen)}


def percent(hits: float, samples: float) -> float:
    """All accuracies, so that equal counts give equal numbers: `hits / samples * 100` is another one in the last bit."""
    return 100 * hits / samples
