"""Scoring a classifier: what the training's validation and `wds-train eval` share, so that their
numbers are the same.

uint8 images -> `Normaliser`
            -> `Predictor`: one or more views, the model, the mean of the views' logits
            -> `sums`, which add up over batches and ranks -> `metrics`
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from wds_train.config.precision import Precision
from wds_train.errors import RunError
from wds_train.loader.batch import Batch
from wds_train.models.precision import amp_dtype, autocast

# Samples at most: enough to fill a GPU, and little memory next to a training step's.
EVAL_BATCH = 256


class Predictor:
    """Takes normalised images to logits on `device`.

    With `flip`, and where the images are larger than `side`, these are the mean of the logits of
    several views; `side` 0 takes the images whole.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        side: int = 0,
        flip: bool = False,
        precision: Precision = "auto",
    ) -> None:
        self._device = device
        self._amp = amp_dtype(device, precision)
        self._side = side
        self._flip = flip

    @torch.inference_mode()
    def logits(self, model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """Return the logits of normalised images `pixels`, float32 [n, classes].

        `model` is in evaluation mode.
        """
        assert not model.training
        with autocast(self._device, self._amp):
            views = [model(view).float() for view in self._views(pixels)]
        return torch.stack(views).mean(dim=0)

    def _views(self, pixels: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the images, or the four corners and the centre of larger ones; each followed by its
        mirror image.
        """
        larger = pixels.shape[-1] - self._side if self._side else 0
        corners = [(0, 0), (0, larger), (larger, 0), (larger, larger), (larger // 2, larger // 2)]
        for top, left in corners if larger else [(0, 0)]:
            view = (
                pixels[:, :, top : top + self._side, left : left + self._side] if larger else pixels
            )
            yield view
            if self._flip:
                yield view.flip(3)


def sums(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return a batch's part of the sums over batches and ranks, float64 [4].

    They are cross-entropy, top-1 hits, top-5 hits and samples.

    An unreadable sample counts, as wrong, since its grey pixels say nothing of the model.
    """
    labels = batch.labels.to(logits.device, non_blocking=True)
    readable = torch.from_numpy(
        ~np.isin(batch.ids, [entry.sample for entry in batch.unreadable])
    ).to(logits.device)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (ranked == labels[:, None]) & readable[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none").double().sum()
    count = torch.full_like(loss, len(labels))
    return torch.stack([loss, hits[:, 0].sum().double(), hits.any(dim=1).sum().double(), count])


def metrics(total: torch.Tensor, samples: int) -> dict[str, float]:
    """Return `loss`, the mean cross-entropy, `top1` and `top5` in percent, of the `sums` of a whole
    pass over `samples`.
    """
    loss, top1, top5, seen = total.tolist()
    if seen != samples:
        raise RunError(
            f"validation saw {seen:.0f} samples of {samples}; each must count exactly once"
        )
    return {"loss": loss / seen, "top1": percent(top1, seen), "top5": percent(top5, seen)}


def percent(hits: float, samples: float) -> float:
    """Return an accuracy.

    All go through here, so that equal counts give equal numbers: `hits / samples * 100` is another
    one in the last bit.
    """
    return 100 * hits / samples
