"""Recipes: typed settings, and refusals with the value."""

import dataclasses
import json
from operator import attrgetter

import pytest

from wds_train.config.presets import PRESETS, Preset, preset
from wds_train.config.recipe import Recipe
from wds_train.config.settings import describe_followers, setting_names, with_settings
from wds_train.errors import UsageError


def test_settings_change_one_field_each_with_its_type() -> None:
    changed = with_settings(
        preset("digits"), ["optimizer.lr=0.02", "schedule.epochs=3", "data.scale=0.5,0.9", "seed=7"]
    )
    assert (changed.optimizer.lr, changed.schedule.epochs, changed.data.scale, changed.seed) == (
        0.02,
        3,
        (0.5, 0.9),
        7,
    )
    assert changed.model == preset("digits").model


@pytest.mark.parametrize(
    ("recipe", "settings", "changed"),
    [
        ("digits", ["schedule.epochs=1"], {"schedule.warmup_epochs": pytest.approx(0.1)}),
        ("digits", ["schedule.epochs=1", "schedule.warmup_epochs=0.5"], {}),
        ("digits", ["schedule.epochs=10", "data.size=32", "optimizer.lr=1"], {}),
        ("step", ["schedule.epochs=45"], {"schedule.step_epochs": (15.0, 30.0)}),
        ("quick", ["data.size=96"], {"data.start_size": 80, "data.eval_size": 128}),
        ("quick", ["data.size=96", "data.eval_size=96"], {"data.start_size": 80}),
    ],
)
def test_what_is_set_takes_along_what_is_not(
    recipe: str, settings: list[str], changed: dict[str, object]
) -> None:
    before = preset(recipe)
    after = with_settings(before, settings)
    named = {setting.partition("=")[0] for setting in settings}
    others = {
        name for name in setting_names() if attrgetter(name)(after) != attrgetter(name)(before)
    } - named
    assert {name: attrgetter(name)(after) for name in others} == changed
    lines = describe_followers(before, settings)
    assert len(lines) == len(changed)
    assert all(any(f": {name} " in line for line in lines) for name in changed)
    assert with_settings(after, settings) == after  # a run that goes on is the same


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.lrr=1", r"--set knows no 'optimizer.lrr'; did you mean optimizer.lr"),
        ("epochs=1", r"--set knows no 'epochs'; did you mean schedule.epochs"),
        ("name=x", r"--set knows no 'name'; did you mean model.name or optimizer.name\?"),
        ("lr=0.1", r"--set knows no 'lr'; did you mean optimizer.lr\?"),
        ("sgd.lr=0.1", r"--set knows no 'sgd.lr'; did you mean optimizer.lr\?"),
        ("epoch=3", r"--set knows no 'epoch'; did you mean schedule.epochs or"),
        ("speed=1", r"--set knows no 'speed'; did you mean seed\?"),
        ("hurry=1", r"--set knows no 'hurry'; `wds-train recipes digits` lists every name"),
        ("data.std=0.2,0.2,inf", r"--set data.std='inf' is not a number"),
        ("optimizer.lr", r"--set 'optimizer.lr' must read NAME=VALUE"),
        ("optimizer.lr=fast", r"--set optimizer.lr='fast' is not a number"),
        ("schedule.epochs=1.5", r"--set schedule.epochs='1.5' is not a whole number"),
        ("data.scale=0.5", r"--set data.scale='0.5' must hold 2 values"),
        ("optimizer.lr=nan", r"--set optimizer.lr='nan' is not a number"),
        ("batch=0", r"batch = 0 cannot work: it must be a positive number"),
        (
            "schedule.kind=cos",
            r"--set schedule.kind='cos' is none of cosine, linear, step, onecycle",
        ),
        (
            "schedule.step_epochs=3,2",
            r"schedule.step_epochs = \(3.0, 2.0\) cannot work: it must be ascending",
        ),
        ("data.start_size=64", r"data.start_size = 64 cannot work: it must be 0, or 8 to 32"),
        ("data.repeats=3", r"batch = 64 cannot work: it must be divisible by data.repeats \(3\)"),
        ("data.eval_flip=yes", r"--set data.eval_flip='yes' must be true or false"),
        ("loss.smoothing=1", r"loss.smoothing = 1.0 cannot work"),
        (
            "schedule.patience=-1",
            r"schedule.patience = -1 cannot work: it must be a number of epochs, or 0",
        ),
        (
            "optimizer.layer_decay=0",
            r"optimizer.layer_decay = 0.0 cannot work: it must be in \(0, 1\]",
        ),
        ("data.size=0", r"data.size = 0 cannot work: it must be at least 8 pixels"),
        (
            "schedule.warmup_epochs=10",
            r"schedule.warmup_epochs = 10.0 cannot work: it must be less than schedule.epochs \(10\)",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_refused(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_settings(preset("digits"), [setting])


def test_an_odd_batch_with_mixup_is_refused() -> None:
    with pytest.raises(
        UsageError, match="batch = 63 cannot work: it must be even, because mixup pairs samples"
    ):
        with_settings(preset("digits"), ["mix.mixup=0.2", "batch=63"])


def test_an_unknown_recipe_names_those_that_exist() -> None:
    with pytest.raises(UsageError, match=r"there is no recipe 'digit'; did you mean digits\?"):
        preset("digit")
    with pytest.raises(
        UsageError, match="there is no recipe 'a'; there are quick, standard, strong, max, seed,"
    ):
        preset("a")


@pytest.mark.parametrize("named", PRESETS.values(), ids=PRESETS)
def test_a_recipe_survives_json(named: Preset) -> None:
    content = named.recipe.to_dict()
    assert json.loads(json.dumps(content)) == content


def test_every_field_of_a_section_is_documented_and_settable() -> None:
    leaves = sum(
        len(dataclasses.fields(getattr(Recipe("x"), f.name)))
        for f in dataclasses.fields(Recipe)
        if "." not in f.name and dataclasses.is_dataclass(getattr(Recipe("x"), f.name))
    )
    assert len([name for name in setting_names() if "." in name]) == leaves
