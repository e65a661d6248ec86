"""Rows of a run's metrics: the figures of the training's steps and epochs, and their speed.

`training/session.py` logs them; they go to the run's metrics and to Weights & Biases.
docs/watching.md lists their names.
"""

import time

from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import Progress
from wds_train.tracking.metrics import Row
from wds_train.tracking.tracker import Tracker


class MetricsRows:
    """Puts rows into the run's metrics and W&B.

    Steps are timed together, from one row to the next, when the GPU is idle. The CPU runs ahead of
    it: a single step's time would hold the work of earlier steps, or none of its own.

    Args:
        run: The run that the rows belong to.
        tracker: Passes them on to W&B.
        batch: Samples of a step, over all ranks.

    Attributes:
        stall_ms: The training's pause for the newest commit, milliseconds; None once it is logged.
    """

    def __init__(self, run: Run, tracker: Tracker, batch: int) -> None:
        self.stall_ms: float | None = None
        self._run = run
        self._tracker = tracker
        self._batch = batch
        self._forget_steps()

    def add_step(self, waited: float, worked: float) -> None:
        """Count a step: the seconds that the training `waited` for its data, and `worked`."""
        self._steps += 1
        self._waited += waited
        self._seconds += waited + worked

    def log_step(self, row: Row, at: Progress) -> None:
        """Log a step's row, with the speed of the steps since the last one.

        It gets the images a second, the share of the time that the training waited for data, and
        the cost of the newest commit: `stall_ms` of the training, `upload_s` in the background.
        """
        # The speed.
        images = self._steps * self._batch
        row |= {
            "time/img_s": images / self._seconds,
            "time/data_wait": self._waited / self._seconds,
        }
        self._forget_steps()

        # The newest commit, which is in one row alone.
        committer = self._run.committer
        if self.stall_ms is not None:
            row["commit/stall_ms"] = self.stall_ms
        if committer.upload_s is not None:
            row["commit/upload_s"] = committer.upload_s
        self.stall_ms = None
        committer.upload_s = None
        self.log(row, at)

    def log_epoch(
        self, loss: float, unreadable: int, metrics: dict[str, float], at: Progress
    ) -> None:
        """Log the row of an epoch, which ended with a validation of these `metrics`."""
        row: Row = {
            "step": at.step,
            "epoch": float(at.evaluated),
            "epoch/loss": loss,
            "epoch/lost": unreadable,
        }
        self.log(row | metrics, at)

    def drain(self) -> list[Row]:
        """Return the rows that no commit has taken yet."""
        return self._tracker.drain()

    def log(self, row: Row, at: Progress) -> None:
        """Log a row of the progress `at`.

        Its figures must be the same in a resumed and an unbroken run, except those of time
        (`tracking.metrics.repeatable` leaves these out).
        """
        totals = self._run.manifest.totals()
        row |= {
            "time/unix": time.time(),
            "time/attempt": self._run.manifest.fence,
            "time/hours": totals.seconds / 3600,
        }
        if totals.dollars:
            row["time/dollars"] = totals.dollars
        self._tracker.log(row)
        self._run.uploader.log(row, at)

    def _forget_steps(self) -> None:
        """Begin the next row's steps."""
        self._steps = 0
        self._waited = 0.0
        self._seconds = 0.0
