"""Goodput, told: the share of the paid time that became steps that count, and where the rest went."""

from wds_train.checkpoint.goodput import Parts

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
"""What people call the parts of the paid time."""
SMALLEST = 0.01  # share that is told as a whole percentage


def headline(parts: Parts) -> str:
    """The goodput alone: at least so much where a part of the time was not recorded."""
    if parts.goodput is None:
        return "not recorded"
    least = "at least " if parts.not_recorded else ""
    return f"{least}{share(parts.goodput)}"


def told(parts: Parts) -> str:
    """The goodput and where the rest of the paid time went, in one line."""
    paid = f"{span(parts.paid)} paid"
    if parts.goodput is None:
        return f"not recorded, of {paid}" if parts.paid else "nothing is paid yet"
    rest = {name: part for name, part in parts.shares().items() if part and name != "steps"}
    causes = ", ".join(f"{NAMES[name]} {share(part)}" for name, part in rest.items())
    return f"{headline(parts)}: of {paid}, {causes}" if causes else f"{headline(parts)} of {paid}"


def share(part: float) -> str:
    """A share in whole percent."""
    return "<1 %" if 0 < part < SMALLEST else f"{100 * part:.0f} %"


def span(seconds: float) -> str:
    """A time as people say it: 41 s, 12 min, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
