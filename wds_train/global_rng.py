"""Randomness derived from what is being done, for libraries that draw from global generators.

The trainer wraps each step in it, and `keyed` lets a user's transform call such libraries.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from wds_train.rng import key


def point_generators(device: torch.device, *parts: str | int) -> None:
    """Point the global generators at a key: Python's, NumPy's, and torch's of the CPU and `device`.

    Layers such as dropout draw from torch's, timm's Mixup from NumPy's, its RandomErasing from
    Python's and torch's.

    Args:
        device: The device whose generator is pointed, too.
        parts: The parts of the key.
    """
    # Each generator takes as many of the key's bits as it can.
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
    """Keep the state of all global generators: after the `with`, they are as they were before."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    # The CPU's generator is kept without being named.
    gpus = []
    if device.type == "cuda":
        gpus = [device]
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def derived_randomness(device: torch.device, *parts: str | int) -> Iterator[None]:
    """Make every draw a function of `parts`: a resumed run draws what the unbroken one drew.

    After the `with`, the global generators are as they were before.

    Args:
        device: The device whose generator is pointed at `parts`, too.
        parts: The parts of the key.
    """
    with generators_kept(device):
        point_generators(device, *parts)
        yield


@contextmanager
def keyed(rng: np.random.Generator) -> Iterator[None]:
    """Let code that draws from global generators, as torchvision's transforms do, draw from `rng`.

    Within the `with`, the draws from Python's `random`, from NumPy's global generator and from
    PyTorch's on the CPU follow from one draw of `rng`. After it, these generators are as they were
    before. So a transform makes the same sample in whichever worker it runs.

    Args:
        rng: The generator that a `transform` of a loader gets.

    Yields:
        Nothing.

    Example:
        >>> import random
        >>> import numpy as np
        >>> from wds_train import keyed
        >>> def transform(image, key, rng):
        ...     with keyed(rng):
        ...         shift = random.randrange(1000)  # or a transform of torchvision
        ...     return np.roll(image, shift, axis=1)
        >>> image = np.arange(3000).reshape(1, 1000, 3)
        >>> first = transform(image, "cat/0001", np.random.default_rng(7))
        >>> again = transform(image, "cat/0001", np.random.default_rng(7))
        >>> other = transform(image, "cat/0001", np.random.default_rng(8))
        >>> np.array_equal(first, again), np.array_equal(first, other)
        (True, False)
    """
    with derived_randomness(torch.device("cpu"), int(rng.integers(1 << 63))):
        yield


def generator_states() -> dict[str, Any]:
    """Return the states of the CPU's global generators, by their names."""
    state = np.random.get_state(legacy=False)
    key_bytes = state["state"]["key"].tobytes()
    return {
        "random": random.getstate(),
        "numpy.random": (key_bytes, state["state"]["pos"], state["has_gauss"], state["gauss"]),
        "torch": torch.default_generator.get_state().numpy().tobytes(),
    }


def drawn_from(before: dict[str, Any]) -> str:
    """Return the names of the global generators that were drawn from; empty for none.

    Args:
        before: What `generator_states` returned before.
    """
    moved = [name for name, state in generator_states().items() if state != before[name]]
    return ", ".join(moved)
