"""Find a run, and tell its state by its manifest alone.

Commands, reports and the tracking look at runs with it: nothing is claimed, and no thread is
started.
"""

from functools import reduce

from wds_train.checkpoint.goodput import Parts
from wds_train.checkpoint.lease import is_gone, read_run
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.errors import NotFound
from wds_train.storage.base import Store
from wds_train.storage.open import open_store


def find_run(url: str) -> tuple[RunManifest, Store]:
    """Return the manifest of the run at `url`, and its store.

    Raises:
        NotFound: There is no run.
    """
    store = open_store(url)
    try:
        manifest, _ = read_run(store)
    except NotFound as error:
        raise NotFound(
            f"there is no run at {store.url} (no manifest.json); check the address"
        ) from error
    return manifest, store


def state_of(run: RunManifest, now: float) -> str:
    """Return the state of a run, for people: its status, "lost" or "silent".

    A kill, or a store that fails, leaves no last word: the status stays "running". The state is
    then "lost" where the process is gone, and "silent" where it has written nothing for its lease.

    Args:
        run: The manifest.
        now: Unix time.
    """
    if run.status != "running":
        return run.status
    # Of a process of this machine the kernel knows; of others only the time of the last write.
    if is_gone(run.owner):
        return "lost"
    if now - run.written > run.lease:
        return "silent"
    return "running"


def parts_by_attempt(run: RunManifest, now: float) -> list[Parts]:
    """Return the time of each attempt that the manifest lists, by its use.

    The newest one's steps count for as long as it may commit them.
    """
    is_running = state_of(run, now) == "running"
    last = len(run.attempts) - 1
    parts = []
    # Only the last attempt can be under way: a claim ends the one before.
    for number, attempt in enumerate(run.attempts):
        parts.append(attempt.parts(over=number < last or not is_running))
    return parts


def where_time_went(run: RunManifest, now: float) -> Parts:
    """Return the time of all attempts by its use, with those that the manifest only sums up."""
    return reduce(Parts.plus, parts_by_attempt(run, now), run.earlier.known_parts)
