"""Numbers from the environment, which are checked as those of flags are."""

import os
from collections.abc import Iterable

from wds_train.config.numbers import Number, count, positive
from wds_train.errors import UsageError

# What a person sets, in seconds.
SETTINGS = {"WDS_S3_PATIENCE": Number(float, 0)}

# The place of one process of a training among the others. torchrun sets it, or our own launcher.
PLACE = {
    "RANK": count,
    "LOCAL_RANK": count,
    "WORLD_SIZE": positive,
    "LOCAL_WORLD_SIZE": positive,
    "MASTER_PORT": Number(int, 1, 65535),
    "WDS_LAUNCHER": positive,
}

# The same by Slurm, whose `srun` starts a process for each task.
SLURM = {
    "SLURM_STEP_NUM_TASKS": positive,
    "SLURM_NTASKS": positive,
    "SLURM_PROCID": count,
    "SLURM_LOCALID": count,
    "SLURM_STEP_NUM_NODES": positive,
    "SLURM_NNODES": positive,
    "SLURM_CPUS_PER_TASK": positive,
}

KINDS = SETTINGS | PLACE | SLURM


def number_of(name: str, default: float) -> float:
    """Return the number in an environment variable.

    Args:
        name: The variable, one of KINDS.
        default: The number to return if the variable is not set.

    Raises:
        UsageError: The variable holds something else, or a number out of its range. An empty one
            does, too.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    kind = KINDS[name]
    try:
        return kind.parse(text)
    except ValueError:
        message = f"{name} = {text!r} in the environment is not {kind}; {_remedy(name)}"
        raise UsageError(message) from None


def refuse_bad_numbers(names: Iterable[str]) -> None:
    """Raise `UsageError` for the first of `names` whose variable holds no number of its range."""
    for name in names:
        number_of(name, 0)


def _remedy(name: str) -> str:
    """Return what to do about a bad number, by who sets the variable."""
    if name in SETTINGS:
        return "set such a number, or unset it"
    if name in SLURM:
        return "Slurm sets it, or unset it"
    return "torchrun sets it, or unset it"
