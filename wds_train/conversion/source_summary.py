"""Describe how a source was understood.

The description is printed before the work, and kept in `report.json` after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wds_train.conversion.conversion_report import Note, count_causes, say
from wds_train.conversion.shard_plan import Plan
from wds_train.conversion.sources.source import Understood
from wds_train.dataset.arrow import to_numpy
from wds_train.dataset.manifest import ClassInfo

SHOWN = 8  # classes that are named before the work
COUNTED = 20  # the most classes whose samples are printed one by one
CAUSES = 8  # the most causes of ignored files that are listed
LISTED = 5  # classes that are named in a doubt


@dataclass(frozen=True)
class Reading:
    """The facts about a source, or about tars that stay where they are, after reading.

    Attributes:
        description: The source in a few words.
        classes: Its classes.
        counts: The samples of each class, int [classes], by split.
        notes: Files and samples that are not in the dataset as they are in the source.
        understood: How it was understood, if that is known.
        group: The value of --group; empty for none.
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
    counts = {}
    for split, rows in source.splits.items():
        labels = np.zeros(0, np.int64)
        if rows.num_rows:
            labels = to_numpy(rows["label"])
        counts[split] = np.bincount(labels, minlength=len(source.classes))
    return Reading(
        description=source.description,
        classes=source.classes,
        counts=counts,
        notes=source.notes,
        understood=source.understood,
        group=plan.options.group or "",
    )


def describe(plan: Plan) -> dict[str, Any]:
    """Return how the plan's source was understood, as `report.json` holds it under `understood`."""
    return describe_reading(reading_of(plan))


def describe_reading(reading: Reading) -> dict[str, Any]:
    """Return how something was understood, as `report.json` holds it under `understood`."""
    understood = reading.understood or Understood(reading.description, "")
    ids = [entry.id for entry in reading.classes]
    splits = {}
    classes = {}
    for split, counts in reading.counts.items():
        splits[split] = int(counts.sum())
        classes[split] = dict(zip(ids, counts.tolist(), strict=True))
    return {
        "layout": understood.layout,
        "labels": understood.labels,
        "said": list(understood.said),
        "doubtful": [*understood.doubtful, *_doubts(reading)],
        "ignored": _ignored(reading.notes),
        "splits": splits,
        "classes": classes,
    }


def print_reading(reading: Reading) -> None:
    """Print how something was understood, so that a person sees at once when that is wrong."""
    description = describe_reading(reading)

    # The headline: classes and samples.
    names = [_short(entry.name) for entry in reading.classes]
    shown = _list_some(names, SHOWN)
    samples = _list_counts(description["splits"])
    say(f"{reading.description}: {len(names)} classes ({shown}); {samples}")

    # How the source was understood, and the samples of each class.
    if reading.understood is not None:
        _print_line("layout", description["layout"])
        _print_line("labels", description["labels"])
        for split, by_id in description["classes"].items():
            counts = dict(zip(names, by_id.values(), strict=True))
            if len(counts) < len(by_id):  # short names may be equal, ids are not
                counts = by_id
            _print_line("counts", f"{split}: {_summarise(counts)}")

    # What a person should look at.
    for key, word in (("said", "note"), ("ignored", "ignored"), ("doubtful", "doubtful")):
        for sentence in description[key]:
            _print_line(word, sentence)


def print_understood(plan: Plan) -> None:
    """Print how the plan's source was understood, and where its val split comes from."""
    source = plan.source
    share = plan.options.hold_out
    print_reading(reading_of(plan))
    if share and plan.options.group:
        # Groups differ in size, so the share may be another one than was asked for.
        held = source.splits["val"].num_rows
        say(
            f"val is whole groups of {plan.options.group}, {held:,} samples, held out; "
            "--hold-out sets another share, 0 keeps none"
        )
    elif share:
        say(
            f"val is {share:.0%} of each class of train, held out; "
            "--hold-out sets another share, 0 keeps none"
        )
    elif "val" not in source.splits:
        say(
            "there is no val split, which training needs: "
            "--hold-out 0.1 keeps a tenth of each class for one"
        )


def _short(name: str) -> str:
    """Return the first of a class's human names: `tench, Tinca tinca` is a tench."""
    return name.partition(",")[0]


def _print_line(name: str, text: str) -> None:
    say(f"  {name:9} {text}")


def _summarise(counts: dict[str, int]) -> str:
    """Return the samples of each class; of many classes the least, the most and the median."""
    if len(counts) <= COUNTED:
        return _list_counts(counts)
    values = sorted(counts.values())
    least = min(counts, key=counts.__getitem__)
    most = max(counts, key=counts.__getitem__)
    median = values[len(values) // 2]
    return (
        f"{values[0]:,} ({least}) to {values[-1]:,} ({most}) a class, "
        f"half of them {median:,} or more"
    )


def _list_counts(counts: dict[str, int]) -> str:
    return ", ".join([f"{name} {count:,}" for name, count in counts.items()])


def _doubts(reading: Reading) -> list[str]:
    """Return what is odd about the numbers of samples, a sentence each."""
    train = reading.counts.get("train")
    if train is None:
        return []
    doubts = []

    # A class of val alone cannot be learnt.
    empty = _empty_classes(reading, "train")
    if empty:
        doubts.append(f"{len(empty)} classes have no samples in train: {_list_some(empty, LISTED)}")

    # The labels may be in another column or file.
    unlabeled = 0
    for note in reading.notes:
        if note.cause == "no label":
            unlabeled += 1
    if unlabeled > train.sum():
        doubts.append(
            f"more images are without a label ({unlabeled:,}) than with one; "
            "is it the right column?"
        )

    # Whole groups are held out, and few groups may leave a class without any.
    if reading.group and "val" in reading.counts:
        missing = _empty_classes(reading, "val")
        if missing:
            doubts.append(
                f"{len(missing)} classes are in no group of val: {_list_some(missing, LISTED)}"
            )
    return doubts


def _empty_classes(reading: Reading, split: str) -> list[str]:
    """Return the ids of the classes without samples in `split`."""
    empty = []
    for entry, count in zip(reading.classes, reading.counts[split].tolist(), strict=True):
        if not count:
            empty.append(entry.id)
    return empty


def _list_some(words: Sequence[str], most: int) -> str:
    shown = ", ".join(words[:most])
    if len(words) > most:
        return f"{shown}, ..."
    return shown


def _ignored(notes: Sequence[Note]) -> list[str]:
    """List the causes of what is ignored, most frequent first, each with an example."""
    causes = count_causes([note for note in notes if note.what == "ignored"])
    lines = []
    for cause in causes[:CAUSES]:
        lines.append(f"{cause.count:,} x {cause.text} ({cause.example})")
    rest = sum([cause.count for cause in causes[CAUSES:]])
    if rest:
        lines.append(f"{rest:,} more; report.json has all of them")
    return lines
