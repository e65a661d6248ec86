"""The progress of a training: how far it is, how fast, and how long it still takes."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from wds_train.console import Bar, duration

RECENT_SECONDS = 120.0  # of steps, from which the remaining ones are estimated


class _Mark(NamedTuple):
    """Sums over the steps up to one: seconds, seconds that were waited for data, and work."""

    seconds: float
    waited: float
    work: float


@dataclass
class Pace:
    """The duration of recent steps, and an estimate of the rest. Times are seconds of one clock.

    Args:
        costs: The relative work of a step, epoch by epoch, since images may grow.
        epoch_steps: Steps of an epoch.
        validation: The relative work of a validation. It is used until one has been timed.
        validation_s: Seconds of a validation, once one has been timed.
    """

    costs: Sequence[float]
    epoch_steps: int
    validation: float
    validation_s: float | None = None
    _marks: deque[_Mark] = field(default_factory=lambda: deque([_Mark(0.0, 0.0, 0.0)]))
    _last: float | None = None
    """When the last step ended."""

    def step(self, done: int, now: float, waited: float) -> None:
        """Note the end of a step.

        A step lasts from the end of the one before, with all that was done between. The first does
        not count: it sets up memory and kernels.

        Args:
            done: The number of the step.
            now: The time.
            waited: Seconds that it waited for data.
        """
        if self._last is not None:
            last = self._marks[-1]
            seconds = last.seconds + now - self._last
            cost = self.costs[(done - 1) // self.epoch_steps]
            self._marks.append(_Mark(seconds, last.waited + waited, last.work + cost))
            while len(self._marks) > 2 and seconds - self._marks[1].seconds > RECENT_SECONDS:
                self._marks.popleft()
        self._last = now

    def validated(self, share: float, now: float) -> None:
        """Note that `share` of a validation is done: 0 at its begin, 1 after the commit."""
        if share and self._last is not None:
            self.validation_s = (now - self._last) / share
        if share in (0, 1):
            self._last = now

    def rate(self) -> float:
        """Return the steps per second; 0 while that is not known."""
        return (len(self._marks) - 1) / max(self._recent().seconds, 1e-9)

    def waits(self) -> float:
        """Return the share of the time that was waited for data."""
        recent = self._recent()
        return recent.waited / max(recent.seconds, 1e-9)

    def left(self, done: int, evaluated: int) -> float | None:
        """Return the seconds until the end; None while nothing is known.

        Args:
            done: Steps that are done.
            evaluated: Validations that are done.
        """
        recent = self._recent()
        if not recent.work:
            return None
        seconds_per_work = recent.seconds / recent.work
        validation_s = self.validation_s
        if validation_s is None:
            validation_s = self.validation * seconds_per_work

        # The work of this epoch and all later ones, less that of this epoch's steps that are done.
        epoch, steps_of_it = divmod(done, self.epoch_steps)
        work = sum(self.costs[epoch:]) * self.epoch_steps
        if epoch < len(self.costs):
            work -= self.costs[epoch] * steps_of_it
        validations = len(self.costs) - evaluated
        return work * seconds_per_work + validations * validation_s

    def _recent(self) -> _Mark:
        """Return the sums over the recent steps alone."""
        first = self._marks[0]
        last = self._marks[-1]
        return _Mark(
            last.seconds - first.seconds, last.waited - first.waited, last.work - first.work
        )


class TrainingBar(Bar):
    """A bar over all steps and validations.

    Args:
        pace: Estimates the remaining time.
        done: Steps that are done.
        batch: Samples of a step.
        price: Dollars an hour, to show the cost.
        shown: False hides it.
    """

    def __init__(
        self,
        pace: Pace,
        done: int,
        batch: int,
        price: float | None = None,
        *,
        shown: bool = True,
    ) -> None:
        self._epochs = len(pace.costs)
        self._total = self._epochs * pace.epoch_steps
        super().__init__(self._total, shown=shown)
        self._pace = pace
        self._batch = batch
        self._price = price
        self._done = done
        self._loss = ""
        self._lr = 0.0
        self._began = time.monotonic()

    def step(self, done: int, waited: float, lr: float, loss: float | None) -> None:
        """Show the end of a step.

        Args:
            done: The number of the step.
            waited: Seconds that it waited for data.
            lr: Its learning rate.
            loss: Its loss, if it is known already.
        """
        self._done = done
        self._lr = lr
        if loss is not None:
            self._loss = f"loss {loss:.3f}"
        self._pace.step(done, time.monotonic(), waited)
        if self.due:
            epoch = (done - 1) // self._pace.epoch_steps
            self._show(epoch, f"step {done}/{self._total}", self._loss, *self._speed())

    def validating(self, epoch: int, seen: int, samples: int) -> None:
        """Show that `seen` of the `samples` are done of the validation after `epoch` epochs."""
        if seen < samples:
            self._pace.validated(seen / samples, time.monotonic())
        if self.due:
            self._show(epoch - 1, f"validating {min(seen, samples):,}/{samples:,}")

    def validated(self) -> None:
        """Note the end of a validation."""
        self._pace.validated(1, time.monotonic())

    def _show(self, epoch: int, at: str, *more: str) -> None:
        left = self._pace.left(self._done, epoch)
        remaining = "" if left is None else f"{duration(left)} left"
        # The most important first: a narrow terminal shows no more than the beginning.
        parts = [f"epoch {epoch + 1}/{self._epochs}", at, remaining, *more]
        parts += self._cost(left)
        parts.append(f"lr {self._lr:.2g}")
        self.show(self._done, *(part for part in parts if part))

    def _speed(self) -> list[str]:
        rate = self._pace.rate()
        if not rate:
            return []
        return [f"{rate * self._batch:.0f} img/s", f"wait {self._pace.waits():.0%}"]

    def _cost(self, left: float | None) -> list[str]:
        """Return the dollars spent since this start, and those at the end."""
        if self._price is None or left is None:
            return []
        spent = time.monotonic() - self._began
        dollars_now = self._price * spent / 3600
        dollars_then = self._price * (spent + left) / 3600
        return [f"${dollars_now:,.2f}", f"of ${dollars_then:,.2f}"]
