"""A recipe's schedule as a picture."""

from pathlib import Path
from typing import Any

from wds_train.config.recipe import Recipe
from wds_train.config.schedule import image_side, lr_at
from wds_train.errors import UsageError, unwritable

POINTS = 1000  # of a curve


def draw_schedule(recipe: Recipe, path: Path) -> None:
    """Learning rate, logarithmic where it falls by steps, and, at the right, resolution, where it changes, of a whole
    training, as a PNG at `path`.
    """
    figure, epochs = new_figure(7), recipe.schedule.epochs
    axes, points = figure.subplots(), [epochs * i / POINTS for i in range(POINTS)]
    axes.plot(points, [lr_at(recipe, epoch) for epoch in points], color="C3")
    axes.set(title="learning rate", xlabel="epoch")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if recipe.schedule.kind == "step":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    sides = [image_side(recipe.data, epoch, epochs) for epoch in range(epochs)]
    if len(set(sides)) > 1:
        right = axes.twinx()
        right.stairs(sides, range(epochs + 1), baseline=None, color="C0")
        right.set_ylim(0, 1.1 * max(sides))
        right.spines["top"].set_visible(False)
        axes.set(title="learning rate and resolution")
        axes.set_ylabel("learning rate", color="C3")
        right.set_ylabel("resolution, px", color="C0")
    figure.suptitle(f"recipe {recipe.name}: {epochs} epochs of batches of {recipe.batch}")
    save(figure, path)


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
