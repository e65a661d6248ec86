"""A run's curves, and a recipe's schedule, as pictures."""

import math
from pathlib import Path
from typing import Any

from wds_train.config.recipe import Recipe
from wds_train.config.schedule import image_side, lr_at
from wds_train.errors import UsageError, unwritable

POINTS = 1000  # of a curve
TOP1 = ("val/top1", "val/top1_ema")


def draw_curves(history: list[dict[str, Any]], recipe: Recipe, title: str, path: Path) -> None:
    """Loss, accuracy and learning rate over epochs, from a run's records, as a PNG at `path`; the best epoch is
    marked, and where it changes, the side of the training images drawn.
    """
    figure = new_figure(12)
    loss, accuracy, rate = figure.subplots(1, 3)
    steps = [record for record in history if "train/loss" in record]
    epochs = [record for record in history if "val/top1" in record]
    _plot(loss, steps, "train/loss", "train, per step", color="0.75", linewidth=0.8)
    _plot(loss, epochs, "epoch/loss", "train, epoch mean", color="C0")
    _plot(loss, epochs, "val/loss", "validation", color="C1")
    _plot(loss, epochs, "val/loss_ema", "validation, EMA", color="C2")
    loss.set(title="loss", xlabel="epoch")
    _plot(accuracy, epochs, "val/top1", "raw", color="C1", marker=".")
    _plot(accuracy, epochs, "val/top1_ema", "EMA", color="C2", marker=".")
    if tops := [(record[name], -record["epoch"]) for record in epochs for name in TOP1 if name in record]:
        top, epoch = max(tops)
        accuracy.axvline(-epoch, color="0.6", linestyle=":", zorder=0)
        accuracy.plot([], [], " ", label=f"best: {top:.2f} %, epoch {-epoch:g}")
    accuracy.set(title="validation top-1, %", xlabel="epoch")
    _plot(rate, steps, "train/lr", "", color="C3")
    _finish_schedule(rate, recipe, steps[-1]["epoch"] if steps else 0.0)
    for axes in (loss, accuracy):
        if axes.lines:
            axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    save(figure, path)


def draw_schedule(recipe: Recipe, path: Path) -> None:
    """Learning rate and resolution of a whole training, as a PNG at `path`."""
    figure, epochs = new_figure(7), recipe.schedule.epochs
    axes, points = figure.subplots(), [epochs * i / POINTS for i in range(POINTS)]
    axes.plot(points, [lr_at(recipe, epoch) for epoch in points], color="C3")
    _finish_schedule(axes, recipe, epochs)
    figure.suptitle(f"recipe {recipe.name}: {epochs} epochs of batches of {recipe.batch}")
    save(figure, path)


def _finish_schedule(axes: Any, recipe: Recipe, until: float) -> None:
    """The axes of a learning rate, logarithmic where it falls by steps; the resolution, where it changes, at the right."""
    epochs = recipe.schedule.epochs
    axes.set(title="learning rate", xlabel="epoch")
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)
    if recipe.schedule.kind == "step":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    sides = [image_side(recipe.data, epoch, epochs) for epoch in range(epochs)]
    if len(set(sides)) == 1:
        axes.spines["right"].set_visible(False)
        return
    right = axes.twinx()
    shown = sides[: max(1, math.ceil(until))]
    right.stairs(shown, range(len(shown) + 1), baseline=None, color="C0")
    right.set_ylim(0, 1.1 * max(sides))
    right.spines["top"].set_visible(False)
    axes.set(title="learning rate and resolution")
    axes.set_ylabel("learning rate", color="C3")
    right.set_ylabel("resolution, px", color="C0")


def new_figure(width: float, height: float = 3.6) -> Any:
    """An empty matplotlib figure, in inches. `UsageError` without matplotlib, which only pictures need: it takes
    a second to import, and is not imported before.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"matplotlib, which draws the pictures, cannot be imported: {error}; install it") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write `figure` as a PNG; `UsageError` where `path` lets nothing be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as error:
        raise unwritable(path, error) from error


def _plot(axes: Any, records: list[dict[str, Any]], name: str, label: str, **style: Any) -> None:
    points = [(record["epoch"], record[name]) for record in records if name in record]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)
