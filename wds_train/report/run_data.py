"""A run as it is on S3, read for a report. Nothing is claimed, and nothing is changed.

`wds-train report` and `wds-train compare` read each run by `Account.of`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from wds_train.checkpoint.restore import from_newest
from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.checkpoint.scores import every_of, telling
from wds_train.config.recipe import Recipe
from wds_train.errors import RunError
from wds_train.report.formatting import count
from wds_train.storage.base import Store

Row = dict[str, Any]
Points = list[tuple[float, float]]  # epochs, and a value at each
LARGEST = 1e300  # beyond it the ends of an axis, or a sum, are not finite


@dataclass(frozen=True)
class Account:
    """All that is known of a run.

    Attributes:
        url: The run's address.
        manifest: Its manifest.
        recipe: Its recipe; None if this version cannot read it.
        history: All rows of metrics, as they are.
        replayed: All rows of steps that were trained again, as they were before.
        steps: The rows of training steps, without values that are not finite or say nothing.
        epochs: The rows of validations, likewise.
        notes: Sentences on what is missing.
    """

    url: str
    manifest: RunManifest
    recipe: Recipe | None
    history: list[Row]
    replayed: list[Row]
    steps: list[Row]
    epochs: list[Row]
    notes: list[str]

    @classmethod
    def of(cls, store: Store, manifest: RunManifest, say: Callable[[str], None]) -> "Account":
        """Read the run at `store`.

        Args:
            store: The run's.
            manifest: The run's. If a commit has dropped objects that it names, the newest is read.
            say: Prints a sentence on what cannot be read.
        """
        account = from_newest(store, manifest, lambda newest: cls._read(store, newest))
        for note in account.notes:
            say(note)
        return account

    @classmethod
    def _read(cls, store: Store, manifest: RunManifest) -> "Account":
        # An older or newer version's recipe costs the page some figures, not the page.
        notes: list[str] = []
        recipe = None
        try:
            recipe = manifest.settings
        except RunError as error:
            notes.append(f"{error}; what needs the recipe is left out")

        # All metrics that were committed, and those of steps that were taken back.
        run = Run(store, manifest, "", say=notes.append, leads=False)
        history = run.history()
        replayed = []
        for row in run.replayed():
            # A damaged row has no step, or one that is not finite: it belongs to no attempt.
            if abs(row.get("step", math.inf)) < LARGEST:
                replayed.append(row)

        # Rows that a chart can show.
        rows = _telling(_sound(history, notes.append), every_of(manifest.recipe), notes.append)
        if not rows:
            notes.append("no metrics are committed yet")
        steps = [row for row in rows if "train/loss" in row]
        epochs = [row for row in rows if "val/top1" in row]
        return cls(store.url, manifest, recipe, history, replayed, steps, epochs, notes)

    @property
    def last(self) -> Row:
        """The last validation's row; empty if there was none."""
        if not self.epochs:
            return {}
        return self.epochs[-1]

    def points(self, name: str) -> Points:
        """Return the epochs at which a metric was logged, each with its value.

        Args:
            name: The metric's name, such as "val/top1". Those of validations begin with "val/" or
                "epoch/", all others are of training steps.
        """
        rows = self.steps
        if name.startswith(("val/", "epoch/")):
            rows = self.epochs
        points = []
        for row in rows:
            # An older version did not log all metrics.
            if name in row:
                points.append((row["epoch"], row[name]))
        return points


def _sound(rows: list[Row], note: Callable[[str], None]) -> Iterator[Row]:
    """Yield the rows that have a step and an epoch, without values that are not finite.

    What is left out is counted and noted.
    """
    # One note for each kind of fault, with its count.
    odd: Counter[str] = Counter()
    for row in rows:
        finite = {}
        for name, value in row.items():
            if abs(value) < LARGEST:
                finite[name] = value
            else:
                odd[f"{name} is not finite"] += 1
        if {"step", "epoch"} <= finite.keys():
            yield finite
        else:
            odd["a row has no step or epoch"] += 1
    for what, times in sorted(odd.items()):
        note(f"{what}, {count(times, 'time')}: left out")


def _telling(rows: Iterable[Row], every: int, note: Callable[[str], None]) -> list[Row]:
    """Return the rows without scores of EMA weights that were not updated yet, which are noted."""
    # The last step of which a score is left out; 0 for none.
    found = []
    last = 0
    for row in rows:
        kept = telling(row, row["step"], every)
        if len(kept) < len(row):
            last = int(row["step"])
        found.append(kept)
    if last:
        note(
            f"the EMA weights are updated every {every} steps (ema.every): their scores up to step "
            f"{last} are left out"
        )
    return found
