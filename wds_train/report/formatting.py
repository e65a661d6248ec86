"""Figures as people read them; what is not known is a dash."""

import time


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} %"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def dollars(value: float | None) -> str:
    return "–" if value is None else f"${value:,.2f}"


def date(unix: float | None) -> str:
    """To the minute, in UTC."""
    try:
        return "–" if unix is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(unix))
    except (OverflowError, ValueError, OSError):  # of a clock, or a file, that is out of its mind
        return "–"
