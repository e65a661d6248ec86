"""Numbers as people write them on the command line: their ranges, in messages and in --help."""

import argparse
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Number:
    """The type of an argument: a number of at least `least` and at most `most`, or above and below
    them where they are `open`.
    """

    kind: type[int] | type[float]
    least: float = -math.inf
    most: float = math.inf
    open: str = ""
    """Which bounds are no values themselves: "(" the lower one, ")" the upper one."""

    def __call__(self, text: str) -> int | float:
        """Return the number that a flag's value says, as argparse asks for it."""
        try:
            return self.parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {self}") from None

    def parse(self, text: str) -> int | float:
        """Return the number that `text` says.

        Raises:
            ValueError: It says none, or one out of range.
        """
        value = self.kind(text)
        low = value > self.least if "(" in self.open else value >= self.least
        high = value < self.most if ")" in self.open else value <= self.most
        if not (low and high) or abs(value) == math.inf:  # of NaN, both are false
            raise ValueError(text)
        return value

    def __str__(self) -> str:
        """Return the range in words."""
        if self.kind is int and not math.isinf(self.most):
            return f"a whole number from {self.least:g} to {self.most:g}"
        low = f"{'more than' if '(' in self.open else 'at least'} {self.least:g}"
        high = f"{'less than' if ')' in self.open else 'at most'} {self.most:g}"
        bounds = [
            text for text, bound in ((low, self.least), (high, self.most)) if not math.isinf(bound)
        ]
        noun = "a whole number" if self.kind is int else "a number"
        return f"{noun}{' of ' * bool(bounds)}{' and '.join(bounds)}"


def with_range(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an argument, whose help says the range of a number."""
    kind = options.get("type")
    if not isinstance(kind, Number):
        return options
    return options | {"help": f"{options.get('help', '')} [{kind}]".strip()}


count = Number(int, 0)
positive = Number(int, 1)
whole = Number(int)
above_zero = Number(float, 0, open="(")
