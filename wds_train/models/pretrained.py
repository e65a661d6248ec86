"""Weights of another training: to start from (`model.init`) and to learn from (`distill.teacher`)."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from wds_train.config.recipe import Recipe
from wds_train.errors import StoreError, UsageError, did_you_mean
from wds_train.models.model import create_model, memory_layout
from wds_train.models.weights import Weights

TIMM = "timm:"
CPU, META = torch.device("cpu"), torch.device("meta")


def initialise(model: nn.Module, recipe: Recipe) -> str:
    """Give `model`, of `recipe.model`, the weights that `model.init` names; what to tell the user of it. A head for
    another number of classes stays as it is; `UsageError` when anything else does not fit. On the device "meta", no more
    than that is found out.
    """
    setting, device = recipe.model.init, next(model.parameters()).device
    source, _ = _load("model.init", setting, META if device == META else CPU)
    own, theirs = model.state_dict(), source.state_dict()
    head = [name for name in own.keys() | theirs.keys() if name.startswith(_heads(model))]
    left = head if any(_shape(own, name) != _shape(theirs, name) for name in head) else []
    wrong = [
        f"{name} is {_shape(theirs, name)} there, {_shape(own, name)} here"
        for name in sorted((own.keys() | theirs.keys()) - set(left))
        if _shape(own, name) != _shape(theirs, name)
    ]
    if wrong:
        raise UsageError(
            f"model.init = {setting!r} does not fit the model {recipe.model.name}: {'; '.join(wrong[:3])}"
            + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            + ". Set model.name and its layer options as those weights have them"
        )
    model.load_state_dict(
        own | {name: value for name, value in theirs.items() if name not in left}, assign=device == META
    )
    if left:
        return f"the weights are {setting}'s, but for the head, which has other classes and starts at random"
    return f"the weights are {setting}'s, with the head"


class Teacher:
    """The model that `distill.teacher` names. Raises `UsageError` when it has not `classes` classes."""

    def __init__(self, recipe: Recipe, classes: int, device: torch.device) -> None:
        name = recipe.distill.teacher
        model, (mean, std) = _load("distill.teacher", name, META if device == META else CPU)
        if model.num_classes != classes:
            raise UsageError(
                f"distill.teacher = {name!r} knows {model.num_classes} classes, the dataset has {classes}; choose a teacher "
                "that was trained on these classes"
            )
        self.fingerprint = "" if device == META else _fingerprint(model)
        model = model.eval().requires_grad_(False)
        self._model = model.to(device).to(memory_format=memory_layout(device))
        # Images come normalised for the student, and the teacher may have learned with another mean and deviation.
        own_mean, own_std = torch.tensor(recipe.data.mean), torch.tensor(recipe.data.std)
        self._scale = (own_std / torch.tensor(std)).view(3, 1, 1).to(device)
        self._shift = ((own_mean - torch.tensor(mean)) / torch.tensor(std)).view(3, 1, 1).to(device)

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """The teacher's logits, float32 [n, classes], for images that are normalised as the recipe says."""
        return self._model(images * self._scale + self._shift).float()


def _load(
    setting: str, source: str, device: torch.device
) -> tuple[nn.Module, tuple[tuple[float, ...], tuple[float, ...]]]:
    """The model that `source` names, with its weights, on the CPU; the mean and deviation that its images had. On the
    device "meta" the weights are fetched, and then let go.
    """
    if not source.startswith(TIMM):
        weights = Weights.read(Path(source))
        recipe = weights.recipe
        model = create_model(recipe.model, len(weights.classes), recipe.seed, device)
        model.load_state_dict(weights.tensors, assign=device == META)
        return model, (recipe.data.mean, recipe.data.std)
    name = source.removeprefix(TIMM)
    if not timm.is_model(name) or not timm.is_model_pretrained(name):
        raise UsageError(
            f"{setting} = {source!r}: timm has no pretrained weights of that name"
            + did_you_mean(name, timm.list_pretrained())
        )
    try:
        with device, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter", category=UserWarning)
            model = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the hub's client and its HTTP library raise: it depends on their versions
        raise StoreError(
            f"{setting} = {source!r}: the weights could not be fetched ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}); let this machine reach "
            "the Hugging Face hub, or name a file of `wds-train export`"
        ) from error
    config: Any = model.pretrained_cfg
    return model, (tuple(config["mean"]), tuple(config["std"]))


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the last layer's tensors."""
    config: Any = model.pretrained_cfg
    named = config["classifier"]
    return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))


def _shape(tensors: dict[str, torch.Tensor], name: str) -> list[int] | str:
    return list(tensors[name].shape) if name in tensors else "absent"


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()
