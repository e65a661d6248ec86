"""A step's images, labels and places."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike

from wds_train.rng import Ids


class Unreadable(NamedTuple):
    """A sample that could not be used, and why."""

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
    """A step's images and what belongs to them. `images` uint8 [n, height, width, 3] RGB, `labels` int64 [n], in
    global-batch order; `unreadable` names the samples whose image could not be used, once for each image: their pixels
    are grey. Where samples become objects, `items` holds them with their keys, None for an unreadable one.
    """

    step: int
    positions: Ids
    ids: Ids
    images: torch.Tensor
    labels: torch.Tensor
    unreadable: list[Unreadable] = field(default_factory=list)
    epoch: int = 0
    items: list[tuple[str, Any]] = field(default_factory=list)


def empty_images(shape: tuple[int, ...], dtype: DTypeLike, *, pinned: bool) -> torch.Tensor:
    """Memory for images: pinned, for a GPU, from PyTorch's pool, which hands a freed piece out again once the copies
    from it are done; else NumPy's, which asks for huge pages: small ones, faulted in one by one, make the copy of a batch
    take 4 times as long.
    """
    if pinned:
        return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)
    return torch.from_numpy(np.empty(shape, dtype))
