"""The report of one run: the figures at the top, and the sections of the page.

`wds-train report` and the end of a training call `report`, and `page.py` writes its files. The
longer sections have modules of their own: `result_section.py`, `goodput_section.py`,
`attempts_section.py` and `class_section.py`.
"""

import shlex
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

from wds_train.checkpoint.find import where_time_went
from wds_train.checkpoint.weight_choice import best_weights
from wds_train.config.presets import PRESETS
from wds_train.config.recipe import Recipe
from wds_train.report.attempts_section import attempt_blocks
from wds_train.report.class_section import class_blocks
from wds_train.report.formatting import (
    UNKNOWN,
    at_least,
    count,
    date,
    dollars,
    headline,
    percent,
    span,
)
from wds_train.report.goodput_section import goodput_blocks
from wds_train.report.model_checks import Findings
from wds_train.report.page import Block, Code, Document, Fact, Section, Table, Text
from wds_train.report.result_section import result_blocks
from wds_train.report.run_data import Account
from wds_train.report.run_summary import (
    FIGURES,
    Attempt,
    Cost,
    add_up_cost,
    list_attempts,
    list_changes,
)

# Packages whose version decides what a training computes.
DISTRIBUTIONS = ("wds-train", "torch", "torchvision", "timm", "numpy")
NOT_EVALUATED = (
    "The model was not evaluated for this report; `wds-train report` does, unless --no-images "
    "is given."
)
MIXTURE = (
    "The run's batches are a mixture; add its --mix DATASET=SHARE, of which the run keeps "
    "fingerprint and share."
)


@dataclass(frozen=True)
class Prices:
    """Prices of an instance, in dollars an hour.

    Attributes:
        paid: The price that was paid. None: the one that each attempt noted.
        on_demand: The price on demand, to compare with. None: no comparison.
    """

    paid: float | None = None
    on_demand: float | None = None


def report(account: Account, prices: Prices, findings: Findings | str) -> Document:
    """Build the report of a run.

    Args:
        account: What is known of the run.
        prices: Prices of an instance hour.
        findings: The result of evaluating the model. If it was not evaluated, a sentence that says
            why.

    Returns:
        The report; `page.write` makes files of it.
    """
    # Figures of which several sections speak.
    attempts = list_attempts(account, prices.paid)
    cost = add_up_cost(account.manifest, attempts, prices.paid, prices.on_demand)
    classes: list[Block]
    if isinstance(findings, str):
        classes = [Text(findings)]
    else:
        classes = class_blocks(findings)

    # The page.
    link = None
    page = account.manifest.page.url
    if page:
        link = ("The run in Weights & Biases", page)
    written = date(account.manifest.written)
    return Document(
        title=f"Run {account.manifest.run}",
        subtitle=f"{account.url}, {_state(account)}, last written {written}",
        facts=_facts(account, attempts, cost),
        notes=account.notes,
        link=link,
        sections=[
            Section("Result", result_blocks(account)),
            Section("Goodput", goodput_blocks(account.manifest, time.time())),
            Section("Attempts", attempt_blocks(account, attempts, cost)),
            Section("Classes", classes),
            Section("Again", _again(account)),
        ],
    )


def _state(account: Account) -> str:
    # A run that died without a word still has this status.
    if account.manifest.status == "running":
        return "still running, or lost"
    return account.manifest.status


