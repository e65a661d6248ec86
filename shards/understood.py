"""How a source was understood, for the person before the work and for `report.json` after it."""

from collections import Counter
from typing import Any

import numpy as np

from shards.plan import Plan
from shards.report import say
from wds_train.format.arrow import to_numpy

SHOWN = 8  # classes that are named before the work
COUNTED = 20  # classes whose samples are counted one by one
CAUSES = 8  # of what is ignored


def describe(plan: Plan) -> dict[str, Any]:
    """Return how the plan's source was understood, as `report.json` holds it under `understood`."""
    source = plan.source
    understood = source.understood
    return {
        "layout": understood.layout if understood else source.description,
        "labels": understood.labels if understood else "",
        "said": list(understood.said) if understood else [],
        "doubtful": [*(understood.doubtful if understood else []), *_doubts(plan)],
        "ignored": _ignored(plan),
        "splits": {split: rows.num_rows for split, rows in source.splits.items()},
        "classes": {
            split: dict(zip([entry.id for entry in source.classes], counts.tolist(), strict=True))
            for split, counts in _counts(plan).items()
        },
    }


def print_understood(plan: Plan) -> None:
    """Print what the source was taken for: a person sees at once when it is not what it is."""
    source, share = plan.source, plan.options.hold_out
    names = ", ".join(_short(entry.name) for entry in source.classes[:SHOWN])
    more = ", ..." if source.classes[SHOWN:] else ""
    counts = ", ".join(f"{split} {rows.num_rows:,}" for split, rows in source.splits.items())
    say(f"{source.description}: {len(source.classes)} classes ({names}{more}); {counts}")
    told = describe(plan)
    if source.understood is not None:
        _line("layout", told["layout"])
        _line("labels", told["labels"])
        for split, of_classes in told["classes"].items():
            shown = dict(zip((_short(entry.name) for entry in source.classes), of_classes.values(), strict=True))
            _line("counts", f"{split}: {_in_short(shown if len(shown) == len(of_classes) else of_classes)}")
    for name in ("said", "ignored", "doubtful"):
        for sentence in told[name]:
            _line("note" if name == "said" else name, sentence)
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


def _counts(plan: Plan) -> dict[str, np.ndarray]:
    """Return the samples of each class, int [classes], by split."""
    return {
        split: np.bincount(to_numpy(rows["label"]) if rows.num_rows else [], minlength=len(plan.source.classes))
        for split, rows in plan.source.splits.items()
    }


def _in_short(counts: dict[str, int]) -> str:
    if len(counts) <= COUNTED:
        return ", ".join(f"{name} {count:,}" for name, count in counts.items())
    values = sorted(counts.values())
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    return (
        f"{values[0]:,} ({least}) to {values[-1]:,} ({most}) a class, half of them {values[len(values) // 2]:,} or more"
    )


def _doubts(plan: Plan) -> list[str]:
    """Return what is odd about the numbers of samples."""
    counts = _counts(plan)
    ids = [entry.id for entry in plan.source.classes]
    doubts: list[str] = []
    train = counts.get("train")
    if train is None:
        return doubts
    empty = [id for id, count in zip(ids, train.tolist(), strict=True) if not count]
    if empty:
        doubts.append(
            f"{len(empty)} classes have no samples in train: {', '.join(empty[:5])}{', ...' if empty[5:] else ''}"
        )
    unlabeled = sum(note.cause == "no label" for note in plan.source.notes)
    if unlabeled > train.sum():
        doubts.append(f"more images are without a label ({unlabeled:,}) than with one; is it the right column?")
    if plan.options.group and "val" in counts:
        missing = [id for id, count in zip(ids, counts["val"].tolist(), strict=True) if not count]
        if missing:
            doubts.append(
                f"{len(missing)} classes are in no group of val: {', '.join(missing[:5])}{', ...' if missing[5:] else ''}"
            )
    return doubts


def _ignored(plan: Plan) -> list[str]:
    """Return what is ignored: the causes, most frequent first, each with an example."""
    notes = [note for note in plan.source.notes if note.what == "ignored"]
    causes = Counter(note.cause for note in notes)
    example = {note.cause: note.origin for note in reversed(notes)}
    told = [f"{count:,} x {cause} ({example[cause]})" for cause, count in causes.most_common(CAUSES)]
    rest = sum(count for _, count in causes.most_common()[CAUSES:])
    return [*told, *([f"{rest:,} more; report.json has all of them"] if rest else [])]
