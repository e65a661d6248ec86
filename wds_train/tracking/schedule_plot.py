"""Draw a recipe's schedule."""

from pathlib import Path
from typing import Any

from wds_train.config.recipe import Recipe
from wds_train.config.schedule import image_side, lr_at
from wds_train.errors import UsageError, unwritable

POINTS = 1000  # of a curve


def draw_schedule(recipe: Recipe, path: Path) -> None:
    """Write a PNG of the learning rate over a whole training, and of the resolution if it changes.

    The learning rate is logarithmic if it falls in steps.

    Args:
        recipe: The recipe.
        path: Where the PNG goes.

    Raises:
        UsageError: matplotlib is missing, or nothing can be written at `path`.
    """
    figure = new_figure(7)
    axes = figure.subplots()

    # Learning rate, at the left.
    epochs = recipe.schedule.epochs
    points = [epochs * i / POINTS for i in range(POINTS)]
    axes.plot(points, [lr_at(recipe, epoch) for epoch in points], color="C3")
    axes.set(title="learning rate", xlabel="epoch")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if recipe.schedule.kind == "step":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)

    # Resolution, at the right.
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
    """Return an empty matplotlib figure.

    Args:
        width: Inches.
        height: Inches.

    Raises:
        UsageError: matplotlib is missing. Only pictures need it, and its import takes a second.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            f"matplotlib, which draws the pictures, cannot be imported: {error}; install it"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write `figure` as a PNG.

    Raises:
        UsageError: Nothing can be written at `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as error:
        raise unwritable(path, error) from error
