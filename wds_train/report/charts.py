"""A report's charts, each as an SVG for the page and a PNG for elsewhere.

The page's style sheet sets the colours of the SVG, so that it is light or dark with the page.
The colours are those of Okabe and Ito, which colour-blind people can tell apart. Lines also differ
in their dashes.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from wds_train.tracking.schedule_plot import new_figure

INK = "#1f2328"
GRID = "#c9d1d9"
# Blue, vermilion, green, purple, and a darker yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00")
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "///")  # of bars
# In the style sheet these are other colours on a dark page.
VARIABLES = {INK: "--ink", GRID: "--grid"} | {
    colour: f"--c{number}" for number, colour in enumerate(COLOURS)
}
WIDTH = 4.6  # inches: small, so that the text can be read on a phone
HEIGHT = 2.9  # inches
DPI = 150
POINTS = 600  # of a line
# Texts stay texts, and class or host names are no formulas.
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Line:
    label: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart. `text` describes it for people who cannot see it."""

    name: str
    title: str
    text: str
    svg: Markup
    png: bytes


def line_chart(
    name: str, title: str, lines: Sequence[Line], *, xlabel: str = "epoch", zero: bool = False
) -> Chart | None:
    """Draw lines.

    Args:
        name: The file's name, without its suffix.
        title: What the vertical axis shows.
        lines: Those without points are left out.
        xlabel: What the horizontal axis shows.
        zero: Begin the vertical axis at 0.

    Returns:
        The chart; None if no line has points.
    """
    shown = [(number, line) for number, line in enumerate(lines) if line.points]
    if not shown:
        return None

    def draw(axes: Any) -> None:
        for number, line in shown:
            style = {"alpha": 0.8, "linewidth": 0.8} if line.faint else {"linewidth": 1.5}
            points = line.points[:: -(-len(line.points) // POINTS)]
            if points[-1] != line.points[-1]:
                points = [*points, line.points[-1]]
            axes.plot(
                *zip(*points, strict=True),
                label=line.label,
                color=COLOURS[number % len(COLOURS)],
                linestyle=DASHES[number % len(DASHES)],
                marker="." if len(points) < 40 and not line.faint else "",
                **style,
            )
        axes.set_xlabel(xlabel)
        axes.set_xlim(left=0)
        if zero:
            highest = max(max(value for _, value in line.points) for _, line in shown)
            axes.set_ylim(0, 1.08 * highest or 1)
        if len(shown) > 1:
            axes.legend()

    ends = [
        f"{line.label or 'it'} goes from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}"
        for _, line in shown
    ]
    return _chart(name, title, f"{title} by {xlabel}: {'; '.join(ends)}.", draw)


def timeline_chart(spans: Sequence[tuple[str, float, float, str]], text: str) -> Chart:
    """Draw attempts as bars, one below the other.

    Args:
        spans: Name, begin and end in seconds, and how it ended.
        text: Describes the chart.
    """
    whole = max(1.0, spans[-1][2] - spans[0][1])  # clocks may disagree
    unit, seconds = ("hours", 3600) if whole > 7200 else ("minutes", 60)
    colours = dict(
        zip(("running", "lost", "done", "failed", "interrupted"), COLOURS, strict=True)
    )  # "stopped" is ink

    def draw(axes: Any) -> None:
        seen = []
        for number, (_, begin, end, ended) in enumerate(spans):
            label = "" if ended in seen else ended
            seen.append(ended)
            width = max(end - begin, whole / 200)  # a short one is seen as well
            axes.barh(
                number,
                width / seconds,
                left=begin / seconds,
                color=colours.get(ended, INK),
                label=label,
                height=0.6,
            )
        if len(spans) <= 12:
            axes.set_yticks(range(len(spans)), [name for name, *_ in spans])
        else:
            axes.set_yticks([])
        axes.set_ylim(max(len(spans), 4) - 0.5, -0.5)  # a lone attempt would fill the picture
        axes.set_xlabel(f"{unit} since the first of them began")
        axes.grid(axis="y", visible=False)
        axes.legend(title="ended as", loc="best")

    return _chart("attempts", "attempts over time", text, draw)


def stacked_chart(name: str, title: str, parts: Sequence[tuple[str, float]], text: str) -> Chart:
    """Draw one bar of several parts, in percent.

    Neighbours differ in hatching and colour. A name keeps its look, whichever parts there are.

    Args:
        name: The file's name, without its suffix.
        title: The chart's title.
        parts: Names and shares of 1. Parts of 0 are left out.
        text: Describes the chart.
    """
    looks = [(colour, hatch) for hatch in HATCHES for colour in COLOURS]
    whole = sum(share for _, share in parts)

    def draw(axes: Any) -> None:
        begin = 0.0
        for (label, share), (colour, hatch) in zip(parts, looks, strict=False):
            if not share:
                continue
            percent = 100 * share
            axes.barh(
                0,
                percent,
                left=begin,
                height=0.9,
                color=colour,
                hatch=hatch,
                edgecolor=INK,
                linewidth=0.4,
                label=f"{label} {percent:.1f} %",
            )
            begin += percent
        axes.set_xlim(0, 100 * whole)
        axes.set_ylim(-0.5, 0.5)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.set_xlabel("% of the paid time")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return _chart(name, title, text, draw)


def calibration_chart(bins: Sequence[tuple[float, float]], text: str) -> Chart:
    """Draw accuracy over confidence, both in percent, with the line on which they are equal."""

    def draw(axes: Any) -> None:
        axes.plot(
            [0, 100], [0, 100], color=INK, linestyle="--", linewidth=1, label="as sure as right"
        )
        axes.plot(
            *zip(*bins, strict=True), color=COLOURS[0], marker="o", markersize=4, label="this model"
        )
        axes.set(xlim=(0, 100), ylim=(0, 102), xlabel="confidence, %", ylabel="accuracy, %")
        axes.legend()

    return _chart("calibration", "calibration", text, draw)


def _chart(name: str, title: str, text: str, draw: Callable[[Any], None]) -> Chart:
    figure = new_figure(WIDTH, HEIGHT)
    from matplotlib import rc_context

    svg = io.StringIO()
    png = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context(STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        # A letter that the font lacks, or a line of a single point, needs no warning.
        warnings.simplefilter("ignore")
        draw(figure.subplots())
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
        figure.savefig(png, format="png", dpi=DPI)
    return Chart(name, title, text, _inline(svg.getvalue(), name), png.getvalue())


def _inline(svg: str, name: str) -> Markup:
    """Return `svg` as a part of a page: without a file's head, unused ids, and fixed colours."""
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])
    svg = re.sub(
        r"<style type.*?</style>|<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL
    )
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-labelledby="{name}-text" ', 1))
