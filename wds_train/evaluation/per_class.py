"""The report of an evaluation: accuracy by class, and the pairs of classes that are confused.

`wds-train eval` prints it. The page of a run and the tables for Weights & Biases show parts of it.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wds_train.checkpoint.scores import SCORES, describe_score
from wds_train.dataset.manifest import ClassInfo
from wds_train.dataset.reader import SplitReader
from wds_train.evaluation.evaluate import SplitScores, View
from wds_train.models.scoring import metrics, percent
from wds_train.models.weights import Weights

Labels = NDArray[np.int64]
SHOWN = 10  # classes, pairs and unreadable samples that are printed


def report_of(
    scores: SplitScores, split: SplitReader, classes: tuple[ClassInfo, ...]
) -> dict[str, Any]:
    """Return the scores of a split as `eval --json` prints them.

    Args:
        scores: The result of the pass over the split.
        split: The split that was evaluated.
        classes: The dataset's.
    """
    labels = split.index.label[:].astype(np.int64)
    unreadable = []
    for entry in scores.unreadable:
        unreadable.append({"shard": entry.shard, "key": entry.key, "cause": entry.cause})
    return metrics(scores.totals, len(split)) | {
        "samples": len(split),
        "unreadable": unreadable,
        "confused": most_confused(labels, scores.predicted, classes),
        "classes": by_class(labels, scores.predicted, classes),
    }


def by_class(
    labels: Labels, predicted: Labels, classes: tuple[ClassInfo, ...]
) -> list[dict[str, Any]]:
    """Return the samples of each class, and how many of them were recognised.

    Args:
        labels: int64 [samples].
        predicted: int64 [samples]; -1 of a sample that cannot be read.
        classes: The dataset's.

    Returns:
        A row for each class. Its `top1` is in percent; None if the split has no sample of it.
    """
    # Counted at once for all classes: of a large split, a loop over samples would take seconds.
    samples = np.bincount(labels, minlength=len(classes))
    hits = np.bincount(labels[predicted == labels], minlength=len(classes))
    rows = []
    for label, entry in enumerate(classes):
        total = int(samples[label])
        correct = int(hits[label])
        top1 = None
        if total:
            top1 = percent(correct, total)
        row = {
            "label": label,
            "id": entry.id,
            "name": entry.name,
            "samples": total,
            "correct": correct,
            "top1": top1,
        }
        rows.append(row)
    return rows


def most_confused(
    labels: Labels, predicted: Labels, classes: tuple[ClassInfo, ...]
) -> list[dict[str, Any]]:
    """Return the SHOWN pairs of classes of which the first was taken for the second most often.

    Args:
        labels: int64 [samples].
        predicted: int64 [samples]; -1 of a sample that cannot be read, which is confused with none.
        classes: The dataset's.
    """
    count = len(classes)
    wrong = (predicted != labels) & (predicted >= 0)
    # A pair as one number: a matrix of all pairs would have a million cells for 1,000 classes.
    pairs, counts = np.unique(labels[wrong] * count + predicted[wrong], return_counts=True)
    most = np.argsort(-counts, kind="stable")[:SHOWN]
    rows = []
    for pair, samples in zip(pairs[most].tolist(), counts[most], strict=True):
        label, taken_for = divmod(pair, count)
        row = {
            "class": title_of(classes[label]),
            "taken_for": title_of(classes[taken_for]),
            "samples": int(samples),
        }
        rows.append(row)
    return rows


def title_of(entry: ClassInfo) -> str:
    """Return a class's name, with its id if that differs.

    ImageNet has two classes named crane, and two named maillot.
    """
    if entry.name == entry.id:
        return entry.name
    return f"{entry.name} ({entry.id})"


def write_classes(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows of `by_class` as a CSV file.

    Raises:
        OSError: It cannot be written.
    """
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def describe_weights(weights: Weights) -> str:
    """Return kind, step and score of weights, in a line."""
    return describe_score(weights.kind, weights.step, weights.epoch, weights.metrics)


def describe_member(weights: Weights, view: View, *, best: bool) -> dict[str, Any]:
    """Return the weights and the view that were scored, for the report.

    Args:
        weights: The weights.
        view: Their view of the images.
        best: They were chosen for their validation out of a run's checkpoints.
    """
    # The views that the logits are averaged over.
    views = 1
    if view.decoded > view.side:
        views = 5  # the corners and the centre of the larger square
    if view.flip:
        views *= 2
    return {
        "run": weights.run,
        "weights": weights.kind,
        "step": weights.step,
        "epoch": weights.epoch,
        "validated": weights.metrics.get(SCORES[weights.kind]),
        "best": best,
        "model": weights.recipe.model.name,
        "size": view.side,
        "crop": view.crop,
        "views": views,
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """Return a report for people.

    Args:
        report: As `eval --json` prints it.

    Returns:
        Its lines.
    """
    lines = [f"dataset     {report['dataset']}, {report['split']}: {report['samples']:,} samples"]
    for member in report["members"]:
        lines.append(f"model       {_member_line(member)}")
    lines.append(f"top-1       {report['top1']:.2f} %")
    lines.append(f"top-5       {report['top5']:.2f} %")
    lines.append(f"loss        {report['loss']:.4f}")
    return lines + _unreadable_lines(report["unreadable"]) + _class_lines(report)


def _member_line(member: dict[str, Any]) -> str:
    """Return a member as `describe_member` gives it, in one line."""
    views = ""
    if member["views"] > 1:
        views = f", mean of {member['views']} views"
    # Weights of a file, or of a given step, are not the best of a choice.
    validated = ""
    if member["validated"] is not None:
        how = "the best on val, at" if member["best"] else "validated at"
        validated = f", {how} {member['validated']:.2f} %"
    return (
        f"{member['model']} at {member['size']} px{views}: {member['weights']} weights of "
        f"step {member['step']} (epoch {member['epoch']}{validated}) of {member['run']}"
    )


def _unreadable_lines(unreadable: list[dict[str, str]]) -> list[str]:
    """Return the number of unreadable samples, and the first of them."""
    if not unreadable:
        return ["unreadable  0"]
    lines = [f"unreadable  {len(unreadable)}, counted as wrong"]
    for entry in unreadable[:SHOWN]:
        lines.append(f"  {entry['shard']}, key {entry['key']}: {entry['cause']}")
    return lines


def _class_lines(report: dict[str, Any]) -> list[str]:
    """Return the classes with the lowest accuracy, and the most confused pairs."""
    # A class without samples has no accuracy.
    tested = [row for row in report["classes"] if row["samples"]]
    # The worst first; of equal ones, in the order of the labels.
    tested.sort(key=lambda row: row["top1"])
    lines = ["", f"the worst of {len(tested)} classes"]
    for row in tested[:SHOWN]:
        title = title_of(ClassInfo(row["id"], row["name"]))
        lines.append(f"  {row['top1']:6.2f} %  {row['correct']:5d} of {row['samples']:5d}  {title}")
    if report["confused"]:
        lines += ["", "most confused"]
    for pair in report["confused"]:
        lines.append(f"  {pair['samples']:6d} x  {pair['class']}, taken for {pair['taken_for']}")
    return lines
