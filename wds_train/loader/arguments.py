"""Arguments of the loaders: their types and checks.

A message names the argument, its value, and a value that works.
"""

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
from wds_train.loader.mixture import check_same_classes
from wds_train.loader.workers import default_workers
from wds_train.schema import typed
from wds_train.slurm import tasks_by_srun

# An address of a dataset, or a local folder.
Address = str | PathLike[str]
# Other datasets, with their shares of each batch.
Mix = Sequence[tuple[Dataset | Address, float]]
# True for ImageNet's mean and deviation, or a pair of three numbers each.
Normalisation = bool | tuple[Sequence[float], Sequence[float]] | None


def whole(name: str, value: Any, least: int) -> int:
    """Return `value`, an integer of any kind, as an int.

    Args:
        name: The argument's name, for the message.
        value: What was given for it.
        least: The smallest number that works.

    Raises:
        UsageError: It is not a whole number of at least `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise UsageError(
            f"{name} = {value!r} cannot work: it must be a whole number of at least {least}"
        )
    return int(number)


def count_workers(workers: int | None) -> int:
    """Return the number of workers that was asked for, or the default number.

    Raises:
        UsageError: It is not a whole number.
    """
    if workers is None:
        return default_workers()
    return whole("workers", workers, 0)


def step_of(name: str, value: Any, steps: int) -> int:
    """Return a step as an int.

    Args:
        name: The argument's name, for the message.
        value: What was given for it.
        steps: The steps of the training, the largest value.

    Raises:
        UsageError: It is not a whole number from 0 to `steps`.
    """
    step = whole(name, value, 0)
    if step > steps:
        raise UsageError(f"{name} = {step} lies beyond the last of {steps} steps; raise epochs")
    return step


def open_dataset(dataset: Dataset | Address) -> Dataset:
    """Return `dataset`, opened if it is an address."""
    if isinstance(dataset, Dataset):
        return dataset
    return Dataset.open(dataset)


def open_mixture(dataset: Dataset | Address, mix: Mix) -> tuple[list[Dataset], list[float]]:
    """Open the datasets of a mixture.

    Args:
        dataset: The first dataset.
        mix: The others, with their shares of each batch.

    Returns:
        The datasets, of which the first counts the epochs; and the shares of the others.

    Raises:
        UsageError: `mix` is not a list of pairs, or the datasets have different classes.
    """
    # Everything is looked at before a dataset is opened.
    others = []
    shares = []
    try:
        for other, share in mix:
            others.append(other)
            shares.append(float(share))
    except (TypeError, ValueError) as error:
        raise UsageError(
            'mix cannot work: it must be a list of pairs, like [("s3://bucket/more", 0.25)]'
        ) from error

    first = open_dataset(dataset)
    datasets = [first]
    for other in others:
        datasets.append(check_same_classes(open_dataset(other), first))
    return datasets, shares


def data_recipe(**settings: Any) -> DataRecipe:
    """Return the data recipe for a loader's arguments.

    Args:
        settings: Fields of `DataRecipe`, whose values may also be NumPy's.

    Raises:
        UsageError: A setting has another type, or a value that cannot work.
    """
    # Values of NumPy become Python's, which is all that a recipe takes.
    plain = {}
    for name, value in settings.items():
        plain[name] = np.asarray(value).tolist()
    try:
        recipe: DataRecipe = typed(DataRecipe, plain, "data")
    except ValueError as error:
        raise UsageError(f"{error}; docs/loader.md says what each argument is") from error
    return recipe


def place(rank: int | None, world: int | None) -> tuple[int, int]:
    """Return this process's rank, and the number of ranks.

    Args:
        rank: What was given for it. None: as torch.distributed says if it is initialised, or 0.
        world: What was given for it. None: likewise, or 1.

    Raises:
        UsageError: They cannot work; or neither is given, and this process is one of several
            without torch.distributed: each would read all samples.
    """
    if (rank is None) != (world is None):
        raise UsageError(f"rank = {rank} and world = {world} belong together; give both, or none")
    # As they were given.
    if rank is not None and world is not None:
        if not 0 <= whole("rank", rank, 0) < whole("world", world, 1):
            raise UsageError(
                f"rank = {rank} cannot work: ranks of world = {world} are 0 to {world - 1}"
            )
        return rank, world
    # As torch.distributed says.
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()

    # torchrun and srun set variables that tell of other processes.
    name = "WORLD_SIZE"
    processes = int(number_of("WORLD_SIZE", 0))
    if not processes:
        name = "SLURM_NTASKS"
        processes = tasks_by_srun()
    if processes > 1:
        raise UsageError(
            f"{name} = {processes}, but torch.distributed is not initialised; make the loader "
            "after init_process_group, or give it rank= and world="
        )
    return 0, 1


def device_of(device: torch.device | str | None) -> torch.device:
    """Return the device that was asked for.

    Args:
        device: A device or its name. None: the CPU.

    Raises:
        UsageError: It is neither the CPU nor a GPU that can be used.
    """
    # A name that PyTorch knows, of a kind that batches can be copied to.
    if device is None:
        device = "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(
            f"device = {device!r} is none of PyTorch's; write 'cpu', 'cuda' or 'cuda:0'"
        ) from error
    if found.type not in ("cpu", "cuda"):
        raise UsageError(
            f"device = {device!r} cannot work: batches go to 'cpu' or 'cuda'; move them on yourself"
        )
    # Said here, and not by the first batch.
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"device = {device!r}, but PyTorch finds no GPU that it can use; "
            "leave it out, or write 'cpu'"
        )
    return found


def normalisation(normalize: Normalisation) -> DataRecipe | None:
    """Return a data recipe with the mean and deviation that were asked for.

    Args:
        normalize: True for ImageNet's, or a pair `(mean, deviation)`, three numbers each, of pixels
            in [0, 1]. None or False: pixels stay as they are, and None is returned.

    Raises:
        UsageError: It is something else.
    """
    if normalize is True:
        return DataRecipe()
    if normalize is None or normalize is False:
        return None
    # A pair of three numbers each; anything else ends in the message below.
    try:
        mean, std = normalize
        mean = tuple(map(float, mean))
        std = tuple(map(float, std))
        if len(mean) == len(std) == 3:
            return DataRecipe(mean=mean, std=std)
    except (TypeError, ValueError):
        pass
    raise UsageError(
        f"normalize = {normalize!r} cannot work: it must be True, or (mean, deviation) of three "
        "numbers each, for pixels in [0, 1]"
    )
