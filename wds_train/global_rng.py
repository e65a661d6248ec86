"""Randomness derived from what is being done, for libraries that draw from global generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from wds_train.rng import key


def point_generators(device: torch.device, *parts: str | int) -> None:
    """Point the global generators of Python, NumPy and torch, the CPU's and `device`'s, at `parts`. Layers such as dropout
    draw from torch's, timm's Mixup from NumPy's, its RandomErasing from Python's and torch's.
    """
    bits = key(*parts)
    random.seed(bits)
    np.random.seed(bits % (1 << 32))
    # torch.manual_seed would go through every backend, for a hundred times as long.
    torch.default_generator.manual_seed(bits % (1 << 63))
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(bits % (1 << 63))


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
    """Within, every draw is a function of `parts`, so that a resumed run draws what the unbroken one drew. Afterwards all
    are as before.
    """
    with generators_kept(device):
        point_generators(device, *parts)
        yield
