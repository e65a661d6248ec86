"""The model of a training: a timm model, its optimizer and its EMA, built so that a recipe and a
seed decide every weight.
"""

from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.utils import ModelEmaV2
from torch import nn
from torch.optim import SGD, Adam, AdamW

from wds_train.config.recipe import EmaRecipe, ModelRecipe, Recipe
from wds_train.errors import UsageError, did_you_mean
from wds_train.images.normalise import memory_layout
from wds_train.rng import key

# Second derivatives; lists of factors and a generator of its own.
_NOT_RESUMABLE = ("adahessian", "kron")


def create_model(
    recipe: ModelRecipe, classes: int, seed: int, device: torch.device, **more: Any
) -> nn.Module:
    """Return the timm model with weights drawn from `seed`, in the device's `memory_layout`; on the
    device "meta" without any. `model.init` is not looked at. `more` is for timm's `create_model`.
    """
    if not timm.is_model(recipe.name):
        raise UsageError(
            f"timm has no model {recipe.name!r}" + did_you_mean(recipe.name, timm.list_models())
        )
    layers = recipe.layers()
    if layers and timm.models.model_entrypoint(recipe.name).__module__ != "timm.models.resnet":
        asked = " and ".join(f"model.{name}" for name in layers)
        raise UsageError(
            f"{asked} cannot be had with {recipe.name}: choose one of timm's ResNets, such as "
            "resnet50"
        )
    arguments = recipe.timm_arguments()
    if "aa_layer" in arguments:
        arguments["aa_layer"] = getattr(timm.layers, arguments["aa_layer"])
    if recipe.drop_path:
        arguments["drop_path_rate"] = recipe.drop_path
    # The CPU's generator, where the weights are drawn.
    torch.default_generator.manual_seed(key(seed, "init") % (1 << 63))
    try:
        with torch.device("meta" if device.type == "meta" else "cpu"):
            model = timm.create_model(recipe.name, num_classes=classes, **arguments, **more)
    except TypeError as error:
        raise UsageError(
            f"{recipe.name} cannot be built with model.drop_path = {recipe.drop_path}: {error}"
        ) from error
    return model.to(device).to(memory_format=memory_layout(device))


@torch.no_grad()
def refuse_sizes(model: nn.Module, name: str, sides: dict[str, int]) -> None:
    """Raise `UsageError` when `model` cannot take images of `sides`, pixels by the setting that
    asks for them: transformers take one size alone, and small images leave deep layers nothing to
    pool. Nothing of the model changes.
    """
    was_training = model.training
    weight = next(model.parameters())
    model.eval()
    for setting, side in sides.items():
        try:
            model(torch.zeros(1, 3, side, side, device=weight.device))
        except (AssertionError, RuntimeError) as error:
            raise UsageError(
                f"{setting} = {side} cannot work: {name} takes no images of that size ({error})"
            ) from error
    model.train(was_training)


def create_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Make timm's optimizer of that name.

    Biases, normalisation layers and what the model itself excepts (ViTs: the position embedding)
    are not decayed (timm's `filter_bias_and_bn`).
    """
    wanted = recipe.optimizer
    known = [str(name) for name in list_optimizers()]
    usable = [name for name in known if not name.startswith(_NOT_RESUMABLE)]
    # timm's own message would not name near ones.
    if wanted.name not in usable:
        cause = f"timm has no optimizer {wanted.name!r}"
        if wanted.name in known:
            cause = (
                f"timm's optimizer {wanted.name!r} cannot be used: its state does not fit in a "
                "checkpoint"
            )
        raise UsageError(cause + did_you_mean(wanted.name, usable))
    try:
        return create_optimizer_v2(
            model,
            opt=wanted.name,
            lr=recipe.peak_lr,
            weight_decay=wanted.weight_decay,
            momentum=wanted.momentum,
            layer_decay=None if wanted.layer_decay == 1 else wanted.layer_decay,
            **_implementation(wanted.name, next(model.parameters()).device),
        )
    except (ValueError, AssertionError) as error:
        raise UsageError(
            f"timm's optimizer {wanted.name!r} cannot be used here: {error}"
        ) from error


def _implementation(name: str, device: torch.device) -> dict[str, Any]:
    """Return what asks for the fastest form of the optimizer: on a GPU, one kernel for all weights
    where torch has it, which also lets fp16 skip a step without asking the GPU; timm's own
    optimizers choose their multi-tensor forms themselves. CPUs keep what they had, to the last bit.
    """
    fused = device.type == "cuda" and get_optimizer_class(name, bind_defaults=False) in (
        SGD,
        Adam,
        AdamW,
    )
    return {"fused": True} if fused else {}


class Ema(ModelEmaV2):
    """timm's ModelEmaV2, updated by one fused pass over all weights instead of three a tensor."""

    def __init__(self, model: nn.Module, recipe: EmaRecipe) -> None:
        super().__init__(model, decay=recipe.decay)
        averages = self.module.state_dict()
        weights = model.state_dict()
        # By name: pairing the two by order alone, as timm does, would average unrelated tensors in
        # silence.
        self._floats = [
            (averages[name], value) for name, value in weights.items() if value.is_floating_point()
        ]
        self._counters = [
            (averages[name], value)
            for name, value in weights.items()
            if not value.is_floating_point()
        ]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Average once more: average += (1 - decay) * (weight - average); BatchNorm's step counters
        are copied, not averaged.
        """
        torch._foreach_lerp_(
            [a for a, _ in self._floats], [w for _, w in self._floats], 1 - self.decay
        )
        if self._counters:  # torch takes no empty list
            torch._foreach_copy_(
                [average for average, _ in self._counters],
                [counter for _, counter in self._counters],
            )
