"""Figures and times in words. An unknown figure is a dash."""

import time

from wds_train.checkpoint.goodput import Parts

UNKNOWN = "–"
# Names of the parts of the paid time.
NAMES = {
    "steps": "steps that count",
    "start": "start",
    "data": "data",
    "commit": "commit",
    "validation": "validation",
    "lost": "lost",
    "trained_twice": "trained twice",
    "not_recorded": "not recorded",
}
SMALLEST = 0.01  # share that is shown as a whole percentage


def count(number: int, what: str) -> str:
    """Return a number of things: "1 run", "2 runs"."""
    plural = "" if number == 1 else "s"
    return f"{number:,} {what}{plural}"


def percent(value: float | None) -> str:
    """Return a value in percent, with two digits."""
    return UNKNOWN if value is None else f"{value:.2f} %"


def number(value: float | None) -> str:
    """Return a number with four digits."""
    return UNKNOWN if value is None else f"{value:.4g}"


def dollars(value: float | None) -> str:
    """Return an amount of dollars, to the cent."""
    return UNKNOWN if value is None else f"${value:,.2f}"


def date(unix: float | None) -> str:
    """Return a time in UTC, to the minute."""
    if unix is None:
        return UNKNOWN
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(unix))
    except (OverflowError, ValueError, OSError):  # a wrong clock, or a damaged file
        return UNKNOWN


def span(seconds: float) -> str:
    """Return a duration as people say it: 41 s, 12 min, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def share(part: float) -> str:
    """Return a share in whole percent."""
    return "<1 %" if 0 < part < SMALLEST else f"{100 * part:.0f} %"


def headline(parts: Parts) -> str:
    """Return the goodput; "at least" if a part of the time was not recorded."""
    if parts.goodput is None:
        return "not recorded"
    least = "at least " if parts.not_recorded else ""
    return f"{least}{share(parts.goodput)}"


def describe_goodput(parts: Parts) -> str:
    """Return the goodput and where the rest of the paid time went, in one line."""
    paid = f"{span(parts.paid)} paid"
    if parts.goodput is None:
        return f"not recorded, of {paid}" if parts.paid else "nothing is paid yet"
    causes = []
    for name, part in parts.shares().items():
        if part and name != "steps":
            causes.append(f"{NAMES[name]} {share(part)}")
    if not causes:
        return f"{headline(parts)} of {paid}"
    return f"{headline(parts)}: of {paid}, {', '.join(causes)}"
