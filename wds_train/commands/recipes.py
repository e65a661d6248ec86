"""`wds-train recipes`: list the presets, or print one in full with its charts."""

import argparse
import json
import math
from operator import attrgetter
from pathlib import Path
from typing import Any

from wds_train.config.presets import PRESETS, Preset, preset
from wds_train.config.recipe import Recipe
from wds_train.config.schedule import image_side, lr_at
from wds_train.config.settings import setting_names, setting_of, with_settings
from wds_train.console import align_columns
from wds_train.errors import UsageError

WIDTH = 64  # of a chart, without its labels
HEIGHT = 9  # of a chart, without its labels
LABEL = 10  # columns left of a chart
TICKS = 5  # of the axis below a chart
NOTE = "(p) published in the named source, (i) inferred, (m) measured by this project"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one in full")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="K=V",
        dest="settings",
        help="with one field changed",
    )
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="draw learning rate and resolution"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    if args.name is None:
        if args.settings or args.png:
            raise UsageError(
                f"--set and --png need the NAME of a recipe; there are {', '.join(PRESETS)}"
            )
        rows = [_summary(each) for each in PRESETS.values()]
        print(json.dumps(rows, indent=1) if args.json else "\n".join(_table(rows)))
        return 0
    recipe = with_settings(preset(args.name), args.settings)
    if args.json:
        print(json.dumps(_full(PRESETS[args.name], recipe), indent=1))
    else:
        print("\n".join(_lines(PRESETS[args.name], recipe)))
    if args.png:
        from wds_train.tracking.schedule_plot import draw_schedule

        draw_schedule(recipe, args.png)
    return 0


def _summary(found: Preset) -> dict[str, Any]:
    recipe = found.recipe
    sizes = [side for side in (recipe.data.start_size, recipe.data.size) if side]
    return {
        "name": recipe.name,
        "model": recipe.model.name,
        "epochs": recipe.schedule.epochs,
        "batch": recipe.batch,
        "size": "-".join(map(str, sizes)),
        "hours": found.hours,
        "expected": found.expected,
    }


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each preset, of whose `expected` only the first number is shown."""
    table = [list(rows[0])]
    for row in rows:
        short = row | {"expected": row["expected"].split(";")[0]}
        table.append([str(value) for value in short.values()])
    return [*align_columns(table), "", f"{NOTE}; `wds-train recipes NAME` prints one in full"]


def _full(found: Preset, recipe: Recipe) -> dict[str, Any]:
    """Return all of a recipe, as JSON."""
    epochs = recipe.schedule.epochs
    return {
        "name": recipe.name,
        "source": found.source,
        "expected": found.expected,
        "hours": found.hours,
        "recipe": recipe.to_dict(),
        "changed": _changed(recipe, Recipe(name="")),
        "schedule": [
            {
                "epoch": epoch,
                "lr": lr_at(recipe, epoch),
                "size": image_side(recipe.data, epoch, epochs),
            }
            for epoch in range(epochs)
        ],
    }


def _changed(recipe: Recipe, before: Recipe) -> list[str]:
    """Return the names of the settings that differ."""
    names = []
    for name in setting_names():
        value = attrgetter(name)
        if value(recipe) != value(before):
            names.append(name)
    return names


def _lines(found: Preset, recipe: Recipe) -> list[str]:
    """Return all of a recipe, for people."""
    facts = [
        ["recipe", recipe.name],
        ["source", found.source],
        ["expected", found.expected],
        ["hours", str(found.hours)],
        ["", NOTE],
    ]
    here = _changed(recipe, found.recipe)
    if here:
        facts.append(["", f"but --set changes {', '.join(here)} here"])
    lines = align_columns(facts)

    lines += ["", "Every field, as --set takes it; * differs from the default, which follows"]
    default = Recipe(name="")
    changed = _changed(recipe, default)
    table = []
    for name in setting_names():
        setting = f"{name}={setting_of(recipe, name)}"
        if name in changed:
            table.append([f"* {setting}", setting_of(default, name) or "(empty)"])
        else:
            table.append([f"  {setting}"])
    lines += align_columns(table)
    return [*lines, "", *_lr_chart(recipe), "", *_size_chart(recipe)]


def _middles(epochs: int) -> list[float]:
    """Return the epoch in the middle of each column."""
    return [(column + 0.5) * epochs / WIDTH for column in range(WIDTH)]


def _lr_chart(recipe: Recipe) -> list[str]:
    """Return the course of the learning rate as lines of text.

    The scale is linear, but logarithmic for a schedule in steps, which look equal only there.
    """
    logarithmic = recipe.schedule.kind == "step"
    rates = [lr_at(recipe, epoch) for epoch in _middles(recipe.schedule.epochs)]
    if logarithmic:
        heights = [math.log10(rate) for rate in rates]
        top = math.log10(recipe.peak_lr)
        bottom = float(math.floor(min(heights) + 1e-9))
    else:
        heights = rates
        top = recipe.peak_lr
        bottom = 0.0
    span = max(top - bottom, 1e-9)
    marked = _curve([round((height - bottom) / span * (HEIGHT - 1)) for height in heights])

    lines = ["learning rate, logarithmic" if logarithmic else "learning rate"]
    for row in reversed(range(HEIGHT)):
        label = ""
        if row % (HEIGHT // 2) == 0:
            value = bottom + span * row / (HEIGHT - 1)
            rate = 10**value if logarithmic else value
            label = f"{rate:.3g}"
        line = "".join("*" if (column, row) in marked else " " for column in range(WIDTH))
        lines.append(f"{label:>{LABEL}} |{line.rstrip()}")
    return lines + _axis(recipe.schedule.epochs)


def _curve(rows: list[int]) -> set[tuple[int, int]]:
    """Return the places (column, row) of a curve that is at `rows[column]`, without gaps."""
    marked = set()
    before = rows[0]
    for column, row in enumerate(rows):
        marked.add((column, row))
        # A jump is drawn as a vertical line, from the next row after the one before.
        step = 1 if row > before else -1
        for between in range(before + step, row, step):
            marked.add((column, between))
        before = row
    return marked


def _size_chart(recipe: Recipe) -> list[str]:
    """Return the course of the resolution as lines of text."""
    epochs = recipe.schedule.epochs
    if len({image_side(recipe.data, epoch, epochs) for epoch in range(epochs)}) == 1:
        return [f"resolution  {recipe.data.size} px throughout"]
    sides = [image_side(recipe.data, int(epoch), epochs) for epoch in _middles(epochs)]
    lines = ["resolution, px"]
    for side in sorted(set(sides), reverse=True):
        line = "".join("*" if each == side else " " for each in sides)
        lines.append(f"{side:{LABEL}d} |{line.rstrip()}")
    return lines + _axis(epochs)


def _axis(epochs: int) -> list[str]:
    """Return an axis with labelled ticks from 0 to `epochs`, and its labels."""
    line = ["-"] * (WIDTH + 1)
    labels = [" "] * (LABEL + WIDTH + 12)
    last = TICKS - 1
    for tick in range(TICKS):
        column = tick * WIDTH // last
        line[column] = "+"
        number = f"{tick * epochs / last:g}"
        text = f"{number} epochs" if tick == last else number
        # The number's middle stands below its tick.
        start = LABEL + 1 + column - (len(number) - 1) // 2
        labels[start : start + len(text)] = text
    return [" " * (LABEL + 1) + "".join(line), "".join(labels).rstrip()]
