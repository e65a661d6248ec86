"""The report's section on attempts: when each ran and ended, its cost, and the determinism audit.

`run_report.py` puts it on the page; `run_summary.py` computes the figures.
"""

from collections.abc import Sequence

from wds_train.report.charts import Chart, timeline_chart
from wds_train.report.formatting import UNKNOWN, at_least, count, date, dollars
from wds_train.report.page import Block, Charts, Table, Text
from wds_train.report.run_data import Account
from wds_train.report.run_summary import Attempt, Cost, audit_replays

# Attempts in the chart's text, which is read aloud.
SHOWN_ENDS = 12
# Rows: enough to see which values differ.
SHOWN_DIFFERENCES = 20
# Columns of the table.
HEAD = [
    "attempt",
    "where",
    "began (UTC)",
    "minutes",
    "ended",
    "dollars",
    "minutes lost after it",
    "images trained twice",
]
EXPLANATION = (
    "The minutes lost after an attempt are those from its last sign of life until the next one "
    "began, by the clocks of their machines, and, where the metrics tell, until the run was as "
    "far again; the goodput is of paid time alone. Dollars are hours of instances, without "
    "storage and requests."
)


def attempt_blocks(account: Account, attempts: list[Attempt], cost: Cost) -> list[Block]:
    """Return the section's blocks.

    Args:
        account: What is known of the run.
        attempts: The attempts that the manifest lists, from `list_attempts`.
        cost: The run's cost, from `add_up_cost`.
    """
    # When each attempt ran. Of the oldest, the manifest keeps only sums.
    blocks: list[Block] = []
    if attempts:
        blocks.append(Charts([_timeline(attempts)]))
    earlier = account.manifest.earlier.attempts
    if earlier:
        blocks.append(Text(f"{count(earlier, 'earlier attempt')} are in the sums alone."))

    # What each cost, and what interruptions cost.
    blocks.append(_attempt_table(attempts))
    blocks.append(Text(EXPLANATION))
    if cost.on_demand is not None:
        blocks.append(Text(f"On demand, without what was done again: {dollars(cost.on_demand)}."))

    # The steps that were trained twice, compared.
    return [*blocks, *_audit(account)]


def _timeline(attempts: Sequence[Attempt]) -> Chart:
    """Draw the attempts by time, in seconds since the first of them began."""
    # One bar for each attempt.
    begin = attempts[0].started
    spans = []
    for attempt in attempts:
        start = attempt.started - begin
        end = attempt.started + attempt.seconds - begin
        spans.append((str(attempt.number), start, end, attempt.ended))

    # The same in words.
    ends = []
    for attempt in attempts[-SHOWN_ENDS:]:
        ends.append(f"{attempt.number} {attempt.ended}")
    listed = count(len(attempts), "attempt")
    return timeline_chart(spans, f"{listed}, which the table below lists: {', '.join(ends)}.")


def _attempt_table(attempts: Sequence[Attempt]) -> Table:
    rows = []
    for attempt in attempts:
        # Nothing has followed the last attempt yet, so that nothing is lost after it.
        lost = UNKNOWN
        if attempt is not attempts[-1]:
            lost = f"{attempt.lost / 60:.1f}"
        repeated = UNKNOWN
        if attempt.twice is not None:
            repeated = at_least(attempt.twice)
        rows.append(
            [
                str(attempt.number),
                attempt.place,
                date(attempt.started),
                f"{attempt.seconds / 60:.1f}",
                attempt.ended,
                dollars(attempt.dollars),
                lost,
                repeated,
            ]
        )
    return Table("Attempts", HEAD, rows)


def _audit(account: Account) -> list[Block]:
    """Return the verdict of the determinism audit, and the values that differ."""
    audit = audit_replays(account)
    blocks: list[Block] = [Text(f"Determinism audit: {audit.verdict}")]
    if audit.waiting:
        waiting = count(audit.waiting, "record")
        blocks.append(Text(f"{waiting} of dead attempts wait to be trained again."))
    if audit.differences:
        rows = []
        for step, name, first, again in audit.differences[:SHOWN_DIFFERENCES]:
            rows.append([str(step), name, first, again])
        head = ["step", "name", "first time", "again"]
        blocks.append(Table("Values that differ", head, rows))
    return blocks
