"""A run in figures: attempts, interruptions, dollars, and an audit of repeated steps.

The report and the comparison of runs take their figures from here. All of it is pure.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from wds_train.checkpoint.run_manifest import Attempt as ListedAttempt
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.config.presets import PRESETS
from wds_train.config.recipe import Recipe
from wds_train.config.settings import setting_names, setting_of
from wds_train.report.formatting import count
from wds_train.report.run_data import Account, Row
from wds_train.tracking.metrics import repeatable

FIGURES = re.compile(r"~?\d[\d., -]*%")  # at the beginning of a preset's expectation
IMAGENET = 1000  # classes: a single figure in a recipe's source is of ImageNet


@dataclass(frozen=True)
class Attempt:
    """The time of one instance on a run.

    Attributes:
        number: Its fence.
        place: Its host, instance type and hardware.
        started: Seconds since the epoch.
        seconds: Its duration.
        ended: How it ended.
        price: Dollars an hour; None if nobody knows.
        down: Seconds until the next attempt began.
        again: Seconds of the next one until the run was as far as before, if known.
        twice: Images that were trained again, at least; None if that was not recorded.
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
        """The cost of the instance; None if its price is not known."""
        if self.price is None:
            return None
        return self.seconds / 3600 * self.price

    @property
    def lost(self) -> float:
        """The seconds that the interruption cost."""
        return self.down + (self.again or 0.0)


def list_attempts(account: Account, price: float | None) -> list[Attempt]:
    """Return the attempts that the manifest lists one by one.

    Args:
        account: What is known of the run.
        price: Dollars an hour. None: each attempt's own price.
    """
    manifest = account.manifest
    attempts = []
    # Each with its successor, of which the last one has none.
    pairs = itertools.zip_longest(manifest.attempts, manifest.attempts[1:])
    for number, (this, after) in enumerate(pairs, start=manifest.earlier.attempts + 1):
        paid = price
        if paid is None:
            paid = this.price
        down = 0.0
        again = None
        twice = None
        if after is not None:
            down = max(0.0, after.started - this.started - this.seconds)
            again, twice = _repeated(account, number, this, after)
        attempt = Attempt(
            number,
            place=_describe_machine(this),
            started=this.started,
            seconds=this.seconds,
            ended=this.ended,
            price=paid,
            down=down,
            again=again,
            twice=twice,
        )
        attempts.append(attempt)
    return attempts


def _describe_machine(attempt: ListedAttempt) -> str:
    """Return the host, the instance type and the hardware, as far as they are known."""
    words = []
    for word in (attempt.host, attempt.instance, attempt.hardware):
        if word:
            words.append(word)
    return " ".join(words)


def _repeated(
    account: Account, number: int, this: ListedAttempt, after: ListedAttempt
) -> tuple[float | None, int | None]:
    """Return the time and the images that the successor of an attempt had to repeat.

    Args:
        account: What is known of the run.
        number: The attempt's number.
        this: The attempt.
        after: Its successor.

    Returns:
        `Attempt.again`, in seconds, and `Attempt.twice`, in images.
    """
    # The last step of each attempt so far, among those that were trained again later.
    steps: dict[int, float] = {}
    for row in account.replayed:
        attempt = row.get("time/attempt", math.inf)
        if attempt <= number:
            steps[attempt] = max(row["step"], steps.get(attempt, 0))
    # The time until the run was as far as it had ever been.
    begin = after.step
    furthest = max(steps.values(), default=0)
    again = None
    if furthest > begin:
        again = _catch_up_seconds(account, number + 1, after, furthest)

    # The images of the steps that no checkpoint held.
    if this.ended == "interrupted":  # a spot notice or a signal left time to commit them all
        return again, 0
    batch = account.manifest.recipe.get("batch")
    if number not in steps or not isinstance(batch, int):
        return again, None
    repeated = max(0, int(steps[number]) - int(begin))
    return again, repeated * batch


def _catch_up_seconds(
    account: Account, number: int, attempt: ListedAttempt, furthest: float
) -> float:
    """Return the seconds of an attempt until `furthest`; all of them if it never came so far.

    Args:
        account: What is known of the run.
        number: The attempt's number.
        attempt: The attempt.
        furthest: The step that some earlier attempt reached.
    """
    # The times of all rows that show the run to have come so far.
    times = []
    for row in (*account.steps, *account.epochs, *account.replayed):
        is_its_own = "time/unix" in row and row.get("time/attempt") == number
        if is_its_own and row["step"] >= furthest:
            times.append(row["time/unix"])
    if not times:
        return attempt.seconds
    took = max(0.0, min(times) - attempt.started)  # clocks may disagree
    return min(took, attempt.seconds)


@dataclass(frozen=True)
class Cost:
    """The cost of a run.

    Attributes:
        hours: Hours of all attempts.
        dollars: What they cost; None if no price is known.
        on_demand: What the hours without the repeated ones would cost on demand.
        unpriced: Attempts of unknown price, which `dollars` leaves out.
    """

    hours: float
    dollars: float | None
    on_demand: float | None
    unpriced: int


