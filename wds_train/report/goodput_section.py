"""The report's section on goodput: a bar of the paid time, its parts, and those of each attempt.

`run_report.py` puts it on the page.
"""

from dataclasses import asdict

from wds_train.checkpoint.find import parts_by_attempt, where_time_went
from wds_train.checkpoint.goodput import Parts
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.report.charts import stacked_chart
from wds_train.report.formatting import NAMES, headline, span
from wds_train.report.page import Block, Charts, Table, Text

# Explanations of the parts, by their field in `Parts`.
MEANINGS = {
    "steps": "steps whose result a checkpoint holds: the goodput",
    "start": "imports, the claim, restoring the checkpoint, and the first batch",
    "data": "waiting for batches",
    "commit": "waiting for a checkpoint to be taken or uploaded",
    "validation": "validations whose result a checkpoint holds",
    "lost": "a step or a validation that was under way when an attempt was last heard of",
    "trained_twice": "finished steps and validations that were never committed, or taken back",
    "not_recorded": "attempts of an older version, which did not note where their time went",
}


def goodput_blocks(manifest: RunManifest, now: float) -> list[Block]:
    """Return the section's blocks; only a sentence if no attempt noted where its time went.

    Args:
        manifest: The run's manifest.
        now: The present time, seconds since 1970: an attempt that runs is counted until then.
    """
    parts = where_time_went(manifest, now)
    if parts.goodput is None:
        return [Text("Where the paid time went was not recorded.")]
    sentence = f"Of {span(parts.paid)} that were paid, {headline(parts)} became steps that count."
    bars = []
    figures = []
    for name, share in parts.shares().items():
        # A part of 0 stays in the chart's list, so that each part keeps its colour.
        bars.append((NAMES[name], share))
        if share:
            figures.append(f"{NAMES[name]} {100 * share:.1f} %")
    text = f"{sentence} All of it: {', '.join(figures)}."
    chart = stacked_chart("goodput", "where the paid time went", bars, text)
    return [Text(sentence), Charts([chart]), _meanings(parts), _attempts(manifest, now)]


def _meanings(parts: Parts) -> Table:
    """Return a table that explains each part, without those that are 0."""
    shares = parts.shares()
    rows = []
    for name, seconds in asdict(parts).items():
        if seconds:
            percent = f"{100 * shares[name]:.1f} %"
            rows.append([NAMES[name], percent, f"{seconds / 60:.2f}", MEANINGS[name]])
    return Table("Parts of the paid time", ["part", "share", "minutes", "what it is"], rows)


def _attempts(manifest: RunManifest, now: float) -> Table:
    """Return a table of the parts of each attempt, and of all together."""
    earlier = manifest.earlier
    rows = []
    # The manifest keeps old attempts as one sum.
    if earlier.attempts:
        rows.append(_row(f"1 to {earlier.attempts}", earlier.known_parts))
    for number, parts in enumerate(parts_by_attempt(manifest, now), start=earlier.attempts + 1):
        rows.append(_row(str(number), parts))
    rows.append(_row("all", where_time_went(manifest, now)))
    return Table("Paid minutes by attempt", ["attempt", "paid", *NAMES.values()], rows, folded=True)


def _row(name: str, parts: Parts) -> list[str]:
    row = [name]
    for seconds in (parts.paid, *asdict(parts).values()):
        row.append(f"{seconds / 60:.2f}")
    return row
