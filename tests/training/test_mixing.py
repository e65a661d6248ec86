"""Erasing and mixing: the same pixels whatever the number of ranks, timm's own objects, nothing drawn from outside."""

import random

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing

from wds_train.config.presets import preset
from wds_train.config.recipe import Recipe
from wds_train.config.settings import with_settings
from wds_train.errors import UsageError
from wds_train.rng import key
from wds_train.training.mixing import Mixing, mix_groups

CPU = torch.device("cpu")
ALL = ("batch=32", "mix.mixup=0.4", "mix.cutmix=1", "data.erasing=0.5", "seed=3")


def recipe(*settings: str) -> Recipe:
    return with_settings(preset("digits"), list(settings))


def inputs(samples: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    return torch.randn(samples, 3, 16, 16, generator=made), torch.randint(
        0, 10, (samples,), generator=made
    )


def mixed(given: Recipe, step: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What all ranks make of one global batch."""
    images, labels = inputs(given.batch)
    part = given.batch // world
    done = [
        Mixing(given, 10, CPU, rank, world)(
            step, images[rank * part :][:part], labels[rank * part :][:part]
        )
        for rank in range(world)
    ]
    return torch.cat([one for one, _ in done]), torch.cat([target for _, target in done])


@pytest.mark.parametrize("settings", [ALL, ALL[:3], (ALL[0], ALL[3], ALL[4])])
def test_any_number_of_ranks_mixes_alike(settings: tuple[str, ...]) -> None:
    images, targets = mixed(recipe(*settings), 5, 1)
    assert not torch.equal(images, inputs()[0])
    for world in (2, 4, 8):
        again, theirs = mixed(recipe(*settings), 5, world)
        assert torch.equal(images, again)
        assert torch.equal(targets, theirs)
    assert not torch.equal(images, mixed(recipe(*settings), 6, 1)[0])
    assert not torch.equal(images, mixed(recipe(*settings, "seed=4"), 5, 1)[0])


def test_each_group_is_what_timm_makes_of_it() -> None:
    """timm's prefetch loader erases normalised images, its training loop then mixes them."""
    images, targets = mixed(recipe(*ALL), 5, 1)
    ours, labels = inputs()
    erase = RandomErasing(0.5, mode="pixel", device="cpu")
    mix = Mixup(mixup_alpha=0.4, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
    for group in range(8):
        at = slice(4 * group, 4 * group + 4)
        seed = key(3, 5, "group", group)
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        torch.manual_seed(seed % (1 << 63))
        theirs, target = mix(erase(ours[at].clone()), labels[at])
        assert torch.equal(images[at], theirs)
        assert torch.equal(targets[at], target)


def test_groups_draw_apart() -> None:
    """Eight equal groups come out unequal."""
    images, labels = inputs(4)
    done, _ = Mixing(recipe(*ALL), 10, CPU, 0, 1)(0, images.repeat(8, 1, 1, 1), labels.repeat(8))
    assert len({tuple(group.flatten().tolist()) for group in done.split(4)}) == 8


def test_generators_are_given_back() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index, union-attr]
    mixed(recipe(*ALL), 5, 1)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index, union-attr]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize(
    ("batch", "world", "groups"),
    [
        (64, 1, 8),
        (64, 8, 8),
        (64, 16, 16),
        (64, 32, 32),
        (64, 64, 32),
        (12, 1, 2),
        (12, 2, 2),
        (6, 1, 1),
        (7, 1, 1),
    ],
)
def test_group_counts(batch: int, world: int, groups: int) -> None:
    assert mix_groups(batch, world) == groups


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"batch = 12 cannot be cut for 4 ranks: .* 2 groups.* a multiple of 8"
    ):
        Mixing(recipe("batch=12", "mix.mixup=0.2"), 10, CPU, 0, 4)
    with pytest.raises(UsageError, match="batch = 48 cannot be cut for 3 ranks"):
        Mixing(recipe("batch=48", "data.erasing=0.2"), 10, CPU, 0, 3)
    with pytest.raises(UsageError, match="batch = 16 cannot be cut for 3 ranks"):
        Mixing(recipe("batch=16"), 10, CPU, 0, 3)
    Mixing(recipe("batch=48"), 10, CPU, 0, 3)  # nothing is paired
