"""A comparison of runs: differences of their recipes, results, and curves in one chart.

`wds-train compare` calls `compare`, and `page.py` writes its files.
"""

import statistics
from collections.abc import Sequence

from wds_train.checkpoint.scores import NAMES
from wds_train.checkpoint.weight_choice import best_weights
from wds_train.config.settings import setting_names, setting_of
from wds_train.report.charts import Chart, Line, line_chart
from wds_train.report.formatting import count, dollars, number, percent
from wds_train.report.page import Block, Charts, Document, Section, Table, Text
from wds_train.report.run_data import Account
from wds_train.report.run_summary import add_up_cost, list_attempts

# File name, title and metric of each chart.
CURVES = (
    ("accuracy", "validation top-1, %", "val/top1"),
    ("accuracy-ema", "validation top-1 of the EMA, %", "val/top1_ema"),
    ("loss", "validation loss", "val/loss"),
    ("train-loss", "train loss, epoch mean", "epoch/loss"),
)


def compare(accounts: Sequence[Account], price: float | None) -> Document:
    """Build the page of a comparison.

    Args:
        accounts: What is known of the runs.
        price: Dollars of an instance hour. None: the one that each attempt noted.

    Returns:
        The page; `page.write` makes files of it.
    """
    names = _names(accounts)
    # The figures at the top, and what is missing of each run.
    facts = []
    notes = []
    for name, account in zip(names, accounts, strict=True):
        ema = f"EMA {percent(account.last.get('val/top1_ema'))}"
        facts.append((name, percent(account.last.get("val/top1")), ema))
        for note in account.notes:
            notes.append(f"{name}: {note}")

    # The sections.
    recipes: Block = Text("Recipes and datasets are the same.")
    different = differences(accounts)
    if different:
        recipes = Table("Where they differ", ["setting", *names], different)
    curves: Block = Text("No metrics are committed yet.")
    charts = _draw_curves(names, accounts)
    if charts:
        curves = Charts(charts)
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


def _draw_curves(names: Sequence[str], accounts: Sequence[Account]) -> list[Chart]:
    """Draw one chart for each metric, with a line for each run that logged it."""
    charts = []
    for name, title, metric in CURVES:
        lines = []
        for label, account in zip(names, accounts, strict=True):
            lines.append(Line(label, account.points(metric)))
        chart = line_chart(name, title, lines)
        if chart:
            charts.append(chart)
    return charts


def results(accounts: Sequence[Account], price: float | None) -> Table:
    """Return the table of results, with a column for each run.

    Args:
        accounts: What is known of the runs.
        price: Dollars of an instance hour. None: the one that each attempt noted.
    """
    # Each run's figures are a column.
    columns = [_result_column(account, price) for account in accounts]
    rows = []
    for name in columns[0]:
        rows.append([name, *_values(columns, name)])
    return Table(
        "Results, of the last validation where not said otherwise", ["", *_names(accounts)], rows
    )


def _result_column(account: Account, price: float | None) -> dict[str, str]:
    """Return the figures of one run by the name of their row."""
    # The order of the names is the order of the rows.
    last = account.last
    totals = account.manifest.totals()
    cost = add_up_cost(account.manifest, list_attempts(account, price), price, None)
    epochs: int | str = "?"
    if account.recipe:
        epochs = account.recipe.schedule.epochs
    return {
        "status": account.manifest.status,
        "epochs": f"{last.get('epoch', 0):g} of {epochs}",
        "top-1": percent(last.get("val/top1")),
        "top-1, EMA": percent(last.get("val/top1_ema")),
        "best top-1": _best(account),
        "validation loss": number(last.get("val/loss")),
        "train loss": number(last.get("epoch/loss")),
        "images a second": number(_median_rate(account)),
        "hours": f"{totals.seconds / 3600:.2f}",
        "dollars": dollars(cost.dollars),
        "attempts": str(totals.attempts),
    }


def differences(accounts: Sequence[Account]) -> list[list[str]]:
    """Return the settings and datasets that are not the same in all runs, a row each.

    A recipe that cannot be read has "?" for its settings.
    """
    # Only rows that tell the runs apart.
    columns = [_settings(account) for account in accounts]
    different = []
    for name in columns[0]:
        values = _values(columns, name)
        if len(set(values)) > 1:
            row = [name]
            for value in values:
                row.append(value or "(empty)")  # an empty cell would look like a fault
            different.append(row)
    return different


def _values(columns: Sequence[dict[str, str]], name: str) -> list[str]:
    """Return the row `name` of a table that is kept in columns."""
    return [column[name] for column in columns]


def _settings(account: Account) -> dict[str, str]:
    """Return the settings and the dataset of one run by their names."""
    manifest = account.manifest
    column = {"recipe": str(manifest.recipe.get("name", "?"))}
    for name in ("url", "fingerprint", "mix"):
        column[f"dataset.{name}"] = str(manifest.dataset.get(name, ""))
    for name in setting_names():
        column[name] = "?"
        if account.recipe:
            column[name] = setting_of(account.recipe, name)
    return column


def _names(accounts: Sequence[Account]) -> list[str]:
    """Return the runs' names, or their addresses if two names are the same."""
    # A run is called by its folder: others may have one of the same name.
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


def _median_rate(account: Account) -> float | None:
    """Return the median of the images a second; None if an older version logged none."""
    rates = [rate for _, rate in account.points("time/img_s")]
    if not rates:
        return None
    return statistics.median(rates)
