"""Read the checkpoints and metrics that a run's manifest names.

Nothing is claimed, and no thread is started: `Run.restore` uses it, and so do commands that only
look at a run. Every object is checked by its size and sha256, and a checkpoint's tensors by name,
shape and type.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run_manifest import (
    Checkpoint,
    Object,
    Pending,
    RunManifest,
    Segment,
    describe_object,
    list_steps,
)
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.checkpoint.weight_choice import Choice
from wds_train.dataset.manifest import ClassInfo
from wds_train.errors import Dropped, NotFound, RunError, WdsTrainError
from wds_train.models.tensor_checks import section
from wds_train.models.weights import Weights
from wds_train.schema import typed
from wds_train.storage.base import Store

T = TypeVar("T")
# Rounds of reading objects that a run in training replaces meanwhile; one is the rule.
ROUNDS = 10


def from_newest(store: Store, manifest: RunManifest, read: Callable[[RunManifest], T]) -> T:
    """Call `read` with the run's manifest; once more with the newest where a commit was faster.

    Args:
        store: The run's folder.
        manifest: Its manifest.
        read: Reads objects that the manifest names; it may raise `Dropped`.

    Returns:
        The result of `read`.

    Raises:
        RunError: The run commits faster than it can be read.
    """
    for _ in range(ROUNDS):
        try:
            return read(manifest)
        except Dropped:
            # A commit has replaced the object: its manifest names others.
            manifest = read_run(store)[0]
    raise too_fast(store)


def too_fast(store: Store) -> RunError:
    """Return the error for a run that never stays the same while it is read."""
    return RunError(
        f"{store.url} commits faster than it can be read: {ROUNDS} times a newer commit had "
        "replaced what was to be read; try again when it commits less often, or nearer to its "
        "store"
    )


def read_object(store: Store, named: Object) -> bytes:
    """Return the bytes of an object that a manifest names.

    Raises:
        Dropped: The object is gone, and the run's manifest names it no more: a training has
            committed meanwhile.
        RunError: It is missing, or has other bytes than the manifest says.
    """
    try:
        data = store.read(named.key)
    except NotFound as error:
        # Replaced by a newer commit, or lost?
        if _is_dropped(store, named.key):
            raise Dropped(
                f"{store.url}/{named.key} was replaced by a newer commit of the run; try again"
            ) from error
        raise RunError(f"{store.url}/{named.key} is missing") from error
    # The store may have kept other bytes than were sent.
    found = describe_object(named.key, data)
    if found != named:
        raise RunError(
            f"{store.url}/{named.key} is damaged: it has {found.bytes} bytes of sha256 "
            f"{found.sha256}, committed were {named.bytes} of {named.sha256}"
        )
    return data


def _is_dropped(store: Store, key: str) -> bool:
    """Return True if the run's manifest, read again, does not name the object."""
    try:
        newest, _ = read_run(store)
    except WdsTrainError:
        # Nothing says that it was replaced: the object counts as missing.
        return False
    return key not in newest.keys


def read_checkpoint(store: Store, run: RunManifest, named: Checkpoint) -> Snapshot:
    """Return a checkpoint that `run` names.

    Raises:
        RunError: It is damaged, or of another model or optimizer: no training could go on from it.
    """
    data = read_object(store, named.object)
    try:
        snapshot = Snapshot.decode(data, named.progress)
        snapshot.refuse_misfit(run)
    except RunError as error:
        raise RunError(f"{store.url}/{named.object.key} is damaged: {error}") from error
    return snapshot


def read_chosen(store: Store, run: RunManifest, chosen: Checkpoint) -> Snapshot:
    """Return the checkpoint that a person asked for.

    Raises:
        RunError: It cannot be used; the message names the steps whose checkpoints can be.
    """
    try:
        return read_checkpoint(store, run, chosen)
    except RunError as error:
        # All are read, which may take minutes; a person has to choose another one.
        usable = []
        for each in run.checkpoints:
            if each != chosen and flaw_of(store, run, each) is None:
                usable.append(each)
        raise RunError(
            f"{error}; the usable checkpoints are those of step {list_steps(usable)}"
        ) from error


def flaw_of(store: Store, run: RunManifest, named: Checkpoint) -> RunError | None:
    """Return the error for a checkpoint that cannot be used; None for one that can."""
    try:
        read_checkpoint(store, run, named)
    except RunError as error:
        return error
    return None


def read_records(store: Store, segment: Segment) -> list[dict[str, Any]]:
    """Return the rows of a segment of metrics.

    Raises:
        RunError: It is damaged.
    """
    data = read_object(store, segment.object)
    rows: list[dict[str, Any]] = []
    try:
        for line in data.splitlines():
            rows.append(typed(dict[str, float], json.loads(line), "a record"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{store.url}/{segment.object.key} is damaged: {error}") from error
    return rows


def read_pending(store: Store, run: RunManifest, pending: Pending) -> Snapshot:
    """Return the state of a commit that was announced and not finished.

    Raises:
        RunError: It must not be used: not all of it arrived, it is damaged, or the run has a newer
            checkpoint.
    """
    # A late retry of an older state must not take the run back.
    at = pending.checkpoint.progress
    if run.checkpoints:
        committed = run.checkpoints[-1].progress
        if (at.step, at.evaluated) < (committed.step, committed.evaluated):
            raise RunError(f"{pending.checkpoint.object.key} is older than the newest checkpoint")
    # Read its metrics, too: a segment that is missing makes the commit incomplete.
    if pending.segment is not None:
        read_records(store, pending.segment)
    return read_checkpoint(store, run, pending.checkpoint)


def weights_of(store: Store, manifest: RunManifest, choice: Choice) -> Weights:
    """Return the weights that were chosen from the run's checkpoints.

    Raises:
        RunError: Their checkpoint is damaged (the message names the steps of sound ones), or of an
            older version that did not record the classes.
    """
    chosen = choice.checkpoint
    snapshot = read_chosen(store, manifest, chosen)
    # Without the names of the classes a prediction would be a bare number.
    if "classes" not in snapshot.extra:
        raise RunError(
            f"{store.url}/{chosen.object.key} does not hold its classes, being of an older "
            "wds-train; train again"
        )
    part = {"raw": "model/", "ema": "ema/"}[choice.kind]
    classes = [ClassInfo(*entry) for entry in snapshot.extra["classes"]]
    return Weights(
        section(snapshot.tensors, part),
        choice.kind,
        store.url,
        chosen.progress.step,
        chosen.progress.evaluated,
        choice.metrics,
        manifest.settings,
        tuple(classes),
    )
