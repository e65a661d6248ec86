"""A report's charts, each as an SVG for the page and a PNG for elsewhere.

The page's style sheet sets the colours of the SVG, so that it is light or dark with the page.
The colours are those of Okabe and Ito, which colour-blind people can tell apart. Lines also differ
in their dashes.

matplotlib is imported when the first chart is drawn: it takes a second.
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
# Blue, vermilion, green, purple, and a darker yellow: theirs cannot be read on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00")
DASHES = ("-", "--", "-.", ":")  # of lines
HATCHES = ("", "///")  # of bars
# Variables of the style sheet, which gives them other colours on a dark page.
VARIABLES = {
    INK: "--ink",
    GRID: "--grid",
    "#0072b2": "--c0",
    "#d55e00": "--c1",
    "#009e73": "--c2",
    "#cc79a7": "--c3",
    "#8a6d00": "--c4",
}
# Colours of an attempt's bar, by its end. "stopped" is ink.
END_COLOURS = {
    "running": "#0072b2",
    "lost": "#d55e00",
    "done": "#009e73",
    "failed": "#cc79a7",
    "interrupted": "#8a6d00",
}
# Inches: small, so that the text can be read on a phone.
WIDTH = 4.6
HEIGHT = 2.9
DPI = 150  # of the PNG
POINTS = 600  # of a line: more than its pixels, and the page stays small
MARKED = 40  # points: below so many each has a dot, and a single one is seen as well
LABELLED = 12  # bars: the names of more would overlap
LONG = 7200  # seconds: from here on an axis is in hours
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
    """A line of a chart.

    Attributes:
        label: Its name in the legend.
        points: Its points, (x, y).
        faint: Draw it thin: it has many points, and another line is their mean.
    """

    label: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: The name of its file, without a suffix.
        title: Its title.
        text: Describes it for people who cannot see it.
        svg: The picture in the page.
        png: The picture as a file.
    """

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
    shown = []
    for number, line in enumerate(lines):
        if line.points:
            shown.append((number, line))
    if not shown:
        return None

    def draw(axes: Any) -> None:
        heights: list[float] = []
        for number, line in shown:
            _draw_line(axes, line, COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)])
            heights += _values(line)

        # Axes begin at 0, so that two charts can be compared at a glance.
        axes.set_xlabel(xlabel)
        axes.set_xlim(left=0)
        if zero:
            axes.set_ylim(0, 1.08 * max(heights) or 1)
        if len(shown) > 1:
            axes.legend()

    # The chart in words.
    ends = []
    for _, line in shown:
        values = _values(line)
        ends.append(f"{line.label or 'it'} goes from {values[0]:.4g} to {values[-1]:.4g}")
    return _chart(name, title, f"{title} by {xlabel}: {'; '.join(ends)}.", draw)


def _values(line: Line) -> list[float]:
    return [value for _, value in line.points]


def _draw_line(axes: Any, line: Line, colour: str, dash: str) -> None:
    # Every nth point, and always the last one, which is the result.
    points = line.points[:: -(-len(line.points) // POINTS)]
    if points[-1] != line.points[-1]:
        points = [*points, line.points[-1]]
    # Few points are marked, so that each can be seen.
    marker = ""
    if len(points) < MARKED and not line.faint:
        marker = "."
    style = {"linewidth": 1.5}
    if line.faint:
        style = {"alpha": 0.8, "linewidth": 0.8}
    axes.plot(
        *zip(*points, strict=True),
        label=line.label,
        color=colour,
        linestyle=dash,
        marker=marker,
        **style,
    )


def timeline_chart(spans: Sequence[tuple[str, float, float, str]], text: str) -> Chart:
    """Draw attempts as bars, one below the other.

    Args:
        spans: Name, begin and end in seconds, and how it ended.
        text: Describes the chart.
    """
    whole = max(1.0, spans[-1][2] - spans[0][1])  # clocks may disagree
    unit = "minutes"
    seconds = 60
    if whole > LONG:
        unit = "hours"
        seconds = 3600

    def draw(axes: Any) -> None:
        # One entry of the legend for each kind of end, at its first bar.
        legend = set()
        for number, (_, begin, end, ended) in enumerate(spans):
            label = ""
            if ended not in legend:
                label = ended
                legend.add(ended)
            width = max(end - begin, whole / 200)  # a short one is seen as well
            axes.barh(
                number,
                width / seconds,
                left=begin / seconds,
                color=END_COLOURS.get(ended, INK),
                label=label,
                height=0.6,
            )
        if len(spans) <= LABELLED:
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
    # Every colour plain, and then every colour hatched.
    looks = []
    for hatch in HATCHES:
        for colour in COLOURS:
            looks.append((colour, hatch))
    whole = sum(share for _, share in parts)

    def draw(axes: Any) -> None:
        begin = 0.0
        # Not strict: there are more looks than parts.
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
    """Draw accuracy over confidence, with the line on which they are equal.

    Args:
        bins: Confidence and accuracy of groups of predictions, in percent.
        text: Describes the chart.
    """

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
    """Make a chart of what `draw` draws on the axes of matplotlib that it gets."""
    figure = new_figure(WIDTH, HEIGHT)
    from matplotlib import rc_context

    svg = io.StringIO()
    png = io.BytesIO()
    # Equal charts give equal bytes: without a date, and with ids that follow from the name.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context(STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        # A letter that the font lacks, or a line of a single point, needs no warning.
        warnings.simplefilter("ignore")
        draw(figure.subplots())
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
        figure.savefig(png, format="png", dpi=DPI)
    return Chart(name, title, text, _inline(svg.getvalue(), name), png.getvalue())


def _inline(svg: str, name: str) -> Markup:
    """Return an SVG as a part of a page: without a file's head, unused ids, and fixed colours."""
    # Ids that count elements would occur again in the next chart.
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])
    svg = re.sub(
        r"<style type.*?</style>|<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL
    )
    # The page's style sheet has the colours.
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-labelledby="{name}-text" ', 1))
