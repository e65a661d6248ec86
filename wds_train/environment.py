"""Numbers from the environment, which are checked as those of flags are."""

import os
from collections.abc import Iterable

from wds_train.config.numbers import Number, count, positive
from wds_train.errors import UsageError

SETTINGS = {"WDS_S3_PATIENCE": Number(float, 0)}
"""What a person sets, in seconds."""

PLACE = {
    "RANK": count,
    "LOCAL_RANK": count,
    "WORLD_SIZE": positive,
    "LOCAL_WORLD_SIZE": positive,
    "MASTER_PORT": Number(int, 1, 65535),
    "WDS_LAUNCHER": positive,
}
"""What tells one process of a training its place among the others. torchrun sets it, or our own launcher."""

SLURM = {
    "SLURM_STEP_NUM_TASKS": positive,
    "SLURM_NTASKS": positive,
    "SLURM_PROCID": count,
    "SLURM_LOCALID": count,
    "SLURM_STEP_NUM_NODES": positive,
    "SLURM_NNODES": positive,
    "SLURM_CPUS_PER_TASK": positive,
}
"""The same by Slurm, whose `srun` starts a process for each task."""

KINDS = SETTINGS | PLACE | SLURM


def number_of(name: str, default: float) -> float:
    """The number in the variable `name`, which is one of those above; `default` where it is not set.

    Raises:
        UsageError: The variable holds something else, or a number out of its range. An empty one does, too.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    kind = KINDS[name]
    remedy = "torchrun sets it, or unset it"
    if name in SETTINGS:
        remedy = "set such a number, or unset it"
    elif name in SLURM:
        remedy = "Slurm sets it, or unset it"
    try:
        return kind.parse(text)
    except ValueError:
        raise UsageError(f"{name} = {text!r} in the environment is not {kind}; {remedy}") from None


def refuse_bad_numbers(names: Iterable[str]) -> None:
    """Raise `UsageError` for the first of `names` whose variable holds no number of its range."""
    for name in names:
        number_of(name, 0)
