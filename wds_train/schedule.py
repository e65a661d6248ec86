"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math

from wds_train.recipe import ScheduleRecipe


def lr_share(schedule: ScheduleRecipe, step: int, steps_per_epoch: int) -> float:
    """The share of the peak learning rate at optimizer step `step` (from 0): a linear warm-up from 0 that reaches 1 at
    its end, then half a cosine (Loshchilov & Hutter 2016, arXiv:1608.03983) down to `final_lr`.
    """
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / (schedule.epochs * steps_per_epoch - warmup)
    return schedule.final_lr + (1 - schedule.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay(decay: float, step: int) -> float:
    """The decay of the EMA update that follows optimizer step `step` (from 0): min(decay, (1 + t) / (10 + t)), the
    warm-up of TensorFlow's ExponentialMovingAverage. Without it the random initial weights keep weight decay^n.
    """
    return min(decay, (1 + step) / (10 + step))
