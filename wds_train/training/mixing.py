"""Augmentation of a batch's normalised images: erasing, then mixup or CutMix.

The order is timm's (its loader erases).

Mixing pairs samples, so its result depends on the samples that are together. The global batch is
therefore cut into groups, each erased and mixed by random numbers of its own. Ranks own whole
groups: the number of ranks changes no pixel.
"""

import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing

from wds_train.config.recipe import Recipe
from wds_train.errors import UsageError
from wds_train.global_rng import generators_kept, point_generators

# Groups of a batch, for as many ranks at least. More would leave fewer samples to pair.
MIX_GROUPS = 8


class Mixing:
    """Erases and mixes a rank's part of a global batch.

    Args:
        recipe: The recipe; its `mix` and `data.erasing` say how.
        classes: The number of classes.
        device: The device of the images.
        rank: The rank, which has the samples [rank * batch / world, ...), in order.
        world: The number of ranks.

    Raises:
        UsageError: The batch cannot be cut into whole groups for so many ranks.
    """

    def __init__(
        self, recipe: Recipe, classes: int, device: torch.device, rank: int, world: int
    ) -> None:
        self._seed = recipe.seed
        self._device = device
        self._mixup = _mixup(recipe, classes)
        self._erase: RandomErasing | None = None
        if recipe.data.erasing:
            self._erase = RandomErasing(recipe.data.erasing, mode="pixel", device=device)

        # Cut the batch. Without mixing and erasing, ranks may have any equal part of it.
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
        """True if targets are smoothed distributions, float32 [n, classes], not class numbers."""
        return self._mixup is not None

    def __call__(
        self, step: int, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Erase and mix the images of a step.

        Args:
            step: The optimizer step, which the random numbers follow from.
            images: float32 [n, 3, h, w]; they are changed in place.
            labels: int64 [n].

        Returns:
            The images, and their targets: the labels, or distributions where `mixes` is True.
        """
        if self._mixup is None and self._erase is None:
            return images, labels
        targets = []
        parts = zip(images.split(self._size), labels.split(self._size), strict=True)
        with generators_kept(self._device):
            for number, (part, target) in enumerate(parts, start=self._first):
                point_generators(self._device, self._seed, step, "group", number)
                if self._erase is not None:
                    self._erase(part)
                if self._mixup is None:
                    targets.append(target)
                else:
                    # It changes the images in place, too.
                    _, mixed = self._mixup(part, target)
                    targets.append(mixed)
        return images, torch.cat(targets)


def _mixup(recipe: Recipe, classes: int) -> Mixup | None:
    """Make timm's mixup and CutMix as the recipe says; None where it has neither."""
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


def mix_groups(global_batch: int, world: int) -> int:
    """Return the number of groups of consecutive samples that a batch is cut into for mixing.

    It is the largest power of two of at most max(MIX_GROUPS, world) that leaves groups of an even
    size, or 1. It is the same for any number of ranks up to MIX_GROUPS.
    """
    groups = 1
    # mixup and CutMix pair the samples of a group: twice as many groups must still be even ones.
    while groups * 2 <= max(MIX_GROUPS, world) and global_batch % (groups * 4) == 0:
        groups *= 2
    return groups
