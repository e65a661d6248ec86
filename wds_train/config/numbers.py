"""Numbers as people write them on the command line: their ranges, in messages and in --help.

The commands give a `Number` to argparse as the type of an argument.
"""

import argparse
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Number:
    """The type of an argument: a number within a range.

    Attributes:
        kind: int or float.
        least: The lower bound.
        most: The upper bound.
        open: The bounds that are no values themselves: "(" the lower one, ")" the upper one.
    """

    kind: type[int] | type[float]
    least: float = -math.inf
    most: float = math.inf
    open: str = ""

    def __call__(self, text: str) -> int | float:
        """Return the number that a flag's value says, as argparse asks for it."""
        try:
            return self.parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {self}") from None

    def parse(self, text: str) -> int | float:
        """Return the number that `text` says.

        Raises:
            ValueError: It is not a number, or one out of range.
        """
        value = self.kind(text)
        # Of NaN, every comparison is false.
        low = value >= self.least
        if "(" in self.open:
            low = value > self.least
        high = value <= self.most
        if ")" in self.open:
            high = value < self.most
        if not (low and high) or abs(value) == math.inf:
            raise ValueError(text)
        return value

    def __str__(self) -> str:
        """Return the range in words."""
        if self.kind is int and not math.isinf(self.most):
            return f"a whole number from {self.least:g} to {self.most:g}"

        # The bounds that there are.
        bounds = []
        if not math.isinf(self.least):
            word = "at least"
            if "(" in self.open:
                word = "more than"
            bounds.append(f"{word} {self.least:g}")
        if not math.isinf(self.most):
            word = "at most"
            if ")" in self.open:
                word = "less than"
            bounds.append(f"{word} {self.most:g}")

        noun = "a number"
        if self.kind is int:
            noun = "a whole number"
        if not bounds:
            return noun
        return f"{noun} of {' and '.join(bounds)}"


def with_range(options: dict[str, Any]) -> dict[str, Any]:
    """Add the range of a number to the help of an argument.

    Args:
        options: The keywords for `add_argument`.

    Returns:
        The keywords to use: those of an argument that is not a `Number` stay as they are.
    """
    kind = options.get("type")
    if not isinstance(kind, Number):
        return options
    return options | {"help": f"{options.get('help', '')} [{kind}]".strip()}


# Ranges that several commands use.
count = Number(int, 0)
positive = Number(int, 1)
whole = Number(int)
above_zero = Number(float, 0, open="(")
