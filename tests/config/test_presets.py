"""Fifty steps of every preset, at a tiny size: model, loader, optimizer, schedule and loss together, to a committed end."""

import math
from pathlib import Path

import pytest
from trainers import STEPS_PER_EPOCH, Job, Training, all_ended, make_dataset

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run import Run
from wds_train.config.presets import PRESETS, preset
from wds_train.config.schedule import lr_share
from wds_train.config.settings import with_settings
from wds_train.storage.open import open_store

EPOCHS = 5
TINY = (
    "model.name=test_resnet",
    "data.size=64",
    "data.eval_size=64",
    "batch=16",
    f"schedule.epochs={EPOCHS}",
    "schedule.warmup_epochs=1",
    "schedule.step_epochs=2,3",
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("presets"))


@pytest.mark.parametrize("name", PRESETS)
def test_fifty_steps(dataset: str, tmp_path: Path, name: str) -> None:
    settings = [
        *TINY,
        "model.init=",
        *(["data.start_size=32"] if preset(name).data.start_size else []),
    ]
    recipe = with_settings(preset(name), settings)
    chosen = tuple(part for setting in settings for part in ("--set", setting))
    training = Training(
        Job(
            dataset,
            str(tmp_path / "run"),
            str(tmp_path),
            1,
            arguments=("--recipe", name, *chosen),
            defaults=(),
        )
    )
    with all_ended([training]):
        assert training.end() == 0, training.output
    assert len(training.steps()) == EPOCHS * STEPS_PER_EPOCH >= 50
    store = open_store(str(tmp_path / "run"))
    records = Run(store, *read_run(store)).history()
    rates = {record["step"]: record["train/lr"] for record in records if "train/lr" in record}
    shares = {step: lr_share(recipe.schedule, step - 1, STEPS_PER_EPOCH) for step in rates}
    assert rates == pytest.approx({step: recipe.peak_lr * share for step, share in shares.items()})
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert losses
    assert all(map(math.isfinite, losses))
    assert records[-1]["val/top1"] + records[-1]["val/top1_ema"] > 0
