"""A run to serve."""

from pathlib import Path

import pytest
from trainers import Job, Training, all_ended

from wds_train.dataset.reader import Dataset

SETTINGS = (
    "model.drop_path=0",
    "mix.mixup=0",
    "batch=64",
    "schedule.epochs=2",
    "optimizer.lr=0.3",
    "ema.decay=0.9",
)


@pytest.fixture(scope="session")
def served(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A short training on the digits. Not to be written to."""
    folder = tmp_path_factory.mktemp("served")
    training = Training(
        Job(digits.store.url, str(folder / "digits-run"), str(folder), settings=SETTINGS)
    )
    with all_ended([training]):
        assert training.end() == 0, training.output
    return str(folder / "digits-run")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are kept for the next time are in the folder of the test."""
    monkeypatch.setenv("WDS_HOME", str(tmp_path / "home"))
