"""What an evaluation found: by class, and which classes are confused."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wds_train.checkpoint.scores import SCORES, told
from wds_train.dataset.manifest import ClassInfo
from wds_train.dataset.reader import SplitReader
from wds_train.evaluation.evaluate import Scored, View
from wds_train.models.scoring import metrics, percent
from wds_train.models.weights import Weights

Labels = NDArray[np.int64]
SHOWN = 10  # classes, pairs and unreadable samples that are printed


def report_of(scored: Scored, split: SplitReader, classes: tuple[ClassInfo, ...]) -> dict[str, Any]:
    labels = split.index.label[:].astype(np.int64)
    return metrics(scored.totals, len(split)) | {
        "samples": len(split),
        "unreadable": [{"shard": entry.shard, "key": entry.key, "cause": entry.cause} for entry in scored.unreadable],
        "confused": most_confused(labels, scored.predicted, classes),
        "classes": by_class(labels, scored.predicted, classes),
    }


def by_class(labels: Labels, predicted: Labels, classes: tuple[ClassInfo, ...]) -> list[dict[str, Any]]:
    """How many samples each class has, and how many of them were recognised."""
    samples = np.bincount(labels, minlength=len(classes))
    hits = np.bincount(labels[predicted == labels], minlength=len(classes))
    return [
        {"label": i, "id": entry.id, "name": entry.name, "samples": int(samples[i]), "correct": int(hits[i])}
        | {"top1": percent(int(hits[i]), int(samples[i])) if samples[i] else None}
        for i, entry in enumerate(classes)
    ]


def most_confused(labels: Labels, predicted: Labels, classes: tuple[ClassInfo, ...]) -> list[dict[str, Any]]:
    """The SHOWN pairs of classes of which the first was taken for the second most often."""
    count, wrong = len(classes), (predicted != labels) & (predicted >= 0)
    pairs, counts = np.unique(labels[wrong] * count + predicted[wrong], return_counts=True)
    most = np.argsort(-counts, kind="stable")[:SHOWN]
    return [
        {
            "class": title_of(classes[pair // count]),
            "taken_for": title_of(classes[pair % count]),
            "samples": int(number),
        }
        for pair, number in zip(pairs[most].tolist(), counts[most], strict=True)
    ]


def title_of(entry: ClassInfo) -> str:
    """The class as it is printed, with its id where that is not its name: ImageNet has two classes each that are named
    crane and maillot.
    """
    return entry.name if entry.name == entry.id else f"{entry.name} ({entry.id})"


def write_classes(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def describe_weights(weights: Weights) -> str:
    """Which weights these are, and their own score, in a line."""
    return told(weights.kind, weights.step, weights.epoch, weights.metrics)


def describe_member(weights: Weights, view: View, *, best: bool) -> dict[str, Any]:
    """What was scored; `best`: it was chosen by its validation out of a run's checkpoints."""
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
        "views": (5 if view.decoded > view.side else 1) * (2 if view.flip else 1),
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    lines = [f"dataset     {report['dataset']}, {report['split']}: {report['samples']:,} samples"]
    for each in report["members"]:
        views = f", mean of {each['views']} views" if each["views"] > 1 else ""
        how = "the best on val, at" if each["best"] else "validated at"
        validated = "" if each["validated"] is None else f", {how} {each['validated']:.2f} %"
        lines.append(
            f"model       {each['model']} at {each['size']} px{views}: {each['weights']} weights of step {each['step']} "
            f"(epoch {each['epoch']}{validated}) of {each['run']}"
        )
    lines.append(f"top-1       {report['top1']:.2f} %")
    lines.append(f"top-5       {report['top5']:.2f} %")
    lines.append(f"loss        {report['loss']:.4f}")
    unreadable = report["unreadable"]
    lines.append(f"unreadable  {len(unreadable)}" + (", counted as wrong" if unreadable else ""))
    lines += [f"  {entry['shard']}, key {entry['key']}: {entry['cause']}" for entry in unreadable[:SHOWN]]
    tested = sorted((row for row in report["classes"] if row["samples"]), key=lambda row: row["top1"])
    lines += ["", f"the worst of {len(tested)} classes"]
    for row in tested[:SHOWN]:
        title = title_of(ClassInfo(row["id"], row["name"]))
        lines.append(f"  {row['top1']:6.2f} %  {row['correct']:5d} of {row['samples']:5d}  {title}")
    if report["confused"]:
        lines += ["", "most confused"]
        lines += [
            f"  {pair['samples']:6d} x  {pair['class']}, taken for {pair['taken_for']}" for pair in report["confused"]
        ]
    return lines
