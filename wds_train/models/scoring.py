"""Scoring a classifier.

The training's validation and `wds-train eval` share this, so that their numbers are the same:

uint8 images -> `Normaliser`
            -> `Predictor`: one or more views, the model, the mean of the views' logits
            -> `sums`, which add up over batches and ranks -> `metrics`
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from wds_train.config.precision import Precision
from wds_train.errors import RunError
from wds_train.loader.batch import Batch, mask_unreadable
from wds_train.models.precision import amp_dtype, autocast

# Samples at most: enough to fill a GPU, and little memory next to a training step's.
EVAL_BATCH = 256


class Predictor:
    """Computes the logits of normalised images, as the mean over several views of them.

    Args:
        device: The device that computes.
        side: The side of the views, pixels: of larger images the four corners and the centre are
            taken. 0: images are taken whole.
        flip: Add the mirror image of each view.
        precision: The precision of the model's arithmetic.
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
        """Return the logits, float32 [n, classes].

        Args:
            model: A model in evaluation mode.
            pixels: Normalised images, float32 [n, 3, height, width], on the device.
        """
        assert not model.training
        with autocast(self._device, self._amp):
            views = [model(view).float() for view in self._views(pixels)]
        return torch.stack(views).mean(dim=0)

    def _views(self, pixels: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the images, or the four corners and the centre of larger ones.

        Each is followed by its mirror image, if that is wanted.
        """
        # Slices, which copy nothing.
        views = [pixels]
        side = self._side
        surplus = pixels.shape[-1] - side
        if side and surplus:
            middle = surplus // 2
            views = [
                pixels[:, :, :side, :side],
                pixels[:, :, :side, surplus:],
                pixels[:, :, surplus:, :side],
                pixels[:, :, surplus:, surplus:],
                pixels[:, :, middle : middle + side, middle : middle + side],
            ]
        for view in views:
            yield view
            if self._flip:
                yield view.flip(3)


def sums(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return a batch's part of the sums over batches and ranks.

    An unreadable sample counts as wrong, since its grey pixels say nothing of the model.

    Args:
        logits: The logits of the batch, float32 [n, classes].
        batch: The batch.

    Returns:
        The sums of cross-entropy, top-1 hits, top-5 hits and samples, float64 [4].
    """
    # All on the logits' device, so that nothing waits for the GPU.
    labels = batch.labels.to(logits.device, non_blocking=True)
    readable = torch.from_numpy(~mask_unreadable(batch)).to(logits.device)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (ranked == labels[:, None]) & readable[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none").double().sum()
    count = torch.full_like(loss, len(labels))
    return torch.stack([loss, hits[:, 0].sum().double(), hits.any(dim=1).sum().double(), count])


def metrics(total: torch.Tensor, samples: int) -> dict[str, float]:
    """Return the scores of a whole pass over a split.

    Args:
        total: The total of all `sums`, float64 [4].
        samples: The samples of the split.

    Returns:
        `loss`, the mean cross-entropy; `top1` and `top5` in percent.

    Raises:
        RunError: A sample was missed, or came twice.
    """
    loss, top1, top5, seen = total.tolist()
    # A loader or a rank that lost or repeated samples would give plausible, wrong scores.
    if seen != samples:
        raise RunError(
            f"validation saw {seen:.0f} samples of {samples}; each must count exactly once"
        )
    return {"loss": loss / seen, "top1": percent(top1, seen), "top5": percent(top5, seen)}


def percent(hits: float, samples: float) -> float:
    """Return an accuracy, in percent.

    All go through here, so that equal counts give equal numbers: `hits / samples * 100` differs
    in the last bit.
    """
    return 100 * hits / samples
