"""Figures and times in words, for the report, `status` and the end of a training.

An unknown figure is a dash.
"""

import time

from wds_train.checkpoint.goodput import Parts

UNKNOWN = "–"
# Names of the parts of the paid time, in the order of `Parts`.
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
SMALLEST = 0.01  # share: a smaller one would be shown as 0 % or 1 %


def count(number: int, what: str) -> str:
    """Return a number of things: "1 run", "2 runs"."""
    if number == 1:
        return f"1 {what}"
    return f"{number:,} {what}s"


def percent(value: float | None) -> str:
    """Return a value in percent, with two digits."""
    if value is None:
        return UNKNOWN
    return f"{value:.2f} %"


def number(value: float | None) -> str:
    """Return a number with four digits."""
    if value is None:
        return UNKNOWN
    return f"{value:.4g}"


def dollars(value: float | None) -> str:
    """Return an amount of dollars, to the cent."""
    if value is None:
        return UNKNOWN
    return f"${value:,.2f}"


def at_least(images: int) -> str:
    """Return the number of images that were trained twice: "≥ 1,024", or "0".

    The metrics may not tell of all of them. None at all is exact.
    """
    if not images:
        return "0"
    return f"≥ {images:,}"


def date(unix: float | None) -> str:
    """Return a time in UTC, to the minute."""
    if unix is None:
        return UNKNOWN
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(unix))
    # Of a wrong clock, or of a damaged file.
    except (OverflowError, ValueError, OSError):
        return UNKNOWN


def span(seconds: float) -> str:
    """Return a duration as people say it: 41 s, 12 min, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    # Rounded before it is split: 59.6 minutes are an hour, not 60 minutes.
    hours, minutes = divmod(round(seconds / 60), 60)
    if not hours:
        return f"{minutes} min"
    if not minutes:
        return f"{hours} h"
    return f"{hours} h {minutes} min"


def share(part: float) -> str:
    """Return a share in whole percent."""
    if 0 < part < SMALLEST:
        return "<1 %"
    return f"{100 * part:.0f} %"


def headline(parts: Parts) -> str:
    """Return the goodput; "at least" if a part of the time was not recorded."""
    if parts.goodput is None:
        return "not recorded"
    if parts.not_recorded:
        return f"at least {share(parts.goodput)}"
    return share(parts.goodput)


def describe_goodput(parts: Parts) -> str:
    """Return the goodput and where the rest of the paid time went, in one line."""
    paid = f"{span(parts.paid)} paid"
    if parts.goodput is None:
        if not parts.paid:
            return "nothing is paid yet"
        return f"not recorded, of {paid}"

    # The causes of what is missing to 100 %.
    causes = []
    for name, part in parts.shares().items():
        if part and name != "steps":
            causes.append(f"{NAMES[name]} {share(part)}")
    if not causes:
        return f"{headline(parts)} of {paid}"
    return f"{headline(parts)}: of {paid}, {', '.join(causes)}"
