"""The report's section on classes: accuracy, calibration, confusions and the surest mistakes.

`run_report.py` puts it on the page if the model was evaluated (`model_checks.py`).
"""

import numpy as np
from numpy.typing import NDArray

from wds_train.report.charts import Chart, calibration_chart
from wds_train.report.formatting import count, percent
from wds_train.report.model_checks import Findings
from wds_train.report.page import Block, Charts, Picture, Pictures, Table, Text

WORST = 10  # classes that are listed: more are not read


def class_blocks(findings: Findings) -> list[Block]:
    """Return the section's blocks, from the overall accuracy down to single mistakes.

    Args:
        findings: The result of the evaluation.
    """
    # The whole model, and how far its confidences can be trusted.
    blocks: list[Block] = [Text(_describe_scores(findings)), Text(_describe_confidences(findings))]
    unreadable = findings.report["unreadable"]
    if unreadable:
        missing = count(len(unreadable), "image")
        blocks.append(Text(f"{missing} could not be read, and count as wrong."))
    if findings.bins:
        blocks.append(Charts([_calibration_chart(findings)]))
        blocks.append(_calibration_table(findings))

    # The classes, and which are taken for which.
    if findings.confusion is not None:
        blocks.append(_confusion_matrix(findings.titles, findings.confusion))
    blocks.append(_worst_classes(findings))
    confused = findings.report["confused"]
    if confused:
        rows = []
        for pair in confused:
            rows.append([pair["class"], pair["taken_for"], str(pair["samples"])])
        blocks.append(Table("Most confused", ["class", "taken for", "images"], rows))

    # Single images.
    blocks.append(_mistakes(findings))
    return blocks


def _describe_scores(findings: Findings) -> str:
    """Say which weights were evaluated on which images, and how well they did."""
    images = f"{findings.samples:,} (evenly taken) of the"
    if findings.samples == findings.total:
        images = "all"
    report = findings.report
    member = findings.member
    return (
        f"The {member['weights']} weights of step {member['step']} (epoch {member['epoch']}), "
        f"on {images} {findings.total:,} validation images at {member['size']} px: "
        f"top-1 {percent(report['top1'])}, top-5 {percent(report['top5'])}, "
        f"expected calibration error {percent(findings.calibration_error)}."
    )


def _describe_confidences(findings: Findings) -> str:
    """Say if the confidences are calibrated."""
    if findings.calibration.used:
        return f"The confidences are calibrated, as in every command: {findings.calibration}."
    return f"The confidences are {findings.calibration}."


def _calibration_chart(findings: Findings) -> Chart:
    # In words, the surest predictions stand for the others.
    surest = findings.bins[-1]
    text = (
        f"Of predictions with a confidence of {surest.confidence:.0f} %, "
        f"{surest.accuracy:.0f} % are right; the "
        f"expected calibration error is {findings.calibration_error:.2f} %."
    )
    points = []
    for each in findings.bins:
        points.append((each.confidence, each.accuracy))
    return calibration_chart(points, text)


def _calibration_table(findings: Findings) -> Table:
    rows = []
    for each in findings.bins:
        rows.append([f"{each.confidence:.1f}", f"{each.accuracy:.1f}", str(each.samples)])
    head = ["confidence, %", "accuracy, %", "images"]
    return Table("Calibration in figures", head, rows, folded=True)


def _confusion_matrix(titles: list[str], confusion: NDArray[np.int64]) -> Table:
    """Return the confusion matrix, whose cells are coloured by their share of the true class.

    Args:
        titles: The names of the classes.
        confusion: Samples by true and predicted class, int64 [classes, classes].
    """
    rows = []
    for title, counts in zip(titles, confusion.tolist(), strict=True):
        row = [title]
        for number in counts:
            row.append(str(number or ""))  # zeros would hide the cells that matter
        rows.append(row)
    samples = confusion.sum(axis=1, keepdims=True).clip(1)  # a class may have none
    return Table(
        "Confusion: true classes down, predicted ones across",
        ["", *titles],
        rows,
        heat=(confusion / samples).tolist(),
    )


def _worst_classes(findings: Findings) -> Table:
    """Return the table of the classes with the lowest accuracy, of those that were evaluated."""
    # A class without images has no accuracy.
    tested = [row for row in findings.report["classes"] if row["samples"]]
    tested.sort(key=lambda row: row["top1"])
    rows = []
    for row in tested[:WORST]:
        right = f"{row['correct']} of {row['samples']}"
        rows.append([findings.titles[row["label"]], percent(row["top1"]), right])
    return Table(f"The worst of {len(tested)} classes", ["class", "top-1", "right"], rows)


def _mistakes(findings: Findings) -> Block:
    """Return the pictures of the surest mistakes; a sentence if there is no mistake."""
    if not findings.mistakes:
        return Text("There is no mistake to show.")
    pictures = []
    # Files are numbered from the surest on.
    for number, mistake in enumerate(findings.mistakes, start=1):
        caption = [
            f"{mistake.truth}, taken for {mistake.taken_for}",
            f"{100 * mistake.confidence:.0f} % sure",
            mistake.key,
        ]
        pictures.append(Picture(f"mistake-{number:02d}.jpg", mistake.jpeg, caption))
    return Pictures("The mistakes that the model is surest of", pictures)
