"""The ends of a training: by its schedule, and early, by an error or a request.

`run_training` and `session` call it. The manifest's status decides what the next start does.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import Progress
from wds_train.config.recipe import ScheduleRecipe
from wds_train.console import say
from wds_train.errors import (
    Interrupted,
    Miscomputed,
    NotFinite,
    RanksLost,
    RunError,
    StoppedByPerson,
    StoreError,
    Unavailable,
    WdsTrainError,
    WorkerDied,
    tell,
)
from wds_train.training.ranks import LAST_SECONDS
from wds_train.training.recheck import judge
from wds_train.training.stop_request import StopRequest

# Returns to a checkpoint per run, after a loss that is not finite. A third would only repeat them.
ROLLBACKS = 2


def early_end(schedule: ScheduleRecipe, progress: Progress) -> str:
    """Return the reason why a training ends with this epoch, before its schedule; "" if none.

    It depends on committed values alone, so that a resumed run ends where an unbroken one does.
    """
    stale = 0 < schedule.patience <= progress.evaluated - progress.best_epoch
    if not stale or progress.evaluated == schedule.epochs:
        return ""
    return (
        f"after {progress.evaluated} of {schedule.epochs} epochs: the validation's top-1 was never "
        f"higher than the {progress.best:.2f} % of epoch {progress.best_epoch} in the "
        f"{schedule.patience} after it (schedule.patience)"
    )


def is_over(schedule: ScheduleRecipe, progress: Progress) -> bool:
    """Return True if a training has no further epoch, so that its run is done."""
    return progress.evaluated == schedule.epochs or bool(early_end(schedule, progress))


def cause_of_end(error: WorkerDied, trained: bool, ranks: int) -> str:
    """Return the cause to name when a training commits and leaves because a loader worker died.

    A supervisor then starts the training again.

    Args:
        error: The death of the worker.
        trained: True if there was a step or a validation since this start.
        ranks: The number of processes that train together.

    Raises:
        WorkerDied: Nothing was trained since this start: the next one would only repeat it.
        RanksLost: Other ranks wait within the step for which this one has no batch.
    """
    if not trained:
        raise error
    if ranks > 1:
        raise RanksLost(
            f"{error}; the same command, on any number of GPUs, goes on from the newest checkpoint"
        ) from error
    return (
        f"the death of a loader worker ({error.how}; if the machine ran out of memory, use fewer "
        "--workers)"
    )


@contextlib.contextmanager
def handle_early_end(run: Run, stop: StopRequest, *, repeats: bool) -> Iterator[None]:
    """Handle an error that ends the training inside the block.

    The cause is printed, and then written to the manifest if the store takes that within seconds. A
    run that is done stays done, whatever fails after its last commit.

    Args:
        run: The run, which is claimed.
        stop: The request that names what the training is doing.
        repeats: True if the same steps would round in the same way again.

    Raises:
        WdsTrainError: The error to end with.
    """
    try:
        yield
    except WdsTrainError as caught:
        stop.doing = f"the last word to {run.store.url}"
        error, status = _settle(run, caught, repeats)
        # Print it first: the store may keep the rest waiting.
        if run.manifest.status != "done":
            tell(error)
            if status is not None:
                _finish_commits(run)
        # A commit that was under way may have been the last.
        if run.manifest.status == "done":
            say(f"the run is done all the same ({error})")
            return
        if status is not None:
            give_up(run, status)
        raise error from caught


def _settle(run: Run, error: WdsTrainError, repeats: bool) -> tuple[WdsTrainError, str | None]:
    """Return the error to end with, and the status that it gives the run.

    The status is None where nothing is to be written: the manifest has it already, belongs to
    another instance, or is in a store that does not answer.
    """
    if isinstance(error, NotFinite):
        return _go_back(run, error, repeats)
    if isinstance(error, Miscomputed):
        return _leave_machine(run, error)
    if isinstance(error, RanksLost):
        return error, "interrupted"
    if isinstance(error, Interrupted | StoppedByPerson | Unavailable):
        return error, None
    return error, "failed"


def _go_back(run: Run, error: NotFinite, repeats: bool) -> tuple[WdsTrainError, str | None]:
    """Leave the run to its newest checkpoint after a loss that is not finite.

    On a GPU the next attempt may round otherwise and pass. Where the same arithmetic would only
    fail again, it is not tried.
    """
    # An earlier state may still be on its way, and is a better point to go back to.
    _finish_commits(run)
    if not run.manifest.checkpoints or repeats:
        return error, "failed"
    if run.manifest.rollbacks == ROLLBACKS:
        return RunError(f"{error}; {ROLLBACKS} returns to a checkpoint did not help"), "failed"
    done = run.manifest.rollbacks + 1
    give_up(run, "interrupted", rollbacks=done)
    newest = run.manifest.checkpoints[-1].progress.step
    message = f"{error}; the next start goes back to step {newest} (return {done} of {ROLLBACKS})"
    return Interrupted(message), None


def _leave_machine(run: Run, error: Miscomputed) -> tuple[WdsTrainError, str | None]:
    """Write a step that gave two results to the manifest, and leave this machine.

    The first one on a machine may be chance: the next start goes back to the newest checkpoint. The
    second one fails the run.
    """
    message, may_go_on = judge(error, run.manifest)
    status = "failed"
    if may_go_on:
        status = "interrupted"
    _finish_commits(run)
    give_up(run, status, differences=(*run.manifest.differences, error.difference))
    if may_go_on:
        return Interrupted(message), None
    return RunError(message), None


def last_word(run: Run) -> None:
    """Leave a run whose training hangs to the next start."""
    if run.manifest.status != "done":
        _finish_commits(run)
        give_up(run, "interrupted")


def _finish_commits(run: Run) -> None:
    """Wait for the commit under way, of an earlier and sound state; half of LAST_SECONDS at most.

    Up to an epoch would be lost with it.
    """
    with contextlib.suppress(WdsTrainError):
        run.committer.wait(LAST_SECONDS / 2)


def give_up(run: Run, status: str, **changes: Any) -> None:
    """Write to the manifest that the attempt ended as `status`, with other `changes`.

    If the store does not take it, the lease expires by itself.
    """
    try:
        run.end(status, **changes)
    except (StoreError, Interrupted) as error:
        say(f"{run.store.url} could not be marked as {status}: {error}")
