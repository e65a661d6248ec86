"""What is trained: a timm model, its optimizer and its EMA, built so that a recipe and a seed decide every weight."""

import difflib

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV2
from torch import nn

from wds_train.errors import UsageError
from wds_train.randomness import seed_torch
from wds_train.recipe import EmaRecipe, ModelRecipe, Recipe


def memory_layout(device: torch.device) -> torch.memory_format:
    """channels_last on a GPU: 1.47 x the speed on an RTX 3090 (timm's results/benchmark-train-amp-nhwc). On a CPU it is
    slower: 383 ms against 348 ms for ResNet50, forward and backward over 64 images of 32 px, 2 threads.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def create_model(recipe: ModelRecipe, classes: int, seed: int, device: torch.device) -> nn.Module:
    """The timm model with weights drawn from `seed`, in the device's `memory_layout`."""
    if not timm.is_model(recipe.name):
        near = difflib.get_close_matches(recipe.name, timm.list_models(), n=3)
        raise UsageError(
            f"timm has no model {recipe.name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    seed_torch(seed, "init")
    model = timm.create_model(recipe.name, num_classes=classes, drop_path_rate=recipe.drop_path)
    return model.to(device).to(memory_format=memory_layout(device))


def create_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer of that name; biases and normalisation layers are not decayed (timm's `filter_bias_and_bn`)."""
    wanted = recipe.optimizer
    try:
        return create_optimizer_v2(
            model, opt=wanted.name, lr=recipe.peak_lr, weight_decay=wanted.weight_decay, momentum=wanted.momentum
        )
    except (ValueError, AssertionError) as error:
        raise UsageError(f"timm has no optimizer {wanted.name!r}: {error}") from error


class Ema(ModelEmaV2):
    """timm's ModelEmaV2, updated by one fused pass over all weights instead of three a tensor."""

    def __init__(self, model: nn.Module, recipe: EmaRecipe) -> None:
        super().__init__(model, decay=recipe.decay)
        averages, weights = self.module.state_dict(), model.state_dict()
        # By name: pairing the two by order alone, as timm does, would average unrelated tensors in silence.
        self._floats = [(averages[name], value) for name, value in weights.items() if value.is_floating_point()]
        self._counters = [(averages[name], value) for name, value in weights.items() if not value.is_floating_point()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """average += (1 - decay) * (weight - average); BatchNorm's step counters are copied, not averaged."""
        torch._foreach_lerp_([a for a, _ in self._floats], [w for _, w in self._floats], 1 - self.decay)
        for average, counter in self._counters:
            average.copy_(counter)
