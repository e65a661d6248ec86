"""Randomness derived from what is being done, for libraries that draw from global generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from wds_train.order import key


def seed_torch(*parts: str | int) -> None:
    """Point torch's generators at `parts`. Layers such as dropout draw from them and take no generator of their own."""
    torch.manual_seed(key(*parts) % (1 << 63))


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Within, the global generators of Python, NumPy and torch may be pointed elsewhere; afterwards all are as before."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


@contextmanager
def derived_randomness(device: torch.device, *parts: str | int) -> Iterator[None]:
    """Within, every draw is a function of `parts`, so that a resumed run draws what the unbroken one drew: dropout's from
    torch, those of timm's Mixup from NumPy, of its RandomErasing from Python and torch. Afterwards all are as before.
    """
    with generators_kept(device):
        seed_torch(*parts)
        random.seed(key(*parts))
        np.random.seed(key(*parts) % (1 << 32))
        yield
