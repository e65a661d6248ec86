"""Checks that the tensors in a file are those of a recipe's model and optimizer.

All names, shapes and types that a training reads back are compared. A checkpoint is checked before
a run is resumed from it, an exported file before it is used.

The model and the optimizer are made on PyTorch's "meta" device, where tensors have a shape and no
memory: no weight is drawn, no thread starts that a loader's fork would not survive, and a ResNet50
with one step of its optimizer takes 0.2 s.
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
# Values of an optimizer's options that stand for "PyTorch chooses": which one does so differs from
# version to version.
FREE_CHOICES = (None, True, False)


def refuse_other_state(
    tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any], recipe: Recipe, classes: int
) -> None:
    """Raise `RunError` if a training cannot go on from the entries of a checkpoint.

    The message has the first entry that does not fit.

    Args:
        tensors: The checkpoint's tensors by name.
        scalars: Its other values by name.
        recipe: The recipe of the training.
        classes: The number of the dataset's classes.
    """
    model = _model(recipe.model, classes)
    for part in ("model/", "ema/"):
        _refuse_other_weights(section(tensors, part), model, recipe.model.name, part)
    _refuse_other_optimizer({**tensors, **scalars}, recipe, model)


def refuse_other_weights(
    tensors: Mapping[str, torch.Tensor], recipe: ModelRecipe, classes: int
) -> None:
    """Raise `RunError` if tensors are not the state of a model.

    Args:
        tensors: The tensors by name.
        recipe: The model.
        classes: The number of its outputs.
    """
    _refuse_other_weights(tensors, _model(recipe, classes), recipe.name, "")


def section(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries whose names begin with `prefix`, by their names without it."""
    found = {}
    for name, value in entries.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = value
    return found


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
    """Raise `RunError` if an entry is not as the optimizer has it.

    Entries named optimizer/INDEX/SLOT and group/INDEX/NAME are the optimizer's. All others are
    passed over.
    """
    # The optimizer as it is after a step, with an entry for each parameter and group.
    try:
        optimizer = create_optimizer(recipe, model)
    except UsageError:
        return  # it takes a GPU, where there is none: the weights can be exported all the same
    parameters: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    _step(optimizer, parameters)
    state, groups = optimizer.state_dict().values()
    places: dict[str, dict[str, Any]] = {"optimizer": {}, "group": {}}
    for number in range(len(parameters)):
        places["optimizer"][str(number)] = state.get(number, {})
    for number, group in enumerate(groups):
        places["group"][str(number)] = group

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
    """Make a step, after which the optimizer has its state."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    # Some optimizers look at numbers, of which there are none on "meta", and raise anything. The
    # shapes of their slots are not checked.
    except Exception:
        optimizer.state.clear()


def _alike(value: Any, like: Any) -> bool:
    """Return True if a value of a checkpoint can stand where the optimizer has `like`."""
    if isinstance(like, tuple | list):
        # JSON has made lists of tuples.
        if not isinstance(value, list) or len(value) != len(like):
            return False
        return all(map(_alike, value, like))
    if _is_free_choice(value) and _is_free_choice(like):
        return True
    if _is_number(value) and _is_number(like):
        return True
    return _kind(value) == _kind(like)


def _is_free_choice(value: Any) -> bool:
    # By identity: 1 equals True, and comparing a tensor gives a tensor.
    return any(value is choice for choice in FREE_CHOICES)


def _is_number(value: Any) -> bool:
    """Return True if it is a number.

    A step's count is a number in one version of PyTorch, and a tensor without dimensions in
    another.
    """
    if isinstance(value, torch.Tensor):
        return value.ndim == 0
    return type(value) in (int, float)


def _kind(value: Any) -> str:
    """Return the dtype and shape of a tensor, or the kind of another value, for messages."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value is None:
        return "absent"
    if _is_number(value):
        return "a number"
    return NOUNS.get(type(value), type(value).__name__)
