"""Batches: the images, labels and places of a step. `TrainLoader` and `EvalLoader` yield them."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from wds_train.rng import Ids


class Unreadable(NamedTuple):
    """A sample that could not be used.

    Attributes:
        sample: Its number in the split.
        shard: Its shard's name.
        key: Its key.
        cause: Why it could not be used.
    """

    sample: int
    shard: str
    key: str
    cause: str

    @property
    def named(self) -> str:
        """The sample and the cause, for messages."""
        return f"{self.shard}, key {self.key}: {self.cause}"


@dataclass(frozen=True)
class Batch:
    """The images of a step and what belongs to them, in the order of the global batch.

    Attributes:
        step: The step, counted over the whole training.
        positions: The places of the samples in the epoch's order, int64 [n].
        ids: Numbers of the samples in the split, int64 [n].
        images: uint8 [n, height, width, 3] RGB; unreadable ones are grey. With `normalize`
            float32 [n, 3, height, width]; with a transform of yours, what it returns, stacked.
        labels: Classes, int64 [n].
        unreadable: The samples that could not be used, once for each of their images.
        epoch: The step's epoch.
        items: Samples that are objects rather than arrays, with their keys: None for an
            unreadable one. Empty for images.
    """

    step: int
    positions: Ids
    ids: Ids
    images: torch.Tensor
    labels: torch.Tensor
    unreadable: list[Unreadable] = field(default_factory=list)
    epoch: int = 0
    items: list[tuple[str, Any]] = field(default_factory=list)


def mask_unreadable(batch: Batch) -> NDArray[np.bool_]:
    """Return a mask of the samples that could not be used, bool [n]."""
    return np.isin(batch.ids, [entry.sample for entry in batch.unreadable])


def empty_images(shape: tuple[int, ...], dtype: DTypeLike, *, pinned: bool) -> torch.Tensor:
    """Return memory for images, of any content.

    Args:
        shape: The shape of the tensor.
        dtype: Its dtype, as NumPy names it.
        pinned: Take memory that a GPU copies from.
    """
    if pinned:
        # PyTorch's pool hands a freed piece out again once the copies from it are done.
        torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(shape, dtype=torch_dtype, pin_memory=True)
    # NumPy asks for huge pages. With small ones, faulted in one by one, the copy of a batch takes
    # 4 times as long.
    return torch.from_numpy(np.empty(shape, dtype))
