"""What people write by a slip, in a loop of their own: each is a sentence, or does what was meant."""

import os
import signal
from typing import Any

import numpy as np
import pytest
from torch.utils.data import get_worker_info

from wds_train import Dataset, TrainLoader
from wds_train.errors import RunError


def loader(dataset: Any, **more: Any) -> TrainLoader:
    return TrainLoader(dataset, **{"batch": 64, "epochs": 2, "size": 16, "workers": 0} | more)


def dies(image: np.ndarray, key: str, rng: np.random.Generator) -> np.ndarray:
    if get_worker_info():
        os.kill(os.getpid(), signal.SIGKILL)
    return image


def test_a_worker_that_dies_before_the_first_batch_is_an_error(digits: Dataset) -> None:
    """As of memory, where it runs out at once."""
    with pytest.raises(RunError, match=r"a loader worker died .*; if the machine ran out of memory"):
        next(iter(loader(digits, workers=2, transform=dies)))
