"""The scores that a validation gives the two kinds of weights that a training leaves, raw and EMA.

EMA weights that were never updated are those that the training began with. Their metrics are logged
like all others, so that every validation has the same names, but say nothing of the training:
whatever judges or shows metrics takes `telling` ones.
"""

from collections.abc import Mapping
from typing import Any

from wds_train.config.schedule import is_averaged

SCORES = {"raw": "val/top1", "ema": "val/top1_ema"}
NAMES = {"raw": "raw", "ema": "EMA"}  # for people
EMA = "_ema"  # how the names of the EMA weights' metrics end


def telling(metrics: Mapping[str, float], step: float, every: int) -> dict[str, float]:
    """Return `metrics` as of optimizer step `step`, without those of EMA weights that were never
    updated.

    `every` is `ema.every`.
    """
    if is_averaged(int(step), every):
        return dict(metrics)
    return {name: value for name, value in metrics.items() if not name.endswith(EMA)}


def own_metrics(metrics: Mapping[str, float], kind: str) -> dict[str, float]:
    """Return those of the `kind` weights alone."""
    return {name: value for name, value in metrics.items() if name.endswith(EMA) == (kind == "ema")}


def every_of(recipe: Mapping[str, Any]) -> int:
    """Return `ema.every` of a recipe as a run's manifest has it, which may be of a version that
    this one cannot train by.
    """
    ema = recipe.get("ema")
    every = ema.get("every") if isinstance(ema, dict) else None
    return every if isinstance(every, int) else 1


def told(kind: str, step: int, epoch: int, metrics: Mapping[str, float]) -> str:
    """Weights and their own score, for people."""
    score = metrics.get(SCORES[kind])
    if score is None:
        return f"{kind} weights of step {step}, not validated"
    return f"{kind} weights of step {step} (epoch {epoch}), top-1 {score:.2f} % on val"


def never_averaged(step: int, every: int) -> str:
    """Return why EMA weights are of no use, as the end of a sentence."""
    return f"never updated: ema.every is {every}, and these are of step {step}"
