"""Reading what a run's manifest names: nothing is claimed, and no thread is started."""

import hashlib
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
    steps,
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
ROUNDS = 10  # of reading what a run in training has replaced meanwhile


def from_newest(store: Store, manifest: RunManifest, read: Callable[[RunManifest], T]) -> T:
    """Return what `read` makes of the run's manifest, the newest one where a commit has dropped
    what it named.

    Raises:
        RunError: The run commits faster than it can be read.
    """
    for _ in range(ROUNDS):
        try:
            return read(manifest)
        except Dropped:
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
        Dropped: They are gone, and the run's manifest names them no more: a training has committed
            meanwhile.
        RunError: They are missing, or not those that the manifest names.
    """
    try:
        data = store.read(named.key)
    except NotFound as error:
        if _is_dropped(store, named.key):
            raise Dropped(
                f"{store.url}/{named.key} was replaced by a newer commit of the run; try again"
            ) from error
        raise RunError(f"{store.url}/{named.key} is missing") from error
    found = Object(named.key, len(data), hashlib.sha256(data).hexdigest())
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
    except WdsTrainError:  # then nothing tells that it was replaced
        return False
    return key not in newest.keys


def read_checkpoint(store: Store, run: RunManifest, named: Checkpoint) -> Snapshot:
    """Return a checkpoint that `run` names.

    Raises:
        RunError: A training could not go on from it.
    """
    data = read_object(store, named.object)
    try:
        snapshot = Snapshot.decode(data, named.progress)
        snapshot.refuse_misfit(run)
    except RunError as error:
        raise RunError(f"{store.url}/{named.object.key} is damaged: {error}") from error
    return snapshot


def read_chosen(store: Store, run: RunManifest, chosen: Checkpoint) -> Snapshot:
    """Return the checkpoint that a person asked for, as `read_checkpoint` gives it; the error names
    the steps whose checkpoints could be used.
    """
    try:
        return read_checkpoint(store, run, chosen)
    except RunError as error:
        usable = [
            each for each in run.checkpoints if each != chosen and flaw_of(store, run, each) is None
        ]
        raise RunError(
            f"{error}; the usable checkpoints are those of step {steps(usable)}"
        ) from error


def flaw_of(store: Store, run: RunManifest, named: Checkpoint) -> RunError | None:
    """Return why a checkpoint cannot be used, if it cannot."""
    try:
        read_checkpoint(store, run, named)
    except RunError as error:
        return error
    return None


def read_records(store: Store, segment: Segment) -> list[dict[str, Any]]:
    """Return the records of a segment of metrics, a line each.

    Raises:
        RunError: It is damaged.
    """
    data = read_object(store, segment.object)
    try:
        return [typed(dict[str, float], json.loads(line), "a record") for line in data.splitlines()]
    except (ValueError, RecursionError) as error:
        raise RunError(f"{store.url}/{segment.object.key} is damaged: {error}") from error


def read_pending(store: Store, run: RunManifest, pending: Pending) -> Snapshot:
    """Return the state that a commit holds which was announced and not finished.

    Raises:
        RunError: Not all of it arrived, or it is damaged, or the run has a newer checkpoint: it
            must not be used.
    """
    at = pending.checkpoint.progress
    for newest in run.checkpoints[-1:]:
        committed = newest.progress
        if (at.step, at.evaluated) < (committed.step, committed.evaluated):
            raise RunError(f"{pending.checkpoint.object.key} is older than the newest checkpoint")
    if pending.segment is not None:
        read_records(store, pending.segment)
    return read_checkpoint(store, run, pending.checkpoint)


def weights_of(store: Store, manifest: RunManifest, choice: Choice) -> Weights:
    """Return the weights chosen out of the run's checkpoints.

    Raises:
        RunError: Theirs is damaged, with the steps of those that are not, or of a version that did
            not note the classes.
    """
    chosen = choice.checkpoint
    snapshot = read_chosen(store, manifest, chosen)
    if "classes" not in snapshot.extra:
        raise RunError(
            f"{store.url}/{chosen.object.key} does not hold its classes, being of an older "
            "wds-train; train again"
        )
    part = {"raw": "model/", "ema": "ema/"}[choice.kind]
    return Weights(
        section(snapshot.tensors, part),
        choice.kind,
        store.url,
        chosen.progress.step,
        chosen.progress.evaluated,
        choice.metrics,
        manifest.settings,
        tuple(ClassInfo(*entry) for entry in snapshot.extra["classes"]),
    )
