"""Checks that tensors are those of a recipe's model and optimizer.

Every name, shape and type that a training reads back.

Both are made on PyTorch's "meta" device, where tensors have a shape and no memory: no weight is
drawn, no thread starts that a loader's fork would not survive, and a ResNet50 with one step of its
optimizer takes 0.2 s.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from wds_train.config.recipe import ModelRecipe, Recipe
from wds_train.errors import RunError, UsageError
from wds_train.models.model import create_model, create_optimizer
from wds_train.schema import NOUNS

META = torch.device("meta")


def refuse_other_state(
    tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any], recipe: Recipe, classes: int
) -> None:
    """Raise `RunError` with the entry when a training of `recipe` could not go on from these
    entries of a checkpoint.
    """
    model = _model(recipe.model, classes)
    for part in ("model/", "ema/"):
        _refuse_other_weights(section(tensors, part), model, recipe.model.name, part)
    _refuse_other_optimizer({**tensors, **scalars}, recipe, model)


def refuse_other_weights(
    tensors: Mapping[str, torch.Tensor], recipe: ModelRecipe, classes: int
) -> None:
    """Raise `RunError` with the tensor when `tensors` are not the state of the model."""
    _refuse_other_weights(tensors, _model(recipe, classes), recipe.name, "")


def section(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in entries.items()
        if name.startswith(prefix)
    }


def _refuse_other_weights(
    found: Mapping[str, torch.Tensor], model: nn.Module, model_name: str, part: str
) -> None:
    expected = model.state_dict()
    for name in sorted(found.keys() | expected.keys()):
        there = _kind(found.get(name))
        here = _kind(expected.get(name))
        if there != here:
            raise RunError(f"{part}{name} is {there}, in the model {model_name} it is {here}")


def _refuse_other_optimizer(entries: Mapping[str, Any], recipe: Recipe, model: nn.Module) -> None:
    """Raise `RunError` for an entry that the optimizer does not have so.

    `entries` named optimizer/INDEX/SLOT and group/INDEX/NAME are the optimizer's, others are passed
    over.
    """
    try:
        optimizer = create_optimizer(recipe, model)
    except UsageError:
        return  # it takes a GPU, where there is none: the weights can be exported all the same
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _step(optimizer, parameters)
    state, groups = optimizer.state_dict().values()
    places = {
        "optimizer": {str(i): state.get(i, {}) for i in range(len(parameters))},
        "group": {str(i): group for i, group in enumerate(groups)},
    }

    # Every entry must be one that an optimizer after a step has, of the same shape.
    for name, value in entries.items():
        kind, _, rest = name.partition("/")
        index, _, slot = rest.partition("/")
        if kind not in places:
            continue
        if index not in places[kind] or not slot or (kind == "group" and slot == "params"):
            raise RunError(
                f"{name} is of no parameter of the {len(parameters)} that {recipe.model.name} has"
            )
        own = places[kind][index]
        if slot in own and not _alike(value, own[slot]):
            raise RunError(
                f"{name} is {_kind(value)}, in the optimizer {recipe.optimizer.name} it is "
                f"{_kind(own[slot])}"
            )


def _model(recipe: ModelRecipe, classes: int) -> nn.Module:
    try:
        with META:
            return create_model(recipe, classes, 0, META)
    except UsageError as error:
        raise RunError(str(error)) from error


def _step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """One step, which makes the optimizer's state."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except (
        Exception
    ):  # whatever an optimizer raises that looks at numbers, of which there are none here
        optimizer.state.clear()  # the shapes of its slots go unchecked


def _alike(value: Any, like: Any) -> bool:
    if isinstance(like, tuple | list):
        return isinstance(value, list) and len(value) == len(like) and all(map(_alike, value, like))
    choices = (
        None,
        True,
        False,
    )  # which of them stands for PyTorch's own choice differs from version to version
    if any(value is choice for choice in choices) and any(like is choice for choice in choices):
        return True
    return (_is_number(value) and _is_number(like)) or _kind(value) == _kind(like)


def _is_number(value: Any) -> bool:
    """Return True if it is a number.

    A step's count is a number in one version of PyTorch, and a tensor without dimensions in
    another.
    """
    return value.ndim == 0 if isinstance(value, torch.Tensor) else type(value) in (int, float)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value is None:
        return "absent"
    return "a number" if _is_number(value) else NOUNS.get(type(value), type(value).__name__)
