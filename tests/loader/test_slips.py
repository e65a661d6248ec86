"""What people write by a slip, in a loop of their own: each is a sentence, or does what was meant."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from wds_train import Dataset, EvalLoader, TrainLoader
from wds_train.errors import RunError, UsageError


def loader(dataset: Any, **more: Any) -> TrainLoader:
    return TrainLoader(dataset, **{"batch": 64, "epochs": 2, "size": 16, "workers": 0} | more)


def test_a_path_is_a_folder(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Path("./digits") is Path("digits"): as a text, the name of a dataset on the embedded server."""
    folder = Path(digits.store.url)
    monkeypatch.chdir(folder.parent)
    for path in (Path("./", folder.name), folder):
        assert loader(path).state_dict() == loader(digits).state_dict()
        assert Dataset.open(path).fingerprint == digits.fingerprint
    with pytest.raises(
        UsageError, match="the dataset None is no address; it is s3://BUCKET/PREFIX, a path"
    ):
        loader(None)


@pytest.mark.parametrize("step", [-1, 45, 2.0, "3", None])
def test_a_step_that_cannot_be_is_refused_where_it_is_set(digits: Dataset, step: Any) -> None:
    training = loader(digits, from_step=7)
    with pytest.raises(UsageError, match=f"step = {step}|step = '3'"):
        training.step = step
    if step is not None:
        with pytest.raises(UsageError, match="step = "):
            training.state_dict(step)
    assert training.step == 7


@pytest.mark.parametrize("step", [np.int64(3), torch.tensor(3)], ids=type)
def test_a_state_is_plain_whatever_the_step_was(digits: Dataset, step: Any) -> None:
    training = loader(digits)
    expected = json.dumps(training.state_dict(3))
    assert json.dumps(training.state_dict(step)) == expected
    training.step = step
    assert json.dumps(training.state_dict()) == expected


@pytest.mark.parametrize("state", [None, 3, "3"])
def test_what_is_no_state_is_refused(digits: Dataset, state: Any) -> None:
    with pytest.raises(UsageError, match=f"the state is {state!r}, nothing that state_dict"):
        loader(digits).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (224, 224)}, r"data\.size is \[224, 224\], not a whole number"),
        ({"size": 32.0}, r"data\.size is 32\.0, not a whole number"),
        ({"scale": 0.5}, r"data\.scale is 0\.5, not a list"),
        ({"color_jitter": 0.4}, r"data\.color_jitter is 0\.4, not a list"),
        ({"flip": "half"}, r"data\.flip is 'half', not a number"),
        ({"augment": print}, r"data\.auto_augment is .*, not a text"),
        ({"mix": ["./more"]}, "mix cannot work: it must be a list of pairs"),
        ({"mix": ("./more", 0.5)}, "mix cannot work"),
        ({"mix": {"./more": 0.5}}, "mix cannot work"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_argument_of_another_type_is_named(
    digits: Dataset, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        loader(digits, **change)


def test_numbers_may_be_of_numpy(digits: Dataset) -> None:
    plain = loader(digits, from_step=43, scale=(0.5, 1))
    other = loader(
        digits, from_step=43, scale=np.array([0.5, 1]), size=np.int64(16), flip=np.float64(0.5)
    )
    assert torch.equal(next(iter(plain)).images, next(iter(other)).images)


def test_an_evaluation_has_one_iteration_at_a_time(digits: Dataset) -> None:
    validation = EvalLoader(digits, 90, size=16, workers=1)
    with pytest.raises(UsageError, match=r"data\.eval_size is \[16, 16\], not a whole number"):
        EvalLoader(digits, 90, size=(16, 16), workers=0)  # type: ignore[arg-type]
    with pytest.raises(
        RunError, match="samples came, 360 are this rank's: the loader was iterated anew"
    ):
        list(zip(validation, validation, strict=False))


@pytest.mark.parametrize("size", [10**6, 10**9])
def test_memory_that_cannot_be_had_is_a_sentence(digits: Dataset, size: int) -> None:
    with pytest.raises(
        UsageError, match=r"cannot have the [0-9,.]+ GB of memory that its batches take \("
    ):
        next(iter(loader(digits, size=size)))


def dies(image: np.ndarray, key: str, rng: np.random.Generator) -> np.ndarray:
    if get_worker_info():
        os.kill(os.getpid(), signal.SIGKILL)
    return image


def test_a_worker_that_dies_before_the_first_batch_is_an_error(digits: Dataset) -> None:
    """As of memory, where it runs out at once."""
    with pytest.raises(
        RunError, match=r"a loader worker died .*; if the machine ran out of memory"
    ):
        next(iter(loader(digits, workers=2, transform=dies)))
