"""How far a training is, how fast, and how long it still takes."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from wds_train.console import Bar, duration

RECENT_SECONDS = 120.0  # of steps that speak for those to come


@dataclass
class Pace:
    """What recent steps took, and so what is left. `costs`: the relative work of a step, epoch by epoch, since images may
    grow; `validation`: that of a validation, until the first has shown how long one takes. Times are seconds of one clock.
    """

    costs: Sequence[float]
    epoch_steps: int
    validation: float
    validation_s: float | None = None
    _marks: deque[tuple[float, float, float]] = field(default_factory=lambda: deque([(0.0, 0.0, 0.0)]))
    """Seconds, seconds waited and work after each of the recent steps, from the first on."""
    _last: float | None = None

    def step(self, done: int, now: float, waited: float) -> None:
        """Step number `done` has ended, for which data was waited for `waited` seconds. A step lasts since the one before,
        with what else was done meanwhile; the first, which sets up memory and kernels, says nothing.
        """
        if self._last is not None:
            seconds, wait, work = self._marks[-1]
            cost = self.costs[(done - 1) // self.epoch_steps]
            self._marks.append((seconds + now - self._last, wait + waited, work + cost))
            while len(self._marks) > 2 and self._marks[-1][0] - self._marks[1][0] > RECENT_SECONDS:
                self._marks.popleft()
        self._last = now

    def validated(self, share: float, now: float) -> None:
        """That `share` of a validation is done: 0 at its begin, 1 after the commit behind it."""
        if share and self._last is not None:
            self.validation_s = (now - self._last) / share
        if share in (0, 1):
            self._last = now

    def rate(self) -> float:
        """Steps a second; 0 while that is not known."""
        return (len(self._marks) - 1) / max(self._recent(0), 1e-9)

    def waits(self) -> float:
        """The share of the time that was waited for data."""
        return self._recent(1) / max(self._recent(0), 1e-9)

    def left(self, done: int, evaluated: int) -> float | None:
        """Seconds to the end from step `done` on, of which the validations are `evaluated` so far."""
        if not (work := self._recent(2)):
            return None
        unit = self._recent(0) / work
        validation_s = self.validation * unit if self.validation_s is None else self.validation_s
        epoch, within = divmod(done, self.epoch_steps)
        ahead = sum(self.costs[epoch:]) * self.epoch_steps - sum(self.costs[epoch : epoch + 1]) * within
        return ahead * unit + (len(self.costs) - evaluated) * validation_s

    def _recent(self, place: int) -> float:
        return self._marks[-1][place] - self._marks[0][place]


class TrainingBar(Bar):
    """A bar over all steps and validations. `price`: dollars an hour."""

    def __init__(self, pace: Pace, done: int, batch: int, price: float | None = None, *, shown: bool = True) -> None:
        self._epochs, self._total = len(pace.costs), len(pace.costs) * pace.epoch_steps
        super().__init__(self._total, shown=shown)
        self._pace, self._batch, self._price = pace, batch, price
        self._done, self._loss, self._lr, self._began = done, "", 0.0, time.monotonic()

    def step(self, done: int, waited: float, lr: float, loss: float | None) -> None:
        """Step number `done` has ended; its `loss`, where that is known."""
        self._done, self._lr = done, lr
        self._loss = self._loss if loss is None else f"loss {loss:.3f}"
        self._pace.step(done, time.monotonic(), waited)
        if self.due:
            self._show((done - 1) // self._pace.epoch_steps, f"step {done}/{self._total}", self._loss, *self._speed())

    def validating(self, epoch: int, seen: int, samples: int) -> None:
        """Of the validation after `epoch` epochs, `seen` of the `samples` are done."""
        if seen < samples:
            self._pace.validated(seen / samples, time.monotonic())
        if self.due:
            self._show(epoch - 1, f"validating {min(seen, samples):,}/{samples:,}")

    def validated(self) -> None:
        """The validation is over, and the commit behind it begun."""
        self._pace.validated(1, time.monotonic())

    def _show(self, epoch: int, at: str, *more: str) -> None:
        left = self._pace.left(self._done, epoch)
        until = "" if left is None else f"{duration(left)} left"
        parts = [f"epoch {epoch + 1}/{self._epochs}", at, until, *more, *self._cost(left), f"lr {self._lr:.2g}"]
        self.show(self._done, *(part for part in parts if part))

    def _speed(self) -> list[str]:
        rate = self._pace.rate()
        return [f"{rate * self._batch:.0f} img/s", f"wait {self._pace.waits():.0%}"] if rate else []

    def _cost(self, left: float | None) -> list[str]:
        """The dollars spent since this start, and of how many at the end."""
        if self._price is None or left is None:
            return []
        spent = time.monotonic() - self._began
        now, then = (self._price * seconds / 3600 for seconds in (spent, spent + left))
        return [f"${now:,.2f}", f"of ${then:,.2f}"]
