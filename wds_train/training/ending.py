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
from wds_train.training.recheck import judged
from wds_train.training.stop_request import StopRequest

ROLLBACKS = 2  # per run, after a loss that is not finite


def early_end(schedule: ScheduleRecipe, progress: Progress) -> str:
    """Return why a training ends with this epoch though the schedule has more; "" where it goes on.
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
    """Return the cause to tell where a training commits and leaves since a loader worker died, to
    be started again.

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
    """Handle the early end of the training within: the cause is told, and then the
    manifest says so, too, if the store takes that last word within seconds. A run that is done
    stays done, whatever fails after its last commit. `repeats`: whether the same steps would round
    in the same way again.
    """
    try:
        yield
    except WdsTrainError as caught:
        stop.doing = f"the last word to {run.store.url}"
        error, status = _judged(run, caught, repeats)
        if run.manifest.status != "done":
            tell(error)
            if status is not None:
                _finish_commits(run)
        if run.manifest.status == "done":
            say(f"the run is done all the same ({error})")
            return
        if status is not None:
            give_up(run, status)
        raise error from caught


def _judged(run: Run, error: WdsTrainError, repeats: bool) -> tuple[WdsTrainError, str | None]:
    """Return what to tell of `error`, and the status that it gives the run. They are None where the
    manifest says it already, is another instance's, or lies in a store that does not answer, which
    takes no last word either.
    """
    if isinstance(error, NotFinite):
        return _go_back(run, error, repeats)
    if isinstance(error, Miscomputed):
        return _leave_machine(run, error)
    if isinstance(error, RanksLost):
        return error, "interrupted"
    return error, None if isinstance(
        error, Interrupted | StoppedByPerson | Unavailable
    ) else "failed"


def _go_back(run: Run, error: NotFinite, repeats: bool) -> tuple[WdsTrainError, str | None]:
    """Return what to tell, and the run's status, after a loss that is not finite, which was not
    committed. On a GPU the next attempt, from the newest checkpoint, may round otherwise and pass;
    where the same arithmetic would only fail again, it is not tried.
    """
    _finish_commits(run)
    if not run.manifest.checkpoints or repeats:
        return error, "failed"
    if run.manifest.rollbacks == ROLLBACKS:
        return RunError(f"{error}; {ROLLBACKS} returns to a checkpoint did not help"), "failed"
    done = run.manifest.rollbacks + 1
    give_up(run, "interrupted", rollbacks=done)
    newest = run.manifest.checkpoints[-1].progress.step
    return Interrupted(
        f"{error}; the next start goes back to step {newest} (return {done} of {ROLLBACKS})"
    ), None


def _leave_machine(run: Run, error: Miscomputed) -> tuple[WdsTrainError, str | None]:
    """Return what to tell, and the run's status, after a step that gave two results. The manifest
    keeps each such step: the first on a machine may be chance, and the next start goes back to the
    newest checkpoint; the second is no chance.
    """
    told, goes_on = judged(error, run.manifest)
    _finish_commits(run)
    give_up(
        run,
        "interrupted" if goes_on else "failed",
        differences=(*run.manifest.differences, error.difference),
    )
    return (Interrupted(told) if goes_on else RunError(told)), None


def last_word(run: Run) -> None:
    """Leave the run, whose training hangs, to the next start."""
    if run.manifest.status != "done":
        _finish_commits(run)
        give_up(run, "interrupted")


def _finish_commits(run: Run) -> None:
    """Wait for the commit under way, which is of an earlier and sound state: up to an epoch would
    be lost with it.
    """
    with contextlib.suppress(WdsTrainError):
        run.committer.wait(LAST_SECONDS / 2)


def give_up(run: Run, status: str, **changes: Any) -> None:
    """Say in the manifest how the attempt ended. If the store does not let us, the lease runs out
    by itself.
    """
    try:
        run.end(status, **changes)
    except (StoreError, Interrupted) as error:
        say(f"{run.store.url} could not be marked as {status}: {error}")
