"""What became of a run, in figures: its attempts and what interruptions cost, dollars, and whether what was trained twice came
out the same. Pure.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.config.presets import PRESETS
from wds_train.config.recipe import Recipe
from wds_train.config.settings import setting_names, setting_of
from wds_train.report.formatting import count
from wds_train.report.run_data import Account, Row
from wds_train.tracking.metrics import repeatable

FIGURES = re.compile(r"~?\d[\d., -]*%")  # that a preset's expectation begins with
IMAGENET = 1000  # classes; the recipes whose source names one figure have it from there


@dataclass(frozen=True)
class Attempt:
    """One instance's time on a run; `number` is its fence. When another followed: `down` seconds passed until then, and `again`
    of the next one's until the run was as far as ever; `twice` images were trained again, at least. None: that was not recorded.
    """

    number: int
    place: str
    started: float
    seconds: float
    ended: str
    price: float | None
    down: float = 0.0
    again: float | None = None
    twice: int | None = None

    @property
    def dollars(self) -> float | None:
        return None if self.price is None else self.seconds / 3600 * self.price

    @property
    def lost(self) -> float:
        """Seconds that the interruption took."""
        return self.down + (self.again or 0.0)


def attempts_of(account: Account, price: float | None) -> list[Attempt]:
    """The attempts that the manifest lists one by one; each at its own price, unless `price` is given."""
    manifest, batch = account.manifest, account.manifest.recipe.get("batch")
    listed = [asdict(attempt) for attempt in manifest.attempts]
    told = []
    for number, (this, after) in enumerate(
        itertools.zip_longest(listed, listed[1:]), start=manifest.earlier.attempts + 1
    ):
        attempt = Attempt(
            number,
            " ".join(filter(None, (this["host"], this["instance"], this["hardware"]))),
            this["started"],
            this["seconds"],
            this["ended"],
            this["price"] if price is None else price,
            *_interruption(account, number, this, after, batch),
        )
        told.append(attempt)
    return told


def _interruption(
    account: Account, number: int, this: dict[str, Any], after: dict[str, Any] | None, batch: Any
) -> tuple[float, float | None, int | None]:
    """`down`, `again` and `twice` of the attempt, whose successor is `after`."""
    if after is None:
        return 0.0, None, None
    down = max(0.0, after["started"] - this["started"] - this["seconds"])
    steps: dict[int, float] = {}  # the furthest of each attempt's that were lost
    for row in account.replayed:
        if (attempt := row.get("time/attempt", math.inf)) <= number:
            steps[attempt] = max(row["step"], steps.get(attempt, 0))
    begin, furthest = after["step"], max(steps.values(), default=0)
    again = _again(account, number + 1, after, furthest) if furthest > begin else None
    if this["ended"] == "interrupted":  # all its steps were committed
        return down, again, 0
    known = number in steps and isinstance(batch, int)
    return down, again, max(0, int(steps[number]) - int(begin)) * batch if known else None


def _again(account: Account, number: int, attempt: dict[str, Any], furthest: float) -> float:
    """Seconds that an attempt took to be as far as `furthest`; all of its own where it never was."""
    times = [
        row["time/unix"]
        for row in (*account.steps, *account.epochs, *account.replayed)
        if "time/unix" in row and row.get("time/attempt") == number and row["step"] >= furthest
    ]
    return min(max(0.0, min(times) - attempt["started"]), attempt["seconds"]) if times else attempt["seconds"]


@dataclass(frozen=True)
class Cost:
    """Dollars that the run took, None where no price is known; what the hours without the repeated ones take on demand."""

    hours: float
    dollars: float | None
    on_demand: float | None
    unpriced: int
    """Attempts whose price is not known, and which `dollars` leaves out."""


def cost_of(manifest: RunManifest, attempts: list[Attempt], price: float | None, on_demand: float | None) -> Cost:
    seconds = manifest.totals().seconds
    known = [attempt.dollars for attempt in attempts if attempt.dollars is not None]
    dollars = sum(known) if known else None
    unpriced = manifest.earlier.attempts + len(attempts) - len(known)
    if price is not None:
        dollars, unpriced = seconds / 3600 * price, 0
    needed = seconds - sum(attempt.again or 0.0 for attempt in attempts)
    return Cost(seconds / 3600, dollars, None if on_demand is None else needed / 3600 * on_demand, unpriced)


@dataclass(frozen=True)
class Audit:
    """Rows that a dead attempt had logged, beside those of the same steps that were logged when they were trained again.
    `waiting` rows have no counterpart yet.
    """

    compared: int
    first: int
    last: int
    waiting: int
    differences: list[tuple[int, str, str, str]]
    """Step, name, and both values."""

    @property
    def verdict(self) -> str:
        if not self.compared:
            return "Nothing was trained twice, so far as the metrics on S3 show."
        what = f"{self.compared} replayed records, of steps {self.first} to {self.last}"
        if not self.differences:
            return f"{what}: equal to the last bit."
        return f"{what}: not equal; {count(len(self.differences), 'value')} of them, first at step {self.differences[0][0]}."


def audit_of(account: Account) -> Audit:
    again = {_place(row): repeatable(row) for row in account.history if "step" in row}
    rows = account.replayed
    pairs = [(repeatable(row), again[_place(row)]) for row in rows if _place(row) in again]
    steps = [int(before["step"]) for before, _ in pairs]
    differences = [each for before, after in pairs for each in _differences(before, after)]
    return Audit(len(pairs), min(steps, default=0), max(steps, default=0), len(rows) - len(pairs), sorted(differences))


def _place(row: Row) -> tuple[Any, bool]:
    """A step may have two rows: its own, and that of the validation after it."""
    return row["step"], "val/top1" in row


def _differences(before: Row, after: Row) -> Iterator[tuple[int, str, str, str]]:
    for name in sorted(before.keys() | after.keys()):
        first, again = (json.dumps(row.get(name)) for row in (before, after))  # as text, in which NaN equals NaN
        if first != again:
            yield int(before["step"]), name, first, again


def milestones(epochs: list[Row], most: int = 16) -> list[Row]:
    """At most `most` validations, evenly taken: the first, the last, and those of the best raw and EMA top-1."""
    kept = {id(row) for row in epochs[:: max(1, -(-len(epochs) // max(1, most - 3)))]}
    if epochs:
        kept |= {id(max(epochs, key=lambda row: row.get(name, 0.0))) for name in ("val/top1", "val/top1_ema")}
        kept.add(id(epochs[-1]))
    return [row for row in epochs if id(row) in kept]


def changed(recipe: Recipe, before: Recipe) -> list[str]:
    """What to `--set` for `recipe`, beginning with `before`."""
    pairs = [(name, setting_of(recipe, name), setting_of(before, name)) for name in setting_names()]
    return [f"{name}={value}" for name, value, other in pairs if value != other]


def expectation(account: Account) -> str:
    """What the recipe's source expects, and how far the run is from it where both are ImageNet's figures."""
    preset = PRESETS.get(str(account.manifest.recipe.get("name")))
    if preset is None or account.recipe is None:
        return "The recipe is none that this version knows an expectation for."
    text = f"The recipe {preset.recipe.name} expects: {preset.expected}. Source: {preset.source}."
    if settings := changed(account.recipe, preset.recipe):
        text += f" This run differs from it by {', '.join(settings)}."
    figure = re.match(r"(\d[\d.]*) %", preset.expected)
    if figure and account.last and account.manifest.dataset.get("classes") == IMAGENET:
        reached = max(account.last["val/top1"], account.last.get("val/top1_ema", 0.0))
        far = reached - float(figure[1])
        text += f" At epoch {account.last['epoch']:g} it is {abs(far):.2f} points {'below' if far < 0 else 'above'} it."
    return text
