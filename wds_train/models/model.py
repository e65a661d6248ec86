"""The model of a training: a timm model, its optimizer and its EMA.

A recipe and a seed decide every weight. `training/engine.py` builds all three from here.
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

# Optimizers whose state does not fit in a checkpoint: the first takes second derivatives, the other
# keeps lists of factors and a generator.
_NOT_RESUMABLE = ("adahessian", "kron")


def create_model(
    recipe: ModelRecipe, classes: int, seed: int, device: torch.device, **more: Any
) -> nn.Module:
    """Create a timm model, with weights drawn from a seed.

    Args:
        recipe: The model and its options. `init` is not looked at.
        classes: The number of its outputs.
        seed: The seed of the weights.
        device: Where the model goes, in the device's `memory_layout`. On "meta" it has no weights.
        more: Further arguments of timm's `create_model`.

    Raises:
        UsageError: timm has no such model, or it cannot have these options.
    """
    # A model that timm has, with options that it can have.
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

    # The options as arguments of timm, which wants a class where a recipe has its name.
    arguments = recipe.timm_arguments()
    if "aa_layer" in arguments:
        arguments["aa_layer"] = getattr(timm.layers, arguments["aa_layer"])
    if recipe.drop_path:
        arguments["drop_path_rate"] = recipe.drop_path

    # The weights are always drawn on the CPU, by its generator: a GPU would draw others.
    torch.default_generator.manual_seed(key(seed, "init") % (1 << 63))
    drawn_on = "cpu"
    if device.type == "meta":
        drawn_on = "meta"
    try:
        with torch.device(drawn_on):
            model = timm.create_model(recipe.name, num_classes=classes, **arguments, **more)
    except TypeError as error:
        raise UsageError(
            f"{recipe.name} cannot be built with model.drop_path = {recipe.drop_path}: {error}"
        ) from error
    return model.to(device).to(memory_format=memory_layout(device))


@torch.no_grad()
def refuse_sizes(model: nn.Module, name: str, sides: dict[str, int]) -> None:
    """Raise `UsageError` if a model cannot take images of some sizes.

    Transformers take one size alone, and small images leave deep layers nothing to pool. Nothing of
    the model changes.

    Args:
        model: The model, which is tried.
        name: Its name, for the message.
        sides: Sides of images, in pixels, by the setting that asks for them.
    """
    # In evaluation mode: BatchNorm would average over the zeros.
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
    """Create the optimizer of a recipe, one of timm's.

    Biases, normalisation layers and what the model itself excepts (ViTs: the position embedding)
    are not decayed (timm's `filter_bias_and_bn`).

    Args:
        recipe: The recipe of the training.
        model: The model, on the device that it is trained on.

    Raises:
        UsageError: timm has no such optimizer, or it cannot be used here.
    """
    # timm's own message would not name similar ones.
    wanted = recipe.optimizer
    known = list(map(str, list_optimizers()))
    usable = [name for name in known if not name.startswith(_NOT_RESUMABLE)]
    if wanted.name not in usable:
        cause = f"timm has no optimizer {wanted.name!r}"
        if wanted.name in known:
            cause = (
                f"timm's optimizer {wanted.name!r} cannot be used: its state does not fit in a "
                "checkpoint"
            )
        raise UsageError(cause + did_you_mean(wanted.name, usable))

    # A decay of 1 would make a group of parameters for each layer, all with the same rate.
    layer_decay = None
    if wanted.layer_decay != 1:
        layer_decay = wanted.layer_decay
    try:
        return create_optimizer_v2(
            model,
            opt=wanted.name,
            lr=recipe.peak_lr,
            weight_decay=wanted.weight_decay,
            momentum=wanted.momentum,
            layer_decay=layer_decay,
            **_implementation(wanted.name, next(model.parameters()).device),
        )
    except (ValueError, AssertionError) as error:
        raise UsageError(
            f"timm's optimizer {wanted.name!r} cannot be used here: {error}"
        ) from error


def _implementation(name: str, device: torch.device) -> dict[str, Any]:
    """Return the arguments that ask for the fastest form of an optimizer.

    On a GPU it is one kernel for all weights, if torch has it. That also lets fp16 skip a step
    without asking the GPU. timm's own optimizers choose their multi-tensor forms themselves. On
    CPUs nothing is asked for: another form would change a run's bits.
    """
    if device.type != "cuda":
        return {}
    if get_optimizer_class(name, bind_defaults=False) not in (SGD, Adam, AdamW):
        return {}
    return {"fused": True}


class Ema(ModelEmaV2):
    """timm's ModelEmaV2, updated by one fused pass over all weights instead of three a tensor.

    Args:
        model: The model whose weights are averaged.
        recipe: The decay.
    """

    def __init__(self, model: nn.Module, recipe: EmaRecipe) -> None:
        super().__init__(model, decay=recipe.decay)
        averages = self.module.state_dict()
        self._averages: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        self._copied_counters: list[torch.Tensor] = []
        self._counters: list[torch.Tensor] = []
        # By name: pairing the two by order alone, as timm does, would average unrelated tensors in
        # silence.
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self._averages.append(averages[name])
                self._weights.append(value)
            else:
                self._copied_counters.append(averages[name])
                self._counters.append(value)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the averages: average += (1 - decay) * (weight - average).

        BatchNorm's step counters are copied, not averaged.

        Args:
            model: The model that this was made of. Its tensors are known already.
        """
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)
        if self._counters:  # torch takes no empty list
            torch._foreach_copy_(self._copied_counters, self._counters)
