"""The report of one run, section by section."""

import math
import shlex
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

import numpy as np
from numpy.typing import NDArray

from wds_train.checkpoint.find import where_time_went
from wds_train.checkpoint.weight_choice import Choice, best_weights
from wds_train.config.presets import PRESETS
from wds_train.config.recipe import Recipe
from wds_train.config.schedule import image_side, lr_at
from wds_train.report.charts import Chart, Line, calibration_chart, line_chart, timeline_chart
from wds_train.report.formatting import (
    UNKNOWN,
    count,
    date,
    dollars,
    headline,
    number,
    percent,
    span,
)
from wds_train.report.goodput_section import goodput_blocks
from wds_train.report.model_checks import Findings
from wds_train.report.page import (
    Block,
    Charts,
    Code,
    Document,
    Picture,
    Pictures,
    Section,
    Table,
    Text,
)
from wds_train.report.run_data import Account, Row
from wds_train.report.run_summary import (
    FIGURES,
    Attempt,
    Cost,
    attempts_of,
    audit_of,
    changed,
    cost_of,
    expectation,
    milestones,
)

DISTRIBUTIONS = ("wds-train", "torch", "torchvision", "timm", "numpy")
NOT_EVALUATED = (
    "The model was not evaluated for this report; `wds-train report` does, unless --no-images "
    "is given."
)
WORST = 10  # classes


@dataclass(frozen=True)
class Prices:
    """Dollars an instance hour.

    Attributes:
        paid: The price that was paid. None: the one that each attempt noted.
        on_demand: The price on demand, to compare with.
    """

    paid: float | None = None
    on_demand: float | None = None


def report(account: Account, prices: Prices, findings: Findings | str) -> Document:
    """Return the report of a run.

    Args:
        account: What is known of the run.
        prices: Prices of an instance hour.
        findings: What the model gets right and wrong; a sentence if it was not evaluated.
    """
    page = account.manifest.page.url
    evaluated = [Text(findings)] if isinstance(findings, str) else _classes(findings)
    attempts = attempts_of(account, prices.paid)
    cost = cost_of(account.manifest, attempts, prices.paid, prices.on_demand)
    return Document(
        title=f"Run {account.manifest.run}",
        subtitle=f"{account.url}, {_state(account)}, last written {date(account.manifest.written)}",
        facts=_facts(account, attempts, cost),
        notes=account.notes,
        link=("The run in Weights & Biases", page) if page else None,
        sections=[
            Section(
                "Result", [Text(expectation(account)), *_curves(account), *_milestones(account)]
            ),
            Section("Goodput", goodput_blocks(account.manifest, time.time())),
            Section("Attempts", _attempts(account, attempts, cost)),
            Section("Classes", evaluated),
            Section("Again", _again(account)),
        ],
    )


def _state(account: Account) -> str:
    return (
        "still running, or lost"
        if account.manifest.status == "running"
        else account.manifest.status
    )


def _facts(account: Account, attempts: list[Attempt], cost: Cost) -> list[tuple[str, str, str]]:
    totals = account.manifest.totals()
    epochs = account.recipe.schedule.epochs if account.recipe else "?"
    last = account.last
    parts = where_time_went(account.manifest, time.time())
    preset = PRESETS.get(str(account.manifest.recipe.get("name")))
    figures = FIGURES.match(preset.expected) if preset else None
    expected = figures[0] if figures else "not measured"
    twice = [attempt.twice for attempt in attempts if attempt.twice is not None]
    lost = sum(attempt.lost for attempt in attempts)

    # Name, value and remark of each figure at the top of the page.
    facts = [("top-1", percent(last.get("val/top1")), f"EMA {percent(last.get('val/top1_ema'))}")]
    best = best_weights(account.manifest)
    if best:
        facts.append(
            ("best top-1", percent(best.top1), f"the {best.kind} weights of epoch {_epoch(best)}")
        )
    facts += [
        ("expected", expected, f"recipe {account.manifest.recipe.get('name', '?')}"),
        ("epochs", f"{last.get('epoch', 0):g} of {epochs}", f"step {_step(account):,}"),
        ("hours", f"{cost.hours:.2f}", f"in {count(totals.attempts, 'attempt')}"),
        ("goodput", headline(parts).replace("at least", "≥"), f"of {span(parts.paid)} paid"),
        ("dollars", dollars(cost.dollars), _cost_remark(cost)),
        ("interruptions", str(totals.interruptions + totals.failures), f"{lost / 60:.1f} min lost"),
        ("trained twice", _at_least(sum(twice)) if twice else UNKNOWN, "images"),
    ]
    return facts


def _epoch(choice: Choice) -> int:
    return choice.checkpoint.progress.evaluated


def _cost_remark(cost: Cost) -> str:
    if cost.dollars is None:
        return "no price is known: --price"
    remark = "for instances"
    if cost.on_demand is not None:
        remark = f"on demand {dollars(cost.on_demand)}"
    if cost.unpriced:
        remark += f", without {count(cost.unpriced, 'attempt')} of unknown price"
    return remark


