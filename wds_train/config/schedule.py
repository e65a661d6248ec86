"""The values that change as a training goes on: learning rate, image side, decay of the average.

They are pure functions of the step, so that a resumed run needs no state of a scheduler.
"""

import math

from wds_train.config.recipe import DataRecipe, EmaRecipe, Recipe, ScheduleRecipe

# Pixels: the stride of most models' last feature map.
SIZE_STEP = 32


def lr_share(schedule: ScheduleRecipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate at an optimizer step, as a share of the peak.

    It rises from `warmup_start` to 1 in the warm-up, and stays there for `flat`. Then it falls to
    `final_lr` in half a cosine (Loshchilov & Hutter 2016, arXiv:1608.03983) or in a straight line,
    or by `step_factor` at each of `step_epochs`.

    Args:
        schedule: The kind of curve and its figures.
        step: The optimizer step, from 0.
        steps_per_epoch: Optimizer steps of an epoch.
    """
    # The warm-up.
    epoch = step / steps_per_epoch
    warmup = schedule.warmup_epochs
    if epoch < warmup:
        risen = epoch / warmup
        if schedule.kind == "onecycle":  # Smith & Topin 2017, arXiv:1708.07120, in PyTorch's form
            risen = _half_cosine(risen)
        return schedule.warmup_start + (1 - schedule.warmup_start) * risen

    # The way down.
    if schedule.kind == "step":
        share = 1.0
        for after in schedule.step_epochs:
            if epoch >= after:
                share *= schedule.step_factor
        return share
    begin = schedule.flat * schedule.epochs
    if schedule.warmup_prefix:
        begin = max(warmup, begin)
    progress = max(0.0, epoch - begin) / (schedule.epochs - begin)
    fallen = progress
    if schedule.kind != "linear":
        fallen = _half_cosine(progress)
    return 1 + (schedule.final_lr - 1) * fallen


def lr_at(recipe: Recipe, epoch: float) -> float:
    """Return the learning rate after some epochs, for pictures and tables.

    Args:
        recipe: The recipe.
        epoch: The time, in epochs; it may lie inside an epoch.
    """
    # Steps of an epoch: enough for any column of a table and any pixel of a chart.
    steps = 1 << 16
    return recipe.peak_lr * lr_share(recipe.schedule, round(epoch * steps), steps)


def _half_cosine(share: float) -> float:
    """Return a curve from 0 to 1, slow at both ends, at `share` of its length."""
    return 0.5 * (1 - math.cos(math.pi * share))


def image_side(data: DataRecipe, epoch: int, epochs: int) -> int:
    """Return the side of an epoch's training images, in pixels.

    It is `start_size` before the ramp and `size` after it. On the ramp it grows in proportion, in
    multiples of SIZE_STEP (progressive resizing as in FFCV's rn50 configurations).

    Args:
        data: The sizes, and the ramp.
        epoch: The epoch, from 0.
        epochs: The epochs of the training.
    """
    begin = data.size_ramp[0] * epochs
    end = data.size_ramp[1] * epochs
    if not data.start_size or epoch >= end:
        return data.size
    if epoch <= begin:
        return data.start_size
    # On the ramp.
    side = data.start_size + (data.size - data.start_size) * (epoch - begin) / (end - begin)
    return min(data.size, max(data.start_size, round(side / SIZE_STEP) * SIZE_STEP))


def average_decay(ema: EmaRecipe, step: int, total_steps: int) -> float | None:
    """Return the decay of the update of the averaged weights after an optimizer step.

    `ema`: min(decay, (1 + n) / (10 + n)) for the nth update, the warm-up of TensorFlow's
    ExponentialMovingAverage. Without it the random initial weights keep a share of decay^n.
    `swa`: n / (n + 1) for the nth update since its start, which makes the average the plain mean of
    these weights (PyTorch's swa_utils); 0 before that.

    Args:
        ema: The kind of average, and its figures.
        step: The optimizer step, from 0.
        total_steps: Optimizer steps of the training.

    Returns:
        The decay, 0 to 1; None if no update follows this step.
    """
    # An update follows every `ema.every`th step.
    update, rest = divmod(step + 1, ema.every)
    if rest:
        return None
    if ema.kind == "ema":
        return min(ema.decay, update / (9 + update))  # `update` counts from 1
    # For the plain mean, counted from its start.
    since = update - 1 - math.ceil(ema.swa_start * total_steps / ema.every)
    return max(0, since) / (max(0, since) + 1)


def is_averaged(step: int, every: int) -> bool:
    """Return True if the averaged weights have been updated at all.

    If not, they still are the weights that the training began with, mostly random ones.

    Args:
        step: The optimizer steps that were done.
        every: `ema.every` of the recipe.
    """
    return step >= every
