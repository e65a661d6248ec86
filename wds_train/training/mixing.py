"""Augmentation of a batch's normalised images.

Erasing, then mixup or CutMix, in timm's order (its loader erases).

Mixing pairs samples, so that what comes out depends on who is together. The global batch is
therefore cut into groups, each erased and mixed with randomness of its own; ranks own whole groups,
and how many ranks there are changes no pixel.
"""

import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing

from wds_train.config.recipe import Recipe
from wds_train.errors import UsageError
from wds_train.global_rng import generators_kept, point_generators


class Mixing:
    """Erases and mixes the part of a global batch that `rank` of `world` has.

    It has the samples [rank * batch / world, ...), in order.

    Raises `UsageError` when the batch cannot be cut so.
    """

    def __init__(
        self, recipe: Recipe, classes: int, device: torch.device, rank: int, world: int
    ) -> None:
        self._seed = recipe.seed
        self._device = device
        self._mixup = _mixup(recipe, classes)
        erasing = recipe.data.erasing
        self._erase = RandomErasing(erasing, mode="pixel", device=device) if erasing else None
        groups = mix_groups(recipe.batch, world)
        if recipe.batch % world or ((self._mixup or self._erase) and groups % world):
            raise UsageError(
                f"batch = {recipe.batch} cannot be cut for {world} ranks: each needs whole groups "
                f"of an even number of samples, and there are {groups} groups. Let the number of "
                f"ranks be a power of two, and batch a multiple of {2 * world}"
            )
        self._size = recipe.batch // groups
        self._first = rank * groups // world

    @property
    def mixes(self) -> bool:
        """True if targets are distributions, float32 [n, classes], smoothed already, and not class
        numbers.
        """
        return self._mixup is not None

    def __call__(
        self, step: int, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the `images`, float32 [n, 3, h, w], changed in place, and their targets."""
        if self._mixup is None and self._erase is None:
            return images, labels
        targets = []
        parts = zip(images.split(self._size), labels.split(self._size), strict=True)
        with generators_kept(self._device):
            for number, (part, target) in enumerate(parts, start=self._first):
                point_generators(self._device, self._seed, step, "group", number)
                if self._erase is not None:
                    self._erase(part)
                targets.append(self._mixup(part, target)[1] if self._mixup is not None else target)
        return images, torch.cat(targets)


def _mixup(recipe: Recipe, classes: int) -> Mixup | None:
    mix = recipe.mix
    if mix.mixup <= 0 and mix.cutmix <= 0:
        return None
    return Mixup(
        mixup_alpha=mix.mixup,
        cutmix_alpha=mix.cutmix,
        prob=mix.prob,
        switch_prob=mix.switch_prob,
        label_smoothing=recipe.loss.smoothing,
        num_classes=classes,
    )


MIX_GROUPS = 8


def mix_groups(global_batch: int, world: int) -> int:
    """Return the number of groups of consecutive samples that a batch is cut into for mixing.

    It is the largest power of two of at most max(MIX_GROUPS, world) that leaves groups of an even
    size, or 1. The same for any world of up to MIX_GROUPS ranks.
    """
    groups = 1
    while groups * 2 <= max(MIX_GROUPS, world) and global_batch % (groups * 4) == 0:
        groups *= 2
    return groups