def _step(account: Account) -> int:
    checkpoints = account.manifest.checkpoints
    return checkpoints[-1].progress.step if checkpoints else 0


def _curves(account: Account) -> list[Block]:
    charts = [
        line_chart(
            "loss",
            "loss",
            [
                Line("train, per step", account.points("train/loss"), faint=True),
                Line("train, epoch mean", account.points("epoch/loss")),
                Line("validation", account.points("val/loss")),
                Line("validation, EMA", account.points("val/loss_ema")),
            ],
        ),
        line_chart(
            "accuracy",
            "validation top-1, %",
            [Line("raw", account.points("val/top1")), Line("EMA", account.points("val/top1_ema"))],
        ),
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
    drawn = [chart for chart in charts if chart]
    found: list[Block] = [Charts(drawn)] if drawn else []
    if account.steps and not account.points("time/img_s"):
        found.append(Text("The metrics hold no throughput: an older version wrote them."))
    return found


def _waits(account: Account) -> list[tuple[float, float]]:
    return [(epoch, 100 * share) for epoch, share in account.points("time/data_wait")]


def _sides(account: Account) -> list[tuple[float, float]]:
    """Return the side as logged, or as the recipe has it for rows of older versions.

    It is empty if the side never changes.
    """
    points = account.points("train/resolution")
    if not points and account.recipe:
        data, epochs = account.recipe.data, account.recipe.schedule.epochs
        points = [
            (row["epoch"], image_side(data, max(0, math.ceil(row["epoch"]) - 1), epochs))
            for row in account.steps
        ]
    return points if len({side for _, side in points}) > 1 else []


def _milestones(account: Account) -> list[Block]:
    if not account.epochs:
        return [Text("No epoch has been validated yet.")]
    rows = [
        [
            f"{row['epoch']:g}",
            percent(row.get("val/top1")),
            percent(row.get("val/top1_ema")),
            percent(row.get("val/top5")),
            number(row.get("epoch/loss")),
            number(row.get("val/loss")),
            number(_rate(account.recipe, row)),
            date(row.get("time/unix")),
        ]
        for row in milestones(account.epochs)
    ]
    head = [
        "epoch",
        "top-1",
        "top-1, EMA",
        "top-5",
        "train loss",
        "validation loss",
        "learning rate",
        "date (UTC)",
    ]
    return [Table("Milestones: the first, the best, the last, and some between", head, rows)]


def _rate(recipe: Recipe | None, row: Row) -> float | None:
    return lr_at(recipe, row["epoch"]) if recipe else None


def _attempts(account: Account, attempts: list[Attempt], cost: Cost) -> list[Block]:
    shown: list[Block] = []
    if attempts:
        begin = attempts[0].started
        spans = [
            (str(a.number), a.started - begin, a.started + a.seconds - begin, a.ended)
            for a in attempts
        ]
        text = f"{count(len(attempts), 'attempt')}, which the table below lists: {_ends(attempts)}."
        shown.append(Charts([timeline_chart(spans, text)]))
    if before := account.manifest.earlier.attempts:
        shown.append(Text(f"{count(before, 'earlier attempt')} are in the sums alone."))
    head = [
        "attempt",
        "where",
        "began (UTC)",
        "minutes",
        "ended",
        "dollars",
        "minutes lost after it",
        "images trained twice",
    ]
    rows = [
        [
            str(a.number),
            a.place,
            date(a.started),
            f"{a.seconds / 60:.1f}",
            a.ended,
            dollars(a.dollars),
            f"{a.lost / 60:.1f}" if a is not attempts[-1] else "–",
            "–" if a.twice is None else _at_least(a.twice),
        ]
        for a in attempts
    ]
    shown.append(Table("Attempts", head, rows))
    shown.append(
        Text(
            "The minutes lost after an attempt are those from its last sign of life until the next one began, by the clocks of "
            "their machines, and, where the metrics tell, until the run was as far again; the goodput is of paid time alone. "
            "Dollars are hours of instances, without storage and requests."
        )
    )
    if cost.on_demand is not None:
        shown.append(Text(f"On demand, without what was done again: {dollars(cost.on_demand)}."))
    return [*shown, *_audit(account)]


def _at_least(images: int) -> str:
    """What the metrics do not tell of may have been more; nothing was nothing."""
    return f"≥ {images:,}" if images else "0"


def _ends(attempts: list[Attempt]) -> str:
    return ", ".join(f"{attempt.number} {attempt.ended}" for attempt in attempts[-12:])


def _audit(account: Account) -> list[Block]:
    audit = audit_of(account)
    shown: list[Block] = [Text(f"Determinism audit: {audit.verdict}")]
    if audit.waiting:
        shown.append(
            Text(f"{count(audit.waiting, 'record')} of dead attempts wait to be trained again.")
        )
    if audit.differences:
        rows = [[str(step), *rest] for step, *rest in audit.differences[:20]]
        shown.append(Table("Values that differ", ["step", "name", "first time", "again"], rows))
    return shown


def _classes(found: Findings) -> list[Block]:
    part = "all" if found.samples == found.total else f"{found.samples:,} (evenly taken) of the"
    report, member = found.report, found.member
    shown: list[Block] = [
        Text(
            f"The {member['weights']} weights of step {member['step']} (epoch {member['epoch']}), on {part} {found.total:,} "
            f"validation images at {member['size']} px: top-1 {percent(report['top1'])}, top-5 {percent(report['top5'])}, "
            f"expected calibration error {percent(found.calibration_error)}."
        ),
        Text(_calibrated(found)),
    ]
    if unreadable := report["unreadable"]:
        shown.append(
            Text(f"{count(len(unreadable), 'image')} could not be read, and count as wrong.")
        )
    rows = [
        [f"{bin.confidence:.1f}", f"{bin.accuracy:.1f}", str(bin.samples)] for bin in found.bins
    ]
    if found.bins:
        shown.append(Charts([_calibration(found)]))
        shown.append(
            Table(
                "Calibration in figures",
                ["confidence, %", "accuracy, %", "images"],
                rows,
                folded=True,
            )
        )
    if found.confusion is not None:
        shown.append(_matrix(found.titles, found.confusion))
    tested = sorted(
        (row for row in report["classes"] if row["samples"]), key=lambda row: row["top1"]
    )
    worst = [
        [found.titles[row["label"]], percent(row["top1"]), f"{row['correct']} of {row['samples']}"]
        for row in tested[:WORST]
    ]
    shown.append(Table(f"The worst of {len(tested)} classes", ["class", "top-1", "right"], worst))
    if report["confused"]:
        pairs = [
            [pair["class"], pair["taken_for"], str(pair["samples"])] for pair in report["confused"]
        ]
        shown.append(Table("Most confused", ["class", "taken for", "images"], pairs))
    return [*shown, _mistakes(found)]


def _calibrated(found: Findings) -> str:
    """How the confidences came about."""
    if found.calibration.used:
        return f"The confidences are calibrated, as in every command: {found.calibration}."
    return f"The confidences are {found.calibration}."


def _calibration(found: Findings) -> Chart:
    text = (
        f"Of predictions with a confidence of {found.bins[-1].confidence:.0f} %, {found.bins[-1].accuracy:.0f} % are right; the "
        f"expected calibration error is {found.calibration_error:.2f} %."
    )
    return calibration_chart([(each.confidence, each.accuracy) for each in found.bins], text)


def _matrix(titles: list[str], confusion: NDArray[np.int64]) -> Table:
    rows = [
        [title, *(str(number or "") for number in counts)]
        for title, counts in zip(titles, confusion.tolist(), strict=True)
    ]
    heat = confusion / confusion.sum(axis=1, keepdims=True).clip(1)
    return Table(
        "Confusion: true classes down, predicted ones across",
        ["", *titles],
        rows,
        heat=heat.tolist(),
    )


def _mistakes(found: Findings) -> Block:
    if not found.mistakes:
        return Text("There is no mistake to show.")
    pictures = [
        Picture(
            f"mistake-{number:02d}.jpg",
            mistake.jpeg,
            [
                f"{mistake.truth}, taken for {mistake.taken_for}",
                f"{100 * mistake.confidence:.0f} % sure",
                mistake.key,
            ],
        )
        for number, mistake in enumerate(found.mistakes, start=1)
    ]
    return Pictures("The mistakes that the model is surest of", pictures)


def _again(account: Account) -> list[Block]:
    """How to train the same once more."""
    dataset = account.manifest.dataset
    rows = [
        ["dataset", str(dataset.get("url", "?"))],
        ["fingerprint", str(dataset.get("fingerprint", "?"))],
        ["classes", str(dataset.get("classes", "?"))],
        *([name, _version(name)] for name in DISTRIBUTIONS),
        ["Python", python_version()],
        ["report of", date(time.time())],
    ]
    return [
        Code("The command, which also goes on with this run where it stopped", command(account)),
        *(
            [
                Text(
                    "The run's batches are a mixture; add its --mix DATASET=SHARE, of which the run keeps fingerprint and share."
                )
            ]
            if dataset.get("mix")
            else []
        ),
        Table(
            "What it was trained on, and the versions of the machine that wrote this report",
            ["", ""],
            rows,
        ),
    ]


def command(account: Account) -> str:
    """What to type for this training."""
    manifest, name = account.manifest, str(account.manifest.recipe.get("name", ""))
    words = [
        "wds-train",
        "train",
        "--dataset",
        str(manifest.dataset.get("url", "")),
        "--run",
        account.url,
    ]
    words += ["--recipe", name]
    if account.recipe:
        preset = PRESETS.get(name)
        for setting in changed(account.recipe, preset.recipe if preset else Recipe(name=name)):
            words += ["--set", setting]
    return shlex.join(words)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
