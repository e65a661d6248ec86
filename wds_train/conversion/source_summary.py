"""How a source was understood, for the person before the work and for `report.json` after it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wds_train.conversion.conversion_report import Note, say
from wds_train.conversion.shard_plan import Plan
from wds_train.conversion.sources.source import Understood
from wds_train.dataset.arrow import to_numpy
from wds_train.dataset.manifest import ClassInfo

SHOWN = 8  # classes that are named before the work
COUNTED = 20  # classes whose samples are counted one by one
CAUSES = 8  # of what is ignored


@dataclass(frozen=True)
class Reading:
    """How a source, or tars that stay where they are, were read.

    Attributes:
        description: What it is called.
        classes: Its classes.
        counts: The samples of each class, int [classes], by split.
        notes: What is not in the dataset as it is in the source.
        understood: How it was understood, if that is known.
        group: What --group said, if anything.
    """

    description: str
    classes: tuple[ClassInfo, ...]
    counts: dict[str, np.ndarray]
    notes: Sequence[Note]
    understood: Understood | None = None
    group: str = ""


def reading_of(plan: Plan) -> Reading:
    """Return how the plan's source was read."""
    source = plan.source
    counts = {
        split: np.bincount(to_numpy(rows["label"]) if rows.num_rows else [], minlength=len(source.classes))
        for split, rows in source.splits.items()
    }
    return Reading(
        source.description, source.classes, counts, source.notes, source.understood, plan.options.group or ""
    )


def describe(plan: Plan) -> dict[str, Any]:
    """Return how the plan's source was understood, as `report.json` holds it under `understood`."""
    return describe_reading(reading_of(plan))


def describe_reading(reading: Reading) -> dict[str, Any]:
    """Return how something was understood, as `report.json` holds it under `understood`."""
    understood = reading.understood
    return {
        "layout": understood.layout if understood else reading.description,
        "labels": understood.labels if understood else "",
        "said": list(understood.said) if understood else [],
        "doubtful": [*(understood.doubtful if understood else []), *_doubts(reading)],
        "ignored": _ignored(reading.notes),
        "splits": {split: int(counts.sum()) for split, counts in reading.counts.items()},
        "classes": {
            split: dict(zip([entry.id for entry in reading.classes], counts.tolist(), strict=True))
            for split, counts in reading.counts.items()
        },
    }


def print_reading(reading: Reading) -> None:
    """Print what something was taken for: a person sees at once when it is not what it is."""
    names = ", ".join(_short(entry.name) for entry in reading.classes[:SHOWN])
    more = ", ..." if reading.classes[SHOWN:] else ""
    told = describe_reading(reading)
    counts = ", ".join(f"{split} {count:,}" for split, count in told["splits"].items())
    say(f"{reading.description}: {len(reading.classes)} classes ({names}{more}); {counts}")
    if reading.understood is not None:
        _line("layout", told["layout"])
        _line("labels", told["labels"])
        for split, of_classes in told["classes"].items():
            shown = dict(zip((_short(entry.name) for entry in reading.classes), of_classes.values(), strict=True))
            _line("counts", f"{split}: {_in_short(shown if len(shown) == len(of_classes) else of_classes)}")
    for name in ("said", "ignored", "doubtful"):
        for sentence in told[name]:
            _line("note" if name == "said" else name, sentence)


def print_understood(plan: Plan) -> None:
    """Print what the plan's source was taken for, and where its val split comes from."""
    source, share = plan.source, plan.options.hold_out
    print_reading(reading_of(plan))
    if share and plan.options.group:
        held = source.splits["val"].num_rows
        say(
            f"val is whole groups of {plan.options.group}, {held:,} samples, held out; --hold-out sets another share, 0 keeps none"
        )
    elif share:
        say(f"val is {share:.0%} of each class of train, held out; --hold-out sets another share, 0 keeps none")
    elif "val" not in source.splits:
        say("there is no val split, which training needs: --hold-out 0.1 keeps a tenth of each class for one")


def _short(name: str) -> str:
    """Return the first of a class's human names: `tench, Tinca tinca` is a tench."""
    return name.partition(",")[0]


def _line(name: str, text: str) -> None:
    say(f"  {name:9} {text}")


def _in_short(counts: dict[str, int]) -> str:
    if len(counts) <= COUNTED:
        return ", ".join(f"{name} {count:,}" for name, count in counts.items())
    values = sorted(counts.values())
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    return (
        f"{values[0]:,} ({least}) to {values[-1]:,} ({most}) a class, half of them {values[len(values) // 2]:,} or more"
    )


def _doubts(reading: Reading) -> list[str]:
    """Return what is odd about the numbers of samples."""
    counts = reading.counts
    ids = [entry.id for entry in reading.classes]
    doubts: list[str] = []
    train = counts.get("train")
    if train is None:
        return doubts
    empty = [id for id, count in zip(ids, train.tolist(), strict=True) if not count]
    if empty:
        doubts.append(
            f"{len(empty)} classes have no samples in train: {', '.join(empty[:5])}{', ...' if empty[5:] else ''}"
        )
    unlabeled = sum(note.cause == "no label" for note in reading.notes)
    if unlabeled > train.sum():
        doubts.append(f"more images are without a label ({unlabeled:,}) than with one; is it the right column?")
    if reading.group and "val" in counts:
        missing = [id for id, count in zip(ids, counts["val"].tolist(), strict=True) if not count]
        if missing:
            doubts.append(
                f"{len(missing)} classes are in no group of val: {', '.join(missing[:5])}{', ...' if missing[5:] else ''}"
            )
    return doubts


def _ignored(met: Sequence[Note]) -> list[str]:
    """Return what is ignored: the causes, most frequent first, each with an example."""
    notes = [note for note in met if note.what == "ignored"]
    causes = Counter(note.cause for note in notes)
    example = {note.cause: note.origin for note in reversed(notes)}
    told = [f"{count:,} x {cause} ({example[cause]})" for cause, count in causes.most_common(CAUSES)]
    rest = sum(count for _, count in causes.most_common()[CAUSES:])
    return [*told, *([f"{rest:,} more; report.json has all of them"] if rest else [])]
