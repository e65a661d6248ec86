"""Scores of the two kinds of weights that a training leaves: raw and EMA.

EMA weights that were never updated are those that the training began with. Their metrics are logged
like all others, so that every validation has the same names, but say nothing of the training.
Everything that judges or shows metrics takes those that `telling` returns.
"""

from collections.abc import Mapping
from typing import Any

from wds_train.config.schedule import is_averaged

# The metric that decides which weights are better, of each kind.
SCORES = {"raw": "val/top1", "ema": "val/top1_ema"}
# The kinds in messages for people.
NAMES = {"raw": "raw", "ema": "EMA"}
# The ending of the names of the EMA weights' metrics.
EMA = "_ema"


def telling(metrics: Mapping[str, float], step: float, every: int) -> dict[str, float]:
    """Return the metrics that say something of the training.

    Args:
        metrics: Of a validation.
        step: The optimizer step of the validation. Before the first update of the EMA weights their
            metrics are left out.
        every: The recipe's `ema.every`.
    """
    if is_averaged(int(step), every):
        return dict(metrics)
    return select_metrics(metrics, "raw")


def select_metrics(metrics: Mapping[str, float], kind: str) -> dict[str, float]:
    """Return the metrics of the `kind` ("raw" or "ema") weights."""
    is_ema = kind == "ema"
    return {name: value for name, value in metrics.items() if name.endswith(EMA) == is_ema}


def every_of(recipe: Mapping[str, Any]) -> int:
    """Return `ema.every` of a recipe in a run's manifest; 1 where it has none.

    The recipe may be of a version that this one cannot train by.
    """
    ema = recipe.get("ema")
    if not isinstance(ema, dict):
        return 1
    every = ema.get("every")
    if not isinstance(every, int):
        return 1
    return every


def describe_score(kind: str, step: int, epoch: int, metrics: Mapping[str, float]) -> str:
    """Return weights and their score in words, for people."""
    score = metrics.get(SCORES[kind])
    if score is None:
        return f"{kind} weights of step {step}, not validated"
    return f"{kind} weights of step {step} (epoch {epoch}), top-1 {score:.2f} % on val"


def never_averaged(step: int, every: int) -> str:
    """Return the reason why EMA weights are of no use, as the end of a sentence."""
    return f"never updated: ema.every is {every}, and these are of step {step}"
