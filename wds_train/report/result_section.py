"""The report's section on results: the curves of all metrics, and a table of milestones.

`run_report.py` puts it on the page; the rows are those of the run's metrics (`run_data.py`).
"""

import math

from wds_train.config.recipe import Recipe
from wds_train.config.schedule import image_side, lr_at
from wds_train.report.charts import Line, line_chart
from wds_train.report.formatting import date, number, percent
from wds_train.report.page import Block, Charts, Table, Text
from wds_train.report.run_data import Account, Points, Row
from wds_train.report.run_summary import choose_milestones, describe_expectation

HEAD = [
    "epoch",
    "top-1",
    "top-1, EMA",
    "top-5",
    "train loss",
    "validation loss",
    "learning rate",
    "date (UTC)",
]


def result_blocks(account: Account) -> list[Block]:
    """Return the section's blocks.

    Args:
        account: What is known of the run.
    """
    return [Text(describe_expectation(account)), *_curves(account), *_milestones(account)]


def _curves(account: Account) -> list[Block]:
    """Draw the curves; those without points are left out."""
    # What was learned, how fast it was to be learned, and how fast it went.
    charts = [
        line_chart("loss", "loss", _losses(account)),
        line_chart("accuracy", "validation top-1, %", _accuracies(account)),
        line_chart("rate", "learning rate", [Line("", account.points("train/lr"))], zero=True),
        line_chart(
            "resolution", "side of the training images, px", [Line("", _sides(account))], zero=True
        ),
        line_chart(
            "throughput", "images a second", [Line("", account.points("time/img_s"))], zero=True
        ),
        line_chart(
            "waiting", "waiting for data, % of the time", [Line("", _waits(account))], zero=True
        ),
    ]
    # A run without metrics has no chart.
    blocks: list[Block] = []
    drawn = [chart for chart in charts if chart]
    if drawn:
        blocks.append(Charts(drawn))
    if account.steps and not account.points("time/img_s"):
        blocks.append(Text("The metrics hold no throughput: an older version wrote them."))
    return blocks


def _losses(account: Account) -> list[Line]:
    return [
        Line("train, per step", account.points("train/loss"), faint=True),
        Line("train, epoch mean", account.points("epoch/loss")),
        Line("validation", account.points("val/loss")),
        Line("validation, EMA", account.points("val/loss_ema")),
    ]


def _accuracies(account: Account) -> list[Line]:
    return [Line("raw", account.points("val/top1")), Line("EMA", account.points("val/top1_ema"))]


def _waits(account: Account) -> Points:
    """Return the time that training waited for data, in percent."""
    return [(epoch, 100 * share) for epoch, share in account.points("time/data_wait")]


def _sides(account: Account) -> Points:
    """Return the side of the training images, in pixels; nothing if it never changes.

    Older versions did not log it. Then the recipe says it.
    """
    points = account.points("train/resolution")
    if not points and account.recipe:
        data = account.recipe.data
        epochs = account.recipe.schedule.epochs
        for row in account.steps:
            # A row is logged after its step: at the end of epoch 3, 3.0 is the third one's.
            epoch = max(0, math.ceil(row["epoch"]) - 1)
            points.append((row["epoch"], image_side(data, epoch, epochs)))
    sides = {side for _, side in points}
    if len(sides) <= 1:
        return []
    return points


def _milestones(account: Account) -> list[Block]:
    """Return the table of milestones; a sentence if there is no validation."""
    if not account.epochs:
        return [Text("No epoch has been validated yet.")]
    # Rows of older versions lack some of the metrics.
    rows = []
    for row in choose_milestones(account.epochs):
        rows.append(
            [
                f"{row['epoch']:g}",
                percent(row.get("val/top1")),
                percent(row.get("val/top1_ema")),
                percent(row.get("val/top5")),
                number(row.get("epoch/loss")),
                number(row.get("val/loss")),
                number(_learning_rate(account.recipe, row)),
                date(row.get("time/unix")),
            ]
        )
    return [Table("Milestones: the first, the best, the last, and some between", HEAD, rows)]


def _learning_rate(recipe: Recipe | None, row: Row) -> float | None:
    if recipe is None:
        return None
    return lr_at(recipe, row["epoch"])