def _facts(account: Account, attempts: list[Attempt], cost: Cost) -> list[Fact]:
    """Return name, value and remark of each figure at the top of the page."""
    last = account.last
    facts = [("top-1", percent(last.get("val/top1")), f"EMA {percent(last.get('val/top1_ema'))}")]
    best = best_weights(account.manifest)
    if best:
        epoch = best.checkpoint.progress.evaluated
        facts.append(
            ("best top-1", percent(best.top1), f"the {best.kind} weights of epoch {epoch}")
        )

    # The progress, compared with the recipe's.
    name = account.manifest.recipe.get("name", "?")
    epochs: int | str = "?"
    if account.recipe:
        epochs = account.recipe.schedule.epochs
    facts.append(("expected", _expected_figure(account), f"recipe {name}"))
    facts.append(("epochs", f"{last.get('epoch', 0):g} of {epochs}", f"step {_step(account):,}"))

    # The cost of it in time and dollars.
    totals = account.manifest.totals()
    parts = where_time_went(account.manifest, time.time())
    goodput = headline(parts).replace("at least", "≥")
    facts.append(("hours", f"{cost.hours:.2f}", f"in {count(totals.attempts, 'attempt')}"))
    facts.append(("goodput", goodput, f"of {span(parts.paid)} paid"))
    facts.append(("dollars", dollars(cost.dollars), _describe_cost(cost)))

    # The losses to interruptions.
    lost = sum(attempt.lost for attempt in attempts)
    ends = totals.interruptions + totals.failures
    facts.append(("interruptions", str(ends), f"{lost / 60:.1f} min lost"))
    facts.append(("trained twice", _count_repeated(attempts), "images"))
    return facts


def _expected_figure(account: Account) -> str:
    """Return the accuracy that the recipe's source expects."""
    preset = PRESETS.get(str(account.manifest.recipe.get("name")))
    if preset is None:
        return "not measured"
    figures = FIGURES.match(preset.expected)
    if figures is None:
        return "not measured"
    return figures[0]


def _count_repeated(attempts: list[Attempt]) -> str:
    """Return the number of images that were trained twice, of attempts that recorded it."""
    recorded = [attempt.twice for attempt in attempts if attempt.twice is not None]
    if not recorded:
        return UNKNOWN
    return at_least(sum(recorded))


def _describe_cost(cost: Cost) -> str:
    """Return the remark on the dollars: what they compare with, and what they leave out."""
    if cost.dollars is None:
        return "no price is known: --price"
    remark = "for instances"
    if cost.on_demand is not None:
        remark = f"on demand {dollars(cost.on_demand)}"
    if cost.unpriced:
        remark += f", without {count(cost.unpriced, 'attempt')} of unknown price"
    return remark


def _step(account: Account) -> int:
    """Return the last step that a checkpoint holds; 0 without a checkpoint."""
    checkpoints = account.manifest.checkpoints
    if not checkpoints:
        return 0
    return checkpoints[-1].progress.step


def _again(account: Account) -> list[Block]:
    """Return the section on repeating the training: its command, dataset and versions."""
    # The command, and what it leaves out.
    blocks: list[Block] = [
        Code("The command, which also goes on with this run where it stopped", command(account))
    ]
    dataset = account.manifest.dataset
    if dataset.get("mix"):
        blocks.append(Text(MIXTURE))

    # What else decides the outcome.
    rows = [
        ["dataset", str(dataset.get("url", "?"))],
        ["fingerprint", str(dataset.get("fingerprint", "?"))],
        ["classes", str(dataset.get("classes", "?"))],
    ]
    for name in DISTRIBUTIONS:
        rows.append([name, _version(name)])
    rows.append(["Python", python_version()])
    rows.append(["report of", date(time.time())])
    caption = "What it was trained on, and the versions of the machine that wrote this report"
    blocks.append(Table(caption, ["", ""], rows))
    return blocks


def command(account: Account) -> str:
    """Return the shell command that starts this training, or goes on with it.

    Args:
        account: What is known of the run. Without a readable recipe, the command has its name and
            no settings.
    """
    name = str(account.manifest.recipe.get("name", ""))
    words = ["wds-train", "train"]
    words += ["--dataset", str(account.manifest.dataset.get("url", ""))]
    words += ["--run", account.url]
    words += ["--recipe", name]
    if account.recipe:
        # A recipe of a name that this version does not know began with the defaults.
        base = Recipe(name=name)
        if name in PRESETS:
            base = PRESETS[name].recipe
        for setting in list_changes(account.recipe, base):
            words += ["--set", setting]
    return shlex.join(words)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
