"""A comparison of runs: differences of their recipes, results, and curves in one chart."""

import statistics
from collections.abc import Callable, Sequence

from wds_train.checkpoint.scores import NAMES
from wds_train.checkpoint.weight_choice import best_weights
from wds_train.config.settings import setting_names, setting_of
from wds_train.report.charts import Line, line_chart
from wds_train.report.formatting import count, dollars, number, percent
from wds_train.report.page import Block, Charts, Document, Section, Table, Text
from wds_train.report.run_data import Account
from wds_train.report.run_summary import attempts_of, cost_of

CURVES = (
    ("accuracy", "validation top-1, %", "val/top1"),
    ("accuracy-ema", "validation top-1 of the EMA, %", "val/top1_ema"),
    ("loss", "validation loss", "val/loss"),
    ("train-loss", "train loss, epoch mean", "epoch/loss"),
)


def compare(accounts: Sequence[Account], price: float | None) -> Document:
    """Return the page of a comparison.

    Args:
        accounts: What is known of the runs.
        price: Dollars of an instance hour. None: the one that each attempt noted.
    """
    names = _names(accounts)
    charts = []
    for name, title, row in CURVES:
        lines = []
        for label, account in zip(names, accounts, strict=True):
            lines.append(Line(label, account.points(row)))
        chart = line_chart(name, title, lines)
        if chart:
            charts.append(chart)

    facts = []
    notes = []
    for name, account in zip(names, accounts, strict=True):
        ema = f"EMA {percent(account.last.get('val/top1_ema'))}"
        facts.append((name, percent(account.last.get("val/top1")), ema))
        notes += [f"{name}: {note}" for note in account.notes]

    recipes: Block = Text("Recipes and datasets are the same.")
    different = differences(accounts)
    if different:
        recipes = Table("Where they differ", ["setting", *names], different)
    curves: Block = Charts(charts) if charts else Text("No metrics are committed yet.")
    return Document(
        title=f"{count(len(accounts), 'run')} beside one another",
        subtitle=", ".join(account.url for account in accounts),
        facts=facts,
        notes=notes,
        sections=[
            Section("Results", [results(accounts, price)]),
            Section("Recipes", [recipes]),
            Section("Curves", [curves]),
        ],
    )


def results(accounts: Sequence[Account], price: float | None) -> Table:
    """Return the table of results, with a column for each run."""
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
    """Return the settings and datasets that are not the same in all runs, a row each.

    A recipe that cannot be read has "?" for its settings.
    """
    rows = [["recipe", *(str(a.manifest.recipe.get("name", "?")) for a in accounts)]]
    for name in ("url", "fingerprint", "mix"):
        rows.append([f"dataset.{name}", *(str(a.manifest.dataset.get(name, "")) for a in accounts)])
    for name in setting_names():
        rows.append([name, *(_setting(account, name) for account in accounts)])

    different = []
    for name, *values in rows:
        if len(set(values)) > 1:
            different.append([name, *(value or "(empty)" for value in values)])
    return different


def _setting(account: Account, name: str) -> str:
    return setting_of(account.recipe, name) if account.recipe else "?"


def _names(accounts: Sequence[Account]) -> list[str]:
    """Return the runs' names, or their addresses if two names are the same."""
    names = [account.manifest.run for account in accounts]
    if len(set(names)) < len(names):
        return [account.url for account in accounts]
    return names


def _best(account: Account) -> str:
    """Return the score of the weights that every command takes, and say which these are."""
    found = best_weights(account.manifest)
    if found is None:
        return percent(None)
    return f"{percent(found.top1)} {NAMES[found.kind]}, epoch {found.checkpoint.progress.evaluated}"


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
