"""Rows of a run's metrics: what a training says of its steps, and how fast they went."""

import time

from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import Progress
from wds_train.tracking.metrics import Row
from wds_train.tracking.tracker import Tracker


class Rows:
    """Puts rows into the run's metrics and W&B. Steps are timed together, from a row up to the next, when the GPU is idle: a
    single step's time would hold the work of those that the GPU was still doing, or none of its own.
    """

    def __init__(self, run: Run, tracker: Tracker, batch: int) -> None:
        self.stall_ms: float | None = None
        """The training's pause for the newest commit."""
        self._run, self._tracker, self._batch = run, tracker, batch
        self._steps, self._waited, self._seconds = 0, 0.0, 0.0

    def add_step(self, waited: float, worked: float) -> None:
        """Count a step, for whose data the training `waited`; seconds."""
        self._steps, self._waited = self._steps + 1, self._waited + waited
        self._seconds += waited + worked

    def log_step(self, row: Row, at: Progress) -> None:
        """Note a step's row, with the images a second since the last one, the share of the time that was waited for data, and what
        the newest commit cost: `stall_ms` the training's pause, `upload_s` the work in the background.
        """
        images = self._steps * self._batch
        row |= {"time/img_s": images / self._seconds, "time/data_wait": self._waited / self._seconds}
        self._steps, self._waited, self._seconds = 0, 0.0, 0.0
        committer = self._run.committer
        costs = {"commit/stall_ms": self.stall_ms, "commit/upload_s": committer.upload_s}
        self.stall_ms = committer.upload_s = None
        self.log(row | {name: cost for name, cost in costs.items() if cost is not None}, at)

    def log(self, row: Row, at: Progress) -> None:
        """Note a row of the progress `at`. `repeatable(row)` must be the same for a resumed and an unbroken run."""
        totals = self._run.manifest.totals()
        row |= {"time/unix": time.time(), "time/attempt": self._run.manifest.fence}
        row |= {"time/hours": totals.seconds / 3600}
        row |= {"time/dollars": totals.dollars} if totals.dollars else {}
        self._tracker.log(row)
        self._run.ahead.log(row, at)
