"""The choice of a run's weights: one rule, for every command that uses or names them.

By default it is the checkpoint, and the kind of weights, with the highest top-1 on val.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from wds_train.checkpoint.run_manifest import Checkpoint, RunManifest, best, list_steps
from wds_train.checkpoint.scores import (
    SCORES,
    describe_score,
    every_of,
    never_averaged,
    select_metrics,
)
from wds_train.config.schedule import is_averaged
from wds_train.errors import UsageError

# The value of --weights and --best that asks for `best_weights`.
BEST = "best"
KINDS = (BEST, *SCORES)


@dataclass(frozen=True)
class Choice:
    """The `kind` ("raw" or "ema") weights of a checkpoint."""

    checkpoint: Checkpoint
    kind: str

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of these weights; empty where they were not validated."""
        return select_metrics(self.checkpoint.metrics, self.kind)

    @property
    def top1(self) -> float | None:
        """Their top-1 on val, in percent; None where they were not validated."""
        return self.metrics.get(SCORES[self.kind])

    def __str__(self) -> str:
        progress = self.checkpoint.progress
        return describe_score(self.kind, progress.step, progress.evaluated, self.metrics)


def best_weights(run: RunManifest, kinds: Iterable[str] = SCORES) -> Choice | None:
    """Return the weights that a command uses by default.

    These are the ones with the highest top-1 of any validation whose checkpoint is kept. Of equal
    ones the raw win, and of these the earliest.

    Args:
        run: The run's manifest.
        kinds: The kinds to choose from, "raw" or "ema".

    Returns:
        None where nothing was validated.
    """
    return _best(run, run.checkpoints, kinds)


def choose(run: RunManifest, kind: str = BEST, step: int | None = None) -> Choice:
    """Return the weights that a person asks for.

    Args:
        run: The run's manifest.
        kind: "raw", "ema", or BEST for the one that scored higher.
        step: The step of the checkpoint; by default the one whose weights scored highest.

    Raises:
        UsageError: There are no such weights; no validation says which ones are better; or they are
            EMA weights that were never updated.
    """
    # By their scores.
    checkpoints = run.checkpoints
    if step is not None:
        checkpoints = run.back_to(step).checkpoints[-1:]
    kinds: Iterable[str] = [kind]
    if kind == BEST:
        kinds = SCORES
    found = _best(run, checkpoints, kinds)
    if found:
        return found

    # Without a score only a checkpoint that is asked for by step and kind will do: refuse the rest.
    if not checkpoints:
        raise UsageError(
            f"run {run.run} has no validated checkpoint yet, nor any other; train until an epoch "
            "is validated"
        )
    newest = checkpoints[-1]
    every = every_of(run.recipe)
    averaged = is_averaged(newest.progress.step, every)
    if kind == "ema" and (not averaged or _are_validated(checkpoints)):
        raise UsageError(
            f"the EMA weights of run {run.run} were "
            f"{never_averaged(_last_scored(checkpoints), every)}; they still are those that the "
            "training began with. Leave out --weights ema or --best ema"
        )
    if step is None:
        raise UsageError(
            f"run {run.run} has no validated checkpoint yet; train until an epoch is validated, or "
            f"take a checkpoint as it is: wds-train export RUN --step {newest.progress.step} "
            f"--best raw (there are those of step {list_steps(checkpoints)})"
        )
    if kind == BEST and averaged:
        raise UsageError(
            f"the checkpoint of step {step} was not validated, so that nothing says whether its "
            "raw or its EMA weights are better; say which: export takes --best raw, eval takes "
            "--weights raw"
        )
    # EMA weights that were never updated are no alternative to the raw ones.
    if kind == BEST:
        return Choice(newest, "raw")
    return Choice(newest, kind)


def _best(
    run: RunManifest, checkpoints: tuple[Checkpoint, ...], kinds: Iterable[str]
) -> Choice | None:
    """Return the weights with the highest top-1 of these checkpoints and kinds."""
    choices = []
    for kind in kinds:
        checkpoint = best(checkpoints, kind, every_of(run.recipe))
        if checkpoint is not None:
            choices.append(Choice(checkpoint, kind))
    # Of equal ones max() takes the first, so the order of the kinds decides.
    return max(choices, key=lambda choice: choice.top1 or 0.0, default=None)


def _are_validated(checkpoints: tuple[Checkpoint, ...]) -> bool:
    """Return True if one of the checkpoints has metrics."""
    return any(checkpoint.metrics for checkpoint in checkpoints)


def _last_scored(checkpoints: tuple[Checkpoint, ...]) -> int:
    """Return the step of the newest validated checkpoint; of the newest where none was."""
    for checkpoint in reversed(checkpoints):
        if checkpoint.metrics:
            return checkpoint.progress.step
    return checkpoints[-1].progress.step
