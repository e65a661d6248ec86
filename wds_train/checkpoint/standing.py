"""The state of a run, and where its time went, by its manifest alone."""

from functools import reduce

from wds_train.checkpoint.goodput import Parts
from wds_train.checkpoint.lease import is_gone
from wds_train.checkpoint.run_manifest import RunManifest


def state_of(run: RunManifest, now: float) -> str:
    """Return the run's status, but for a "running" one whose process is gone ("lost") or has
    written nothing for longer than its lease ("silent"): a kill, or a store that fails, leaves no
    last word.
    """
    if run.status != "running":
        return run.status
    if is_gone(run.owner):
        return "lost"
    return "silent" if now - run.written > run.lease else "running"


def parts_by_attempt(run: RunManifest, now: float) -> list[Parts]:
    """Return what became of the time of each attempt that the manifest lists.

    The newest one's steps count for as long as it may commit them.
    """
    over = state_of(run, now) != "running"
    ended = [attempt.parts(over=True) for attempt in run.attempts[:-1]]
    return ended + [attempt.parts(over=over) for attempt in run.attempts[-1:]]


def where_time_went(run: RunManifest, now: float) -> Parts:
    """Return what became of the time of all attempts, those included that the manifest has only as
    a sum.
    """
    return reduce(Parts.plus, parts_by_attempt(run, now), run.earlier.known_parts)
