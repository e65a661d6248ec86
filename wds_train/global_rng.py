"""Randomness derived from what is being done, for libraries that draw from global generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def keyed(rng: np.random.Generator) -> Iterator[None]:
    """Within, what draws from global generators (torchvision's transforms, say) draws what follows from `rng`. Afterwards
    they are as before.
    """
    with derived_randomness(torch.device("cpu"), int(rng.integers(1 << 63))):
        yield


def generator_states() -> dict[str, Any]:
    """Where the CPU's global generators are, by their names."""
    state = np.random.get_state(legacy=False)
    return {
        "random": random.getstate(),
        "numpy.random": (state["state"]["key"].tobytes(), state["state"]["pos"], state["has_gauss"], state["gauss"]),
        "torch": torch.default_generator.get_state().numpy().tobytes(),
    }


def drawn_from(before: dict[str, Any]) -> str:
    """The names of the global generators that are no more where they were; empty for none."""
    return ", ".join(name for name, state in generator_states().items() if state != before[name])
