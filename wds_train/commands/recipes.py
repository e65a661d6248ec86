"""`wds-train recipes`: the presets at a glance; one in full, with the course of its learning rate and resolution."""

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
from wds_train.errors import UsageError

WIDTH, HEIGHT = 64, 9  # of a chart, without its labels
LABEL = 10  # columns left of a chart
NOTE = "(p) published in the named source, (i) inferred, (m) measured by this project"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one in full")
    parser.add_argument(
        "--set", action="append", default=[], metavar="K=V", dest="settings", help="with one field changed"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw learning rate and resolution")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    if args.name is None:
        if args.settings or args.png:
            raise UsageError(f"--set and --png need the NAME of a recipe; there are {', '.join(PRESETS)}")
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
    """A line for each preset, without what `expected` says beside the first number."""
    cells = [[*map(str, row.values())] for row in rows]
    cells = [[*rows[0]], *([*line[:-1], line[-1].split(";")[0]] for line in cells)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return [*lines, "", f"{NOTE}; `wds-train recipes NAME` prints one in full"]


def _full(found: Preset, recipe: Recipe) -> dict[str, Any]:
    epochs = recipe.schedule.epochs
    return {
        "name": recipe.name,
        "source": found.source,
        "expected": found.expected,
        "hours": found.hours,
        "recipe": recipe.to_dict(),
        "changed": _changed(recipe, Recipe(name="")),
        "schedule": [
            {"epoch": epoch, "lr": lr_at(recipe, epoch), "size": image_side(recipe.data, epoch, epochs)}
            for epoch in range(epochs)
        ],
    }


def _changed(recipe: Recipe, before: Recipe) -> list[str]:
    return [name for name in setting_names() if attrgetter(name)(recipe) != attrgetter(name)(before)]


def _lines(found: Preset, recipe: Recipe) -> list[str]:
    lines = [
        f"recipe    {recipe.name}",
        f"source    {found.source}",
        f"expected  {found.expected}",
        f"hours     {found.hours}",
        f"          {NOTE}",
    ]
    if here := _changed(recipe, found.recipe):
        lines.append(f"          but --set changes {', '.join(here)} here")
    lines += ["", "Every field, as --set takes it; * differs from the default, which follows"]
    settings, default = {name: f"{name}={setting_of(recipe, name)}" for name in setting_names()}, Recipe(name="")
    width, changed = max(map(len, settings.values())), _changed(recipe, default)
    for name, setting in settings.items():
        mark = f"* {setting.ljust(width)}  {setting_of(default, name) or '(empty)'}"
        lines.append(mark if name in changed else f"  {setting}")
    return [*lines, "", *_lr_chart(recipe), "", *_size_chart(recipe)]


def _middles(epochs: int) -> list[float]:
    """The epoch in the middle of each column."""
    return [(column + 0.5) * epochs / WIDTH for column in range(WIDTH)]


def _lr_chart(recipe: Recipe) -> list[str]:
    """The course of the learning rate as lines of text: linear, but logarithmic for steps, which look equal only there."""
    logarithmic = recipe.schedule.kind == "step"
    rates = [lr_at(recipe, epoch) for epoch in _middles(recipe.schedule.epochs)]
    heights = [math.log10(rate) if logarithmic else rate for rate in rates]
    top = math.log10(recipe.peak_lr) if logarithmic else recipe.peak_lr
    bottom = math.floor(min(heights) + 1e-9) if logarithmic else 0.0
    span = max(top - bottom, 1e-9)
    rows = [round((height - bottom) / span * (HEIGHT - 1)) for height in heights]
    marked = {
        (column, row)
        for column, (row, before) in enumerate(zip(rows, [rows[0], *rows], strict=False))
        for row in range(min(row, before + (before < row)), max(row, before - (before > row)) + 1)
    }
    lines = ["learning rate, logarithmic" if logarithmic else "learning rate"]
    for row in reversed(range(HEIGHT)):
        value = bottom + span * row / (HEIGHT - 1)
        label = f"{10**value if logarithmic else value:.3g}" if row % (HEIGHT // 2) == 0 else ""
        lines.append(
            label.rjust(LABEL) + " |" + "".join("*" if (c, row) in marked else " " for c in range(WIDTH)).rstrip()
        )
    return lines + _axis(recipe.schedule.epochs)


def _size_chart(recipe: Recipe) -> list[str]:
    epochs = recipe.schedule.epochs
    if len({image_side(recipe.data, epoch, epochs) for epoch in range(epochs)}) == 1:
        return [f"resolution  {recipe.data.size} px throughout"]
    sides = [image_side(recipe.data, int(epoch), epochs) for epoch in _middles(epochs)]
    rows = [
        f"{side:{LABEL}d} |" + "".join("*" if each == side else " " for each in sides).rstrip()
        for side in sorted(set(sides), reverse=True)
    ]
    return ["resolution, px", *rows, *_axis(epochs)]


def _axis(epochs: int) -> list[str]:
    """An axis with five labelled ticks from 0 to `epochs`."""
    line, labels = ["-"] * (WIDTH + 1), [" "] * (LABEL + WIDTH + 12)
    for quarter in range(5):
        at = quarter * WIDTH // 4
        line[at] = "+"
        text = f"{quarter * epochs / 4:g}" + (" epochs" if quarter == 4 else "")
        start = LABEL + 1 + at - (len(text.split(maxsplit=1)[0]) - 1) // 2
        labels[start : start + len(text)] = text
    return [" " * (LABEL + 1) + "".join(line), "".join(labels).rstrip()]
