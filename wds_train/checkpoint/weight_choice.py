"""Which weights of a run are used: one rule, for every command that takes some, or names them."""

from collections.abc import Iterable
from dataclasses import dataclass

from wds_train.checkpoint.run_manifest import Checkpoint, RunManifest, best, steps
from wds_train.checkpoint.scores import SCORES, every_of, never_averaged, own_metrics, told
from wds_train.config.schedule import is_averaged
from wds_train.errors import UsageError

BEST = "best"  # what a person says, or leaves out, for the weights of `best_weights`
KINDS = (BEST, *SCORES)


@dataclass(frozen=True)
class Choice:
    """The `kind` ("raw" or "ema") weights of a checkpoint."""

    checkpoint: Checkpoint
    kind: str

    @property
    def metrics(self) -> dict[str, float]:
        """These weights' own; empty where they were not validated."""
        return own_metrics(self.checkpoint.metrics, self.kind)

    @property
    def top1(self) -> float | None:
        return self.metrics.get(SCORES[self.kind])

    def __str__(self) -> str:
        progress = self.checkpoint.progress
        return told(self.kind, progress.step, progress.evaluated, self.metrics)


def best_weights(run: RunManifest, kinds: Iterable[str] = SCORES) -> Choice | None:
    """Return the weights that a command takes when it is not told which: those with the highest
    top-1 of any validation whose checkpoint is kept, be they raw or EMA. Of equal ones the raw, and
    of these the earliest. None where nothing was validated. With `kinds`, of these alone.
    """
    return _best(run, run.checkpoints, kinds)


def choose(run: RunManifest, kind: str = BEST, step: int | None = None) -> Choice:
    """Return the weights that a person asks for.

    Args:
        kind: "raw", "ema", or BEST for whichever scored higher.
        step: that of the checkpoint; by default the one whose weights scored highest.

    Raises:
        UsageError: there are none such, or nothing says which are better; or they are EMA weights
            that were never updated.
    """
    checkpoints = run.checkpoints if step is None else run.back_to(step).checkpoints[-1:]
    found = _best(run, checkpoints, SCORES if kind == BEST else [kind])
    if found:
        return found

    # Nothing says which are better: refuse, but for a step and a kind that are named.
    if not checkpoints:
        raise UsageError(
            f"run {run.run} has no validated checkpoint yet, nor any other; train until an epoch "
            "is validated"
        )
    newest = checkpoints[-1]
    every = every_of(run.recipe)
    averaged = is_averaged(newest.progress.step, every)
    if kind == "ema" and (not averaged or any(each.metrics for each in checkpoints)):
        raise UsageError(
            f"the EMA weights of run {run.run} were "
            f"{never_averaged(_last_scored(checkpoints), every)}; they still are those that the "
            "training began with. Leave out --weights ema or --best ema"
        )
    if step is None:
        raise UsageError(
            f"run {run.run} has no validated checkpoint yet; train until an epoch is validated, or "
            f"take a checkpoint as it is: wds-train export RUN --step {newest.progress.step} "
            f"--best raw (there are those of step {steps(checkpoints)})"
        )
    if kind == BEST and averaged:
        raise UsageError(
            f"the checkpoint of step {step} was not validated, so that nothing says whether its "
            "raw or its EMA weights are better; say which: export takes --best raw, eval takes "
            "--weights raw"
        )
    return Choice(newest, "raw" if kind == BEST else kind)


def _best(
    run: RunManifest, checkpoints: tuple[Checkpoint, ...], kinds: Iterable[str]
) -> Choice | None:
    every = every_of(run.recipe)
    found = [(kind, best(checkpoints, kind, every)) for kind in kinds]
    choices = [Choice(checkpoint, kind) for kind, checkpoint in found if checkpoint]
    return max(choices, key=lambda choice: choice.top1 or 0.0, default=None)


def _last_scored(checkpoints: tuple[Checkpoint, ...]) -> int:
    """Return the step of the newest validated checkpoint, or of the newest where none was."""
    scored = [each for each in checkpoints if each.metrics] or [*checkpoints]
    return scored[-1].progress.step