def add_up_cost(
    manifest: RunManifest, attempts: list[Attempt], price: float | None, on_demand: float | None
) -> Cost:
    """Return the cost of a run.

    Args:
        manifest: The run's.
        attempts: As `list_attempts` returns them.
        price: Dollars an hour, of all attempts. None: each attempt's own.
        on_demand: Dollars an hour on demand, if known.
    """
    seconds = manifest.totals().seconds
    known = [attempt.dollars for attempt in attempts if attempt.dollars is not None]
    dollars = None
    if known:
        dollars = sum(known)
    unpriced = manifest.earlier.attempts + len(attempts) - len(known)
    # One price for all covers the earlier attempts, too, of which only the sum of hours is known.
    if price is not None:
        dollars = seconds / 3600 * price
        unpriced = 0

    # On demand nothing is interrupted, so that nothing is done again.
    on_demand_dollars = None
    if on_demand is not None:
        needed = seconds - sum(attempt.again or 0.0 for attempt in attempts)
        on_demand_dollars = needed / 3600 * on_demand
    return Cost(seconds / 3600, dollars, on_demand_dollars, unpriced)


@dataclass(frozen=True)
class Audit:
    """A comparison of repeated steps: rows of a dead attempt, and those of the same steps later.

    Attributes:
        compared: Pairs of rows.
        first: The first step that was compared.
        last: The last one.
        waiting: Rows whose step was not trained again yet.
        differences: Step, name, and both values.
    """

    compared: int
    first: int
    last: int
    waiting: int
    differences: list[tuple[int, str, str, str]]

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        if not self.compared:
            return "Nothing was trained twice, so far as the metrics on S3 show."
        what = f"{self.compared} replayed records, of steps {self.first} to {self.last}"
        if not self.differences:
            return f"{what}: equal to the last bit."
        differing = count(len(self.differences), "value")
        first_step = self.differences[0][0]
        return f"{what}: not equal; {differing} of them, first at step {first_step}."


def audit_replays(account: Account) -> Audit:
    """Compare the rows of steps that were trained again with the newer ones."""
    again = {}
    for row in account.history:
        if "step" in row:
            again[_place(row)] = repeatable(row)

    # A row whose step is not in the history again waits to be trained.
    steps = []
    differences: list[tuple[int, str, str, str]] = []
    for row in account.replayed:
        place = _place(row)
        if place in again:
            steps.append(int(row["step"]))
            differences += _differences(repeatable(row), again[place])
    return Audit(
        compared=len(steps),
        first=min(steps, default=0),
        last=max(steps, default=0),
        waiting=len(account.replayed) - len(steps),
        differences=sorted(differences),
    )


def _place(row: Row) -> tuple[Any, bool]:
    """Return the key of a row. A step may have two rows, its own and its validation's."""
    return row["step"], "val/top1" in row


def _differences(before: Row, after: Row) -> Iterator[tuple[int, str, str, str]]:
    for name in sorted(before.keys() | after.keys()):
        # As text, in which NaN equals NaN, and two floats that print alike are the same bits.
        first = json.dumps(before.get(name))
        again = json.dumps(after.get(name))
        if first != again:
            yield int(before["step"]), name, first, again


def choose_milestones(epochs: list[Row], most: int = 16) -> list[Row]:
    """Return some validations, evenly spaced.

    Among them are the first, the last, and those of the best raw and EMA top-1.

    Args:
        epochs: The rows of all validations.
        most: The largest number of rows.
    """
    if not epochs:
        return []
    # Three rows are left for the last and the two best. Rounded up.
    spacing = max(1, -(-len(epochs) // max(1, most - 3)))
    kept = {id(row) for row in epochs[::spacing]}
    kept.add(id(max(epochs, key=lambda row: row.get("val/top1", 0.0))))
    kept.add(id(max(epochs, key=lambda row: row.get("val/top1_ema", 0.0))))
    kept.add(id(epochs[-1]))
    return [row for row in epochs if id(row) in kept]


def list_changes(recipe: Recipe, before: Recipe) -> list[str]:
    """Return the `--set` arguments that make `before` into `recipe`."""
    # As texts, as a person would type them.
    settings = []
    for name in setting_names():
        value = setting_of(recipe, name)
        if value != setting_of(before, name):
            settings.append(f"{name}={value}")
    return settings


def describe_expectation(account: Account) -> str:
    """Return the accuracy that the recipe's source expects, and a run's distance from it.

    The distance is for runs on ImageNet alone.

    Args:
        account: What is known of the run.
    """
    # A recipe that was changed expects something else: the changes are listed.
    preset = PRESETS.get(str(account.manifest.recipe.get("name")))
    if preset is None or account.recipe is None:
        return "The recipe is none that this version knows an expectation for."
    text = f"The recipe {preset.recipe.name} expects: {preset.expected}. Source: {preset.source}."
    settings = list_changes(account.recipe, preset.recipe)
    if settings:
        text += f" This run differs from it by {', '.join(settings)}."

    # The source's figure is of ImageNet. On another dataset the difference says nothing.
    figure = re.match(r"(\d[\d.]*) %", preset.expected)
    if figure and account.last and account.manifest.dataset.get("classes") == IMAGENET:
        reached = max(account.last["val/top1"], account.last.get("val/top1_ema", 0.0))
        far = reached - float(figure[1])
        side = "above"
        if far < 0:
            side = "below"
        text += f" At epoch {account.last['epoch']:g} it is {abs(far):.2f} points {side} it."
    return text
