"""The report of an evaluation: accuracy by class, and which classes are confused."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wds_train.checkpoint.scores import SCORES, describe_score
from wds_train.dataset.manifest import ClassInfo
from wds_train.dataset.reader import SplitReader
from wds_train.evaluation.evaluate import Scored, View
from wds_train.models.scoring import metrics, percent
from wds_train.models.weights import Weights

Labels = NDArray[np.int64]
SHOWN = 10  # classes, pairs and unreadable samples that are printed


def report_of(scored: Scored, split: SplitReader, classes: tuple[ClassInfo, ...]) -> dict[str, Any]:
    """Return what `eval --json` prints of a split's scores.

    Args:
        scored: The predictions.
        split: The split that was evaluated.
        classes: The dataset's.
    """
    labels = split.index.label[:].astype(np.int64)
    unreadable = []
    for entry in scored.unreadable:
        unreadable.append({"shard": entry.shard, "key": entry.key, "cause": entry.cause})
    return metrics(scored.totals, len(split)) | {
        "samples": len(split),
        "unreadable": unreadable,
        "confused": most_confused(labels, scored.predicted, classes),
        "classes": by_class(labels, scored.predicted, classes),
    }


def by_class(
    labels: Labels, predicted: Labels, classes: tuple[ClassInfo, ...]
) -> list[dict[str, Any]]:
    """Return the samples of each class, and how many of them were recognised.

    Args:
        labels: int64 [samples].
        predicted: int64 [samples]; -1 of a sample that cannot be read.
        classes: The dataset's.
    """
    samples = np.bincount(labels, minlength=len(classes))
    hits = np.bincount(labels[predicted == labels], minlength=len(classes))
    rows = []
    for label, entry in enumerate(classes):
        total = int(samples[label])
        correct = int(hits[label])
        row = {
            "label": label,
            "id": entry.id,
            "name": entry.name,
            "samples": total,
            "correct": correct,
            "top1": percent(correct, total) if total else None,
        }
        rows.append(row)
    return rows


def most_confused(
    labels: Labels, predicted: Labels, classes: tuple[ClassInfo, ...]
) -> list[dict[str, Any]]:
    """Return the SHOWN pairs of classes of which the first was taken for the second most often."""
    count = len(classes)
    wrong = (predicted != labels) & (predicted >= 0)
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
    return entry.name if entry.name == entry.id else f"{entry.name} ({entry.id})"


def write_classes(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows of `by_class` as a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def describe_weights(weights: Weights) -> str:
    """Return kind, step and score of weights, in a line."""
    return describe_score(weights.kind, weights.step, weights.epoch, weights.metrics)


def describe_member(weights: Weights, view: View, *, best: bool) -> dict[str, Any]:
    """Return what was scored, for the report.

    Args:
        weights: The weights.
        view: How they saw the images.
        best: Whether they were chosen for their validation out of a run's checkpoints.
    """
    crops = 5 if view.decoded > view.side else 1
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
        "views": crops * (2 if view.flip else 1),
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """Return a report for people."""
    lines = [f"dataset     {report['dataset']}, {report['split']}: {report['samples']:,} samples"]
    for each in report["members"]:
        views = ""
        if each["views"] > 1:
            views = f", mean of {each['views']} views"
        validated = ""
        if each["validated"] is not None:
            how = "the best on val, at" if each["best"] else "validated at"
            validated = f", {how} {each['validated']:.2f} %"
        lines.append(
            f"model       {each['model']} at {each['size']} px{views}: {each['weights']} weights of "
            f"step {each['step']} (epoch {each['epoch']}{validated}) of {each['run']}"
        )

    # The scores.
    lines.append(f"top-1       {report['top1']:.2f} %")
    lines.append(f"top-5       {report['top5']:.2f} %")
    lines.append(f"loss        {report['loss']:.4f}")
    unreadable = report["unreadable"]
    lines.append(f"unreadable  {len(unreadable)}" + (", counted as wrong" if unreadable else ""))
    for entry in unreadable[:SHOWN]:
        lines.append(f"  {entry['shard']}, key {entry['key']}: {entry['cause']}")

    # The classes.
    tested = [row for row in report["classes"] if row["samples"]]
    tested.sort(key=lambda row: row["top1"])
    lines += ["", f"the worst of {len(tested)} classes"]
    for row in tested[:SHOWN]:
        title = title_of(ClassInfo(row["id"], row["name"]))
        lines.append(f"  {row['top1']:6.2f} %  {row['correct']:5d} of {row['samples']:5d}  {title}")
    if report["confused"]:
        lines += ["", "most confused"]
        for pair in report["confused"]:
            lines.append(
                f"  {pair['samples']:6d} x  {pair['class']}, taken for {pair['taken_for']}"
            )
    return lines
