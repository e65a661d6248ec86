"""Recipes: typed settings, refusals with the value, and the schedules that follow from them."""

import dataclasses
import json
import math

import pytest

from wds_train.errors import UsageError
from wds_train.recipe import PRESETS, Recipe, ScheduleRecipe, preset, setting_names, with_settings
from wds_train.schedule import ema_decay, lr_share


def test_settings_change_one_field_each_with_its_type() -> None:
    changed = with_settings(
        preset("digits"), ["optimizer.lr=0.02", "schedule.epochs=3", "data.scale=0.5,0.9", "seed=7"]
    )
    assert (changed.optimizer.lr, changed.schedule.epochs, changed.data.scale, changed.seed) == (0.02, 3, (0.5, 0.9), 7)
    assert changed.model == preset("digits").model


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.lrr=1", r"--set knows no 'optimizer.lrr'; did you mean optimizer.lr"),
        ("epochs=1", r"--set knows no 'epochs'; did you mean schedule.epochs"),
        ("name=x", r"--set knows no 'name'"),
        ("optimizer.lr", r"--set 'optimizer.lr' must read NAME=VALUE"),
        ("optimizer.lr=fast", r"--set optimizer.lr='fast' is not a number"),
        ("schedule.epochs=1.5", r"--set schedule.epochs='1.5' is not an int"),
        ("data.scale=0.5", r"--set data.scale='0.5' must hold 2 values"),
        ("optimizer.lr=nan", r"optimizer.lr = nan cannot work"),
        ("batch=0", r"batch = 0 cannot work: it must be a positive number"),
        ("data.size=0", r"data.size = 0 cannot work: it must be at least 8 pixels"),
        (
            "schedule.warmup_epochs=16",
            r"schedule.warmup_epochs = 16.0 cannot work: it must be less than schedule.epochs \(16\)",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_refused(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_settings(preset("digits"), [setting])


def test_an_odd_batch_with_mixup_is_refused() -> None:
    with pytest.raises(UsageError, match="batch = 63 cannot work: it must be even, because mixup pairs samples"):
        with_settings(preset("digits"), ["mix.mixup=0.2", "batch=63"])


def test_an_unknown_recipe_names_those_that_exist() -> None:
    with pytest.raises(UsageError, match="there is no recipe 'digit'; there are digits, imagenette"):
        preset("digit")


@pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS)
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    assert json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()


def test_every_field_of_a_section_is_documented_and_settable() -> None:
    leaves = sum(
        len(dataclasses.fields(getattr(Recipe("x"), f.name)))
        for f in dataclasses.fields(Recipe)
        if "." not in f.name and dataclasses.is_dataclass(getattr(Recipe("x"), f.name))
    )
    assert len([name for name in setting_names() if "." in name]) == leaves


def test_lr_against_the_closed_form_over_a_whole_schedule() -> None:
    schedule, steps = ScheduleRecipe(epochs=10, warmup_epochs=2, final_lr=0.1), 7
    shares = [lr_share(schedule, step, steps) for step in range(70)]
    assert shares[:15] == pytest.approx([step / 14 for step in range(15)])
    assert shares[14:] == pytest.approx(
        [0.1 + 0.9 * (1 + math.cos(math.pi * (step - 14) / 56)) / 2 for step in range(14, 70)]
    )
    assert max(shares) == shares[14] == 1.0


def test_ema_decay_warms_up() -> None:
    assert [ema_decay(0.9, step) for step in (0, 10, 100, 10_000)] == [0.1, 0.55, 0.9, 0.9]
