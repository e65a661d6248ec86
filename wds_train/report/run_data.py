"""A run as it lies on S3, read to be told: nothing is claimed, and nothing is changed."""

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
from wds_train.storage.base import Store

Row = dict[str, Any]
LARGEST = 1e300  # beyond it the ends of an axis, or a sum, are not finite


@dataclass(frozen=True)
class Account:
    """What is known of a run. `recipe` is None where this version cannot read it; `steps` and `epochs` are the rows of
    training steps and of validations, without what is not finite or says nothing; `history` and `replayed` are all rows as they are. `notes`
    says what is missing.
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
        """The account of the run at `store`; what cannot be read is said, and noted. Where a commit has dropped meanwhile
        what `manifest` names, it is of the newest one.
        """
        account = from_newest(store, manifest, lambda newest: cls._read(store, newest))
        for note in account.notes:
            say(note)
        return account

    @classmethod
    def _read(cls, store: Store, manifest: RunManifest) -> "Account":
        notes: list[str] = []
        recipe = None
        try:
            recipe = manifest.settings
        except RunError as error:
            notes.append(f"{error}; what needs the recipe is left out")
        run = Run(store, manifest, "", say=notes.append, leads=False)
        history = run.history()
        replayed = [row for row in run.replayed() if abs(row.get("step", math.inf)) < LARGEST]
        rows = _telling(_sound(history, notes.append), every_of(manifest.recipe), notes.append)
        if not rows:
            notes.append("no metrics are committed yet")
        steps, epochs = ([row for row in rows if name in row] for name in ("train/loss", "val/top1"))
        return cls(store.url, manifest, recipe, history, replayed, steps, epochs, notes)

    @property
    def last(self) -> Row:
        """The last validation's row; empty when there was none."""
        return self.epochs[-1] if self.epochs else {}

    def points(self, name: str) -> list[tuple[float, float]]:
        """The epochs at which `name` was logged, and its values."""
        rows = self.epochs if name.startswith(("val/", "epoch/")) else self.steps
        return [(row["epoch"], row[name]) for row in rows if name in row]


def _sound(rows: list[Row], note: Callable[[str], None]) -> Iterator[Row]:
    """The rows that can be placed, without values that are not finite: both are counted and noted."""
    odd: Counter[str] = Counter()
    for row in rows:
        finite = {name: value for name, value in row.items() if abs(value) < LARGEST}
        odd.update(f"{name} is not finite" for name in row.keys() - finite.keys())
        if {"step", "epoch"} <= finite.keys():
            yield finite
        else:
            odd["a row has no step or epoch"] += 1
    for what, count in sorted(odd.items()):
        note(f"{what}, {count} time{'' if count == 1 else 's'}: left out")


def _telling(rows: Iterable[Row], every: int, note: Callable[[str], None]) -> list[Row]:
    """The rows without scores of EMA weights that were not updated yet, which are noted."""
    found, last = [], 0
    for row in rows:
        kept = telling(row, row["step"], every)
        if len(kept) < len(row):
            last = int(row["step"])
        found.append(kept)
    if last:
        note(
            f"the EMA weights are updated every {every} steps (ema.every): their scores up to step {last} are left out"
        )
    return found
