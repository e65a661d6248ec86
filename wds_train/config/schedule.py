"""The values that change as a training goes on, as pure functions of the step, so that a resumed
run needs no scheduler state.
"""

import math

from wds_train.config.recipe import DataRecipe, EmaRecipe, Recipe, ScheduleRecipe

SIZE_STEP = 32  # pixels: the stride of most models' last feature map


def lr_share(schedule: ScheduleRecipe, step: int, steps_per_epoch: int) -> float:
    """Return the share of the peak learning rate at optimizer step `step` (from 0).

    A warm-up from `warmup_start` that reaches 1 at its end, then, `flat` being over, down to
    `final_lr` in half a cosine (Loshchilov & Hutter 2016, arXiv:1608.03983), in a straight line, or
    by `step_factor` at each of `step_epochs`.
    """
    epoch = step / steps_per_epoch
    warmup = schedule.warmup_epochs
    if epoch < warmup:
        risen = epoch / warmup
        if schedule.kind == "onecycle":  # Smith & Topin 2017, arXiv:1708.07120, in PyTorch's form
            risen = _half_cosine(risen)
        return schedule.warmup_start + (1 - schedule.warmup_start) * risen
    if schedule.kind == "step":
        return math.prod(schedule.step_factor for after in schedule.step_epochs if epoch >= after)
    begin = max(warmup if schedule.warmup_prefix else 0.0, schedule.flat * schedule.epochs)
    progress = max(0.0, epoch - begin) / (schedule.epochs - begin)
    fallen = progress if schedule.kind == "linear" else _half_cosine(progress)
    return 1 + (schedule.final_lr - 1) * fallen


def lr_at(recipe: Recipe, epoch: float) -> float:
    """Return the learning rate after `epoch` epochs, for pictures."""
    steps = 1 << 16  # an epoch: enough for any column or pixel
    return recipe.peak_lr * lr_share(recipe.schedule, round(epoch * steps), steps)


def _half_cosine(share: float) -> float:
    """Return a way from 0 to 1 as `share` goes it, slowly at both ends."""
    return 0.5 * (1 - math.cos(math.pi * share))


def image_side(data: DataRecipe, epoch: int, epochs: int) -> int:
    """Return the side of `epoch`'s training images, pixels: `start_size` before the ramp, `size`
    after it, on the ramp between them in proportion, to the nearest multiple of SIZE_STEP
    (progressive resizing as in FFCV's rn50 configurations).
    """
    begin, end = (share * epochs for share in data.size_ramp)
    if not data.start_size or epoch >= end:
        return data.size
    if epoch <= begin:
        return data.start_size
    side = data.start_size + (data.size - data.start_size) * (epoch - begin) / (end - begin)
    return min(data.size, max(data.start_size, round(side / SIZE_STEP) * SIZE_STEP))


def average_decay(ema: EmaRecipe, step: int, total_steps: int) -> float | None:
    """Return the decay of the update of the averaged weights that follows optimizer step `step`
    (from 0) of `total_steps`; None when none does.

    `ema`: min(decay, (1 + n) / (10 + n)) for the nth update, the warm-up of TensorFlow's
    ExponentialMovingAverage; without it the random initial weights keep weight decay^n. `swa`: n /
    (n + 1) for the nth since its start, which makes the average the plain mean of what it was given
    (PyTorch's swa_utils); before that, 0.
    """
    update, rest = divmod(step + 1, ema.every)
    if rest:
        return None
    if ema.kind == "ema":
        return min(ema.decay, update / (9 + update))
    since = update - 1 - math.ceil(ema.swa_start * total_steps / ema.every)
    return max(0, since) / (max(0, since) + 1)


def is_averaged(step: int, every: int) -> bool:
    """Return True if the averaged weights have been updated once in the first `step` optimizer
    steps, with `ema.every` = `every`. If not, they still are the weights that the training began
    with: mostly random ones.
    """
    return step >= every
