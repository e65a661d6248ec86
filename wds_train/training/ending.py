"""Handling of trainings that end early."""

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

ROLLBACKS = 2  # per run, after a loss that is not finite


def early_end(schedule: ScheduleRecipe, progress: Progress) -> str:
    """Return why a training ends with this epoch though the schedule has more; "" if it goes on.

    It follows from what is committed alone, so that a resumed run ends where an unbroken one does.
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
    """Return True if a training has no epoch before it, so that its run is done."""
    return progress.evaluated == schedule.epochs or bool(early_end(schedule, progress))


def cause_of_end(error: WorkerDied, trained: bool, ranks: int) -> str:
    """Return the cause to name when a training commits and leaves since a loader worker died.

    The training is then started again.

    Raises:
        WorkerDied: Nothing was trained since this start: the next one would only repeat it.
        RanksLost: There are other ranks, which wait within the step that this one has no batch for.
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
def ending(run: Run, stop: StopRequest, *, repeats: bool) -> Iterator[None]:
    """Handle the early end of the training within.

    The cause is told, and then written to the manifest if the store takes that within seconds. A
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
    """Return the error to tell, and the status that it gives the run.

    The status is None where the manifest has it already, is another instance's, or lies in a store
    that does not answer, which takes no last word either.
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
    """Go back to the newest checkpoint after a loss that is not finite, which was not committed.

    On a GPU the next attempt may round otherwise and pass. Where the same arithmetic would only
    fail again, it is not tried.
    """
    _finish_commits(run)
    if not run.manifest.checkpoints or repeats:
        return error, "failed"
    if run.manifest.rollbacks == ROLLBACKS:
        return RunError(f"{error}; {ROLLBACKS} returns to a checkpoint did not help"), "failed"
    done = run.manifest.rollbacks + 1
    give_up(run, "interrupted", rollbacks=done)
    newest = run.manifest.checkpoints[-1].progress.step
    told = f"{error}; the next start goes back to step {newest} (return {done} of {ROLLBACKS})"
    return Interrupted(told), None


def _leave_machine(run: Run, error: Miscomputed) -> tuple[WdsTrainError, str | None]:
    """Note in the manifest a step that gave two results, and leave this machine.

    The first on a machine may be chance, and the next start goes back to the newest checkpoint; the
    second is no chance.
    """
    told, may_go_on = judge(error, run.manifest)
    status = "interrupted" if may_go_on else "failed"
    _finish_commits(run)
    give_up(run, status, differences=(*run.manifest.differences, error.difference))
    if may_go_on:
        return Interrupted(told), None
    return RunError(told), None


def last_word(run: Run) -> None:
    """Leave the run, whose training hangs, to the next start."""
    if run.manifest.status != "done":
        _finish_commits(run)
        give_up(run, "interrupted")


def _finish_commits(run: Run) -> None:
    """Wait for the commit under way, which is of an earlier and sound state.

    Up to an epoch would be lost with it.
    """
    with contextlib.suppress(WdsTrainError):
        run.committer.wait(LAST_SECONDS / 2)


def give_up(run: Run, status: str, **changes: Any) -> None:
    """Write to the manifest that the attempt ended as `status`, with other `changes`.

    If the store does not take it, the lease runs out by itself.
    """
    try:
        run.end(status, **changes)
    except (StoreError, Interrupted) as error:
        say(f"{run.store.url} could not be marked as {status}: {error}")
