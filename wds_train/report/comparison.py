"""Runs side by side: where their recipes differ, what they reached, and their curves over one another."""

import statistics
from collections.abc import Callable, Sequence

from wds_train.checkpoint.scores import NAMES
from wds_train.checkpoint.weight_choice import best_weights
from wds_train.config.settings import setting_names, setting_of
from wds_train.report.charts import Line, line_chart
from wds_train.report.formatting import count, dollars, number, percent
from wds_train.report.page import Charts, Document, Section, Table, Text
from wds_train.report.run_data import Account
from wds_train.report.run_summary import attempts_of, cost_of

CURVES = (
    ("accuracy", "validation top-1, %", "val/top1"),
    ("accuracy-ema", "validation top-1 of the EMA, %", "val/top1_ema"),
    ("loss", "validation loss", "val/loss"),
    ("train-loss", "train loss, epoch mean", "epoch/loss"),
)


def compare(accounts: Sequence[Account], price: float | None) -> Document:
    names = _names(accounts)
    charts = [
        line_chart(
            name,
            title,
            [Line(label, a.points(row)) for label, a in zip(names, accounts, strict=True)],
        )
        for name, title, row in CURVES
    ]
    drawn = [chart for chart in charts if chart]
    different = differences(accounts)
    return Document(
        title=f"{count(len(accounts), 'run')} beside one another",
        subtitle=", ".join(account.url for account in accounts),
        facts=[
            (
                name,
                percent(account.last.get("val/top1")),
                f"EMA {percent(account.last.get('val/top1_ema'))}",
            )
            for name, account in zip(names, accounts, strict=True)
        ],
        notes=[
            f"{name}: {note}"
            for name, account in zip(names, accounts, strict=True)
            for note in account.notes
        ],
        sections=[
            Section("Results", [results(accounts, price)]),
            Section(
                "Recipes",
                [Table("Where they differ", ["setting", *names], different)]
                if different
                else [Text("Recipes and datasets are the same.")],
            ),
            Section(
                "Curves", [Charts(drawn)] if drawn else [Text("No metrics are committed yet.")]
            ),
        ],
    )


def results(accounts: Sequence[Account], price: float | None) -> Table:
    """A column for each run."""
    rows: dict[str, Callable[[Account], str]] = {
        "status": lambda a: a.manifest.status,
        "epochs": lambda a: (
            f"{a.last.get('epoch', 0):g} of {a.recipe.schedule.epochs if a.recipe else '?'}"
        ),
        "top-1": lambda a: percent(a.last.get("val/top1")),
        "top-1, EMA": lambda a: percent(a.last.get("val/top1_ema")),
        "best top-1": _best,
        "validation loss": lambda a: number(a.last.get("val/loss")),
        "train loss": lambda a: number(a.last.get("epoch/loss")),
        "images a second": lambda a: number(_median([rate for _, rate in a.points("time/img_s")])),
        "hours": lambda a: f"{a.manifest.totals().seconds / 3600:.2f}",
        "dollars": lambda a: dollars(
            cost_of(a.manifest, attempts_of(a, price), price, None).dollars
        ),
        "attempts": lambda a: str(a.manifest.totals().attempts),
    }
    told = [[name, *map(tell, accounts)] for name, tell in rows.items()]
    return Table(
        "Results, of the last validation where not said otherwise", ["", *_names(accounts)], told
    )


def differences(accounts: Sequence[Account]) -> list[list[str]]:
    """The settings and datasets that are not the same in all, a row each. A recipe that cannot be read has none."""
    rows = [["recipe", *(str(a.manifest.recipe.get("name", "?")) for a in accounts)]]
    rows += [
        [f"dataset.{name}", *(str(a.manifest.dataset.get(name, "")) for a in accounts)]
        for name in ("url", "fingerprint", "mix")
    ]
    rows += [
        [name, *(setting_of(a.recipe, name) if a.recipe else "?" for a in accounts)]
        for name in setting_names()
    ]
    return [
        [name, *(value or "(empty)" for value in values)]
        for name, *values in rows
        if len(set(values)) > 1
    ]


def _names(accounts: Sequence[Account]) -> list[str]:
    """The runs' names, or where two are the same, their addresses."""
    names = [account.manifest.run for account in accounts]
    return names if len({*names}) == len(names) else [account.url for account in accounts]


def _best(account: Account) -> str:
    """The score of the weights that every command takes, and which these are."""
    found = best_weights(account.manifest)
    if found is None:
        return percent(None)
    return f"{percent(found.top1)} {NAMES[found.kind]}, epoch {found.checkpoint.progress.evaluated}"


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
