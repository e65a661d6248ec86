"""What people give a loader, and what it means; `UsageError` for what cannot work."""

import operator
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from wds_train.config.recipe import DataRecipe
from wds_train.dataset.reader import Dataset
from wds_train.environment import number_of
from wds_train.errors import UsageError
from wds_train.loader.mixture import of_same_classes
from wds_train.schema import typed
from wds_train.slurm import tasks_by_srun

Address = str | PathLike[str]
Mix = Sequence[tuple[Dataset | Address, float]]
Normalisation = bool | tuple[Sequence[float], Sequence[float]] | None


def whole(name: str, value: Any, least: int) -> int:
    """`value`, if it is a whole number of at least `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise UsageError(f"{name} = {value!r} cannot work: it must be a whole number of at least {least}")
    return int(number)


def step_of(name: str, value: Any, steps: int) -> int:
    """`value`, if so many of `steps` steps can have been done."""
    if (step := whole(name, value, 0)) > steps:
        raise UsageError(f"{name} = {step} lies beyond the last of {steps} steps; raise epochs")
    return step


def opened(dataset: Dataset | Address) -> Dataset:
    return dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)


def opened_all(dataset: Dataset | Address, mix: Mix) -> tuple[list[Dataset], list[float]]:
    """The datasets of a mixture, the first of which counts the epochs; and the shares of the others."""
    try:
        others = [(other, float(share)) for other, share in mix]
    except (TypeError, ValueError) as error:
        raise UsageError('mix cannot work: it must be a list of pairs, like [("s3://bucket/more", 0.25)]') from error
    first = opened(dataset)
    return [first, *(of_same_classes(opened(other), first) for other, _ in others)], [share for _, share in others]


def data_recipe(**settings: Any) -> DataRecipe:
    """A recipe of these settings, each of which may be of NumPy, too; `UsageError` names one of another type."""
    try:
        recipe: DataRecipe = typed(
            DataRecipe, {name: np.asarray(value).tolist() for name, value in settings.items()}, "data"
        )
    except ValueError as error:
        raise UsageError(f"{error}; docs/loader.md says what each argument is") from error
    return recipe


def place(rank: int | None, world: int | None) -> tuple[int, int]:
    """This process's rank of how many: as given, else as torch.distributed says, where it is initialised."""
    if (rank is None) != (world is None):
        raise UsageError(f"rank = {rank} and world = {world} belong together; give both, or none")
    if rank is not None and world is not None:
        if not 0 <= whole("rank", rank, 0) < whole("world", world, 1):
            raise UsageError(f"rank = {rank} cannot work: ranks of world = {world} are 0 to {world - 1}")
        return rank, world
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    name, size = "WORLD_SIZE", int(number_of("WORLD_SIZE", 0))
    if not size:
        name, size = "SLURM_NTASKS", tasks_by_srun()
    if size > 1:  # every rank would read what the others do
        raise UsageError(
            f"{name} = {size}, but torch.distributed is not initialised; make the loader after "
            "init_process_group, or give it rank= and world="
        )
    return 0, 1


def device_of(device: torch.device | str | None) -> torch.device:
    """The CPU by default, or a GPU that is there."""
    try:
        found = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise UsageError(f"device = {device!r} is none of PyTorch's; write 'cpu', 'cuda' or 'cuda:0'") from error
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"device = {device!r} cannot work: batches go to 'cpu' or 'cuda'; move them on yourself")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device = {device!r}, but PyTorch finds no GPU that it can use; leave it out, or write 'cpu'")
    return found


def normalisation(normalize: Normalisation) -> DataRecipe | None:
    """A recipe of the mean and deviation, ImageNet's for True; None where pixels stay as they are."""
    if normalize is True:
        return DataRecipe()
    if normalize is None or normalize is False:
        return None
    try:
        mean, std = (tuple(float(each) for each in part) for part in normalize)
        if len(mean) == len(std) == 3:
            return DataRecipe(mean=mean, std=std)
    except (TypeError, ValueError):
        pass
    raise UsageError(
        f"normalize = {normalize!r} cannot work: it must be True, or (mean, deviation) of three numbers each, for pixels in [0, 1]"
    )
