"""Schedules against closed forms and against the objects that they are named after, over whole trainings."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from wds_train.config.presets import preset
from wds_train.config.recipe import DataRecipe, EmaRecipe, Recipe, ScheduleRecipe
from wds_train.config.schedule import average_decay, image_side, is_averaged, lr_share

STEPS = 5  # an epoch


def shares(schedule: ScheduleRecipe) -> list[float]:
    return [lr_share(schedule, step, STEPS) for step in range(schedule.epochs * STEPS)]


def rates(recipe: Recipe) -> list[float]:
    return [recipe.peak_lr * share for share in shares(recipe.schedule)]


def optimizer(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def torch_rates(
    lr: float, steps: int, make: Callable[[torch.optim.Optimizer], LRScheduler]
) -> list[float]:
    moved = optimizer(lr)
    scheduler, seen = make(moved), []
    for _ in range(steps):
        seen.append(moved.param_groups[0]["lr"])
        moved.step()
        scheduler.step()
    return seen


def test_cosine_against_the_closed_form() -> None:
    got = shares(ScheduleRecipe(epochs=10, warmup_epochs=2, final_lr=0.1))
    assert got[:11] == pytest.approx([step / 10 for step in range(11)])
    assert got[10:] == pytest.approx(
        [0.1 + 0.9 * (1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)]
    )
    assert max(got) == got[10] == 1.0


def test_ffcvs_line() -> None:
    """get_lr of ffcv-imagenet's rn50 configurations: np.interp over epochs, in the steps of an epoch too."""
    recipe = preset("quick")
    assert recipe.peak_lr == pytest.approx(0.425)
    epochs = np.arange(16 * STEPS) / STEPS
    assert rates(recipe) == pytest.approx(
        np.interp(epochs, [0, 2, 16], [1e-4 * 0.425, 0.425, 0]).tolist()
    )


def test_a3s_cosine_is_timms() -> None:
    recipe = preset("strong")
    theirs = CosineLRScheduler(
        optimizer(8e-3),
        t_initial=100 * STEPS,
        lr_min=1e-6,
        warmup_t=5 * STEPS,
        warmup_lr_init=1e-4,
        t_in_epochs=False,
    )
    assert rates(recipe) == pytest.approx([theirs._get_lr(step)[0] for step in range(100 * STEPS)])


def test_max_is_torchvisions_warmup_and_cosine() -> None:
    """references/classification/train.py sets it once an epoch; ours moves at every step, and meets it at each epoch."""

    def make(moved: torch.optim.Optimizer) -> LRScheduler:
        warmup = LinearLR(moved, start_factor=0.01, total_iters=5)
        return SequentialLR(moved, [warmup, CosineAnnealingLR(moved, T_max=595)], milestones=[5])

    assert rates(preset("max"))[::STEPS] == pytest.approx(torch_rates(0.5, 600, make), rel=1e-6)


def test_onecycle_is_torchs() -> None:
    """PyTorch ends each phase one step early, so that its last step is at the bottom: a step's difference at most."""
    total = 30 * STEPS
    theirs = torch_rates(
        0.002,
        total,
        lambda moved: OneCycleLR(
            moved, 0.002, total, pct_start=0.3, div_factor=25, final_div_factor=1e4
        ),
    )
    ours = rates(preset("onecycle"))
    assert ours[0] == pytest.approx(theirs[0]) == pytest.approx(0.002 / 25)
    assert max(ours) == pytest.approx(0.002)
    assert np.abs(np.array(ours) - theirs).max() < np.abs(np.diff(theirs)).max()


def test_step_falls_by_ten_at_30_and_60() -> None:
    assert rates(preset("step"))[::STEPS] == pytest.approx([0.1] * 30 + [0.01] * 30 + [0.001] * 30)
    assert replace(preset("step"), batch=512).peak_lr == pytest.approx(0.2)


def test_sizes_grow_as_ffcvs_do() -> None:
    """get_resolution of ffcv-imagenet, whose 88 epochs ramp from epoch 65 to 76."""
    data = DataRecipe(size=192, start_size=160, size_ramp=(65 / 88, 76 / 88))
    ours = [image_side(data, epoch, 88) for epoch in range(88)]
    ramp = np.interp(np.arange(88), [65, 76], [160, 192])
    assert ours == [int(np.round(side / 32)) * 32 for side in ramp]
    assert {image_side(replace(data, start_size=0), epoch, 88) for epoch in range(88)} == {192}


def test_ema_decay_warms_up_and_skips_steps() -> None:
    ema = EmaRecipe(decay=0.9)
    assert [average_decay(ema, step, 10_001) for step in (0, 10, 100, 10_000)] == [
        0.1,
        0.55,
        0.9,
        0.9,
    ]
    every = [average_decay(EmaRecipe(decay=0.9, every=3), step, 9) for step in range(9)]
    assert every == [None, None, 1 / 10, None, None, 2 / 11, None, None, 3 / 12]


@pytest.mark.parametrize("every", [1, 2])
def test_swa_is_the_plain_mean(every: int) -> None:
    average, given, total = 100.0, [], 16
    for step in range(total):
        decay = average_decay(EmaRecipe(kind="swa", every=every, swa_start=0.5), step, total)
        if decay is not None:
            average = decay * average + (1 - decay) * step
            given += [step] if step >= total / 2 else []
    assert average == pytest.approx(np.mean(given))


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_flat_rate_before_the_way_down(kind: str) -> None:
    schedule = ScheduleRecipe(kind=kind, epochs=10, warmup_epochs=1, flat=0.5)  # type: ignore[arg-type]
    assert [lr_share(schedule, step, 1) for step in range(6)] == [0, 1, 1, 1, 1, 1]
    plain = ScheduleRecipe(kind=kind, epochs=5, warmup_epochs=0)  # type: ignore[arg-type]
    assert [lr_share(schedule, 5 + step, 1) for step in range(5)] == [
        lr_share(plain, step, 1) for step in range(5)
    ]


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("every", [1, 3, 32])
def test_weights_are_averaged_once_they_were_updated(kind: Any, every: int) -> None:
    ema = EmaRecipe(kind=kind, every=every, swa_start=0.5)
    for done in range(70):
        updates = [step for step in range(done) if average_decay(ema, step, 70) is not None]
        assert is_averaged(done, every) == bool(updates)
