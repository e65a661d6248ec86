"""Progressive resizing, repeated augmentation, policies and jitter, through the loader on real bytes."""

import itertools
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_layout import imports_at_the_top, trees
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from torchvision.transforms import ColorJitter, InterpolationMode, TrivialAugmentWide

from wds_train.config.recipe import DataRecipe, ModelRecipe, Recipe, ScheduleRecipe
from wds_train.dataset.reader import Dataset
from wds_train.errors import UsageError
from wds_train.images.policies import apply, policies
from wds_train.loader.batch import Batch
from wds_train.loader.cache import BlockCache
from wds_train.loader.mixture import Mixture
from wds_train.loader.pipeline import Pipeline
from wds_train.loader.plan import TrainPlan, split_batch
from wds_train.loader.transform import TrainTransform
from wds_train.rng import key
from wds_train.training.engine import Trainer
from wds_train.training.options import TrainOptions
from wds_train.training.run_training import train
from wds_train.training.stop_request import StopRequest

BATCH, SIDE = 48, 24
PLAIN = DataRecipe(size=SIDE, scale=(0.3, 1.0))
POLICIES = [
    {"auto_augment": "rand-m6-mstd0.5-inc1"},
    {"auto_augment": "original"},
    {"auto_augment": "3a"},
    {"auto_augment": "trivial"},
    {"color_jitter": (0.4, 0.4, 0.4, 0.1)},
    {"auto_augment": "trivial", "color_jitter": (0.4, 0.4, 0.4, 0.1)},
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """More would fight those of whatever else the machine does: five times the time on a busy one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


def transform_of(data: DataRecipe, epochs: int = 4) -> TrainTransform:
    schedule = ScheduleRecipe(epochs=epochs, warmup_epochs=0)
    recipe = Recipe("test", batch=BATCH, data=data, schedule=schedule)
    return TrainTransform(recipe.data, recipe.seed, recipe.schedule.epochs, 1437 // BATCH)


def loaded(
    dataset: Dataset,
    data: DataRecipe,
    *,
    workers: int = 0,
    cache: BlockCache | None = None,
    steps: int | None = None,
    **changes: object,
) -> list[Batch]:
    """The first batches of `data`'s first pass over the digits, or as the plan's `changes` say."""
    split = dataset.split("train")
    plan = TrainPlan(
        split.shard_samples,
        dataset.fingerprint,
        0,
        BATCH // data.repeats,
        range(1),
        repeats=data.repeats,
    )
    loader = Pipeline(split, replace(plan, **changes), transform_of(data), workers, cache)  # type: ignore[arg-type]
    return list(itertools.islice(loader, steps))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and np.array_equal(a.ids, b.ids)
        and np.array_equal(a.positions, b.positions)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_the_side_grows_at_the_first_step_of_its_epoch(digits: Dataset, workers: int) -> None:
    """32, 64, 96, 96: halfway along a ramp from 32 to 96 comes 64."""
    data = replace(PLAIN, size=96, start_size=32, size_ramp=(0.0, 0.5))
    batches = loaded(digits, data, workers=workers, epochs=range(4), from_step=28, steps=31)
    sides = {batch.step: tuple(batch.images.shape) for batch in batches}
    assert {step: side for step, side in sides.items() if side != sides.get(step - 1)} == {
        28: (BATCH, 32, 32, 3),
        29: (BATCH, 64, 64, 3),
        58: (BATCH, 96, 96, 3),
    }
    fixed = loaded(digits, replace(data, size=64, start_size=0), epochs=range(1, 2), from_step=29)
    assert same(batches[1:30], fixed)  # as if it had been so all along


def test_repeats_stand_side_by_side_and_each_sample_comes_as_often_in_a_pass(
    digits: Dataset,
) -> None:
    batches = loaded(digits, replace(PLAIN, repeats=3))
    assert len(batches) == 1437 // (BATCH // 3)
    seen: Counter[int] = Counter()
    for batch in batches:
        groups = batch.ids.reshape(-1, 3)
        assert (groups == groups[:, :1]).all() and len(set(groups[:, 0])) == BATCH // 3
        assert (batch.labels.numpy() == digits.split("train").index.label[batch.ids]).all()
        seen.update(batch.ids.tolist())
    assert set(seen.values()) == {3} and len(seen) == len(batches) * BATCH // 3
    assert np.concatenate([batch.positions for batch in batches]).tolist() == list(
        range(len(batches) * BATCH)
    )
    copies = torch.cat([batch.images for batch in batches]).reshape(-1, 3, SIDE * SIDE * 3)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (copies[:, one] != copies[:, other]).any(dim=1).float().mean() > 0.99
    once = loaded(digits, PLAIN, global_batch=BATCH // 3)
    assert [batch.ids[::3].tolist() for batch in batches] == [batch.ids.tolist() for batch in once]


def test_repeats_are_the_same_for_all_workers_ranks_steps_and_caches(
    digits: Dataset, tmp_path: Path
) -> None:
    data = replace(PLAIN, repeats=3, auto_augment="trivial")
    every = loaded(
        digits, data, epochs=range(2), from_step=80, steps=15
    )  # of which 9 are the first pass's
    assert same(loaded(digits, data, from_step=80, workers=3), every[:9])
    assert same(loaded(digits, data, epochs=range(2), from_step=88, workers=1, steps=7), every[8:])
    cache = BlockCache(tmp_path, 1 << 30, digits.split("train"), digits)
    for _ in "cold", "warm":
        assert same(loaded(digits, data, from_step=80, cache=cache), every[:9])
    ranks = [loaded(digits, data, from_step=80, rank=rank, world=2) for rank in range(2)]
    for batch, first, second in zip(every[:9], *ranks, strict=True):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))


def test_a_damaged_sample_is_lost_once_for_each_copy(digits: Dataset, tmp_path: Path) -> None:
    shutil.copytree(digits.store.url, tmp_path / "bad")
    index, names = digits.split("train").index, digits.split("train").shard_names
    with (tmp_path / "bad" / names[index.shard[5]]).open("r+b") as shard:
        shard.seek(int(index.data_offset[5]) + 20)
        shard.write(b"?")
    bad = Dataset.open(str(tmp_path / "bad"))
    batches = loaded(bad, replace(PLAIN, repeats=3, auto_augment="trivial"), workers=2)
    (hit,) = [batch for batch in batches if batch.unreadable]
    assert [entry.sample for entry in hit.unreadable] == [5] * 3
    assert [(image == 128).all().item() for image in hit.images] == (hit.ids == 5).tolist()


@pytest.mark.parametrize(("batch", "repeats"), [(1024, 4), (96, 3), (48, 2), (30, 5)])
def test_a_mixture_shares_whole_samples_among_ranks(batch: int, repeats: int) -> None:
    sizes = split_batch(batch, [0.3], repeats)
    assert sum(sizes) == batch and abs(sizes[1] - 0.3 * batch) <= 8 * repeats
    unit = min(8, batch // repeats & -(batch // repeats))
    assert all(size % (unit * repeats) == 0 for size in sizes)


def test_a_mixture_repeats_and_resizes_alike(digits: Dataset) -> None:
    data = replace(PLAIN, repeats=2, size=64, start_size=32, size_ramp=(0.0, 0.5))
    transform = transform_of(data, epochs=2)

    def batches(from_step: int, steps: int) -> list[Batch]:
        parts = [(digits.split("train"), 16, range(1)), (digits.split("val"), 8, range(99))]
        loaders = [
            Pipeline(
                split,
                TrainPlan(split.shard_samples, split.name, 0, size, epochs, from_step, repeats=2),
                transform,
                0,
            )
            for split, size, epochs in parts
        ]
        return list(itertools.islice(Mixture(loaders, seed=0), steps))

    every = batches(24, 10)
    assert same(batches(30, 4), every[6:])
    assert [batch.images.shape[1] for batch in every] == [32] * 5 + [64] * 5
    for batch in every:
        assert set(
            Counter(zip(batch.labels.tolist(), batch.ids.tolist(), strict=True)).values()
        ) == {2}


def oracle(data: DataRecipe, side: int) -> list[Callable[[Image.Image], Image.Image]]:
    """The same policies, made by hand."""
    settings = {"translate_const": int(side * 0.45), "img_mean": (124, 116, 104)}
    found = []
    if data.auto_augment == "trivial":
        found.append(TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR))
    elif data.auto_augment.startswith("rand"):
        found.append(rand_augment_transform(data.auto_augment, settings))
    elif data.auto_augment:
        found.append(auto_augment_transform(data.auto_augment, settings))
    return [*found, ColorJitter(*data.color_jitter)] if any(data.color_jitter) else found


@pytest.mark.parametrize("changes", POLICIES, ids=str)
def test_a_policy_is_its_librarys_own_with_the_same_seeds(
    digits: Dataset, changes: dict[str, Any]
) -> None:
    data = replace(PLAIN, **changes)
    plain, changed = loaded(digits, PLAIN, from_step=26), loaded(digits, data, from_step=26)
    functions, differ = oracle(data, SIDE), 0
    for before, after in zip(plain, changed, strict=True):
        for position, old, new in zip(
            before.positions.tolist(), before.images, after.images, strict=True
        ):
            bits = key(0, "policy", 0, position)
            random.seed(bits >> 64)
            np.random.seed(bits % (1 << 32))
            torch.manual_seed((bits >> 32) % (1 << 32))
            image = Image.fromarray(old.numpy())
            for function in functions:
                image = function(image)
            assert np.array_equal(new.numpy(), np.asarray(image))
            differ += not torch.equal(old, new)
    assert differ > 0.3 * 3 * BATCH


@pytest.mark.parametrize("changes", [POLICIES[0], POLICIES[-1]], ids=str)
def test_a_policy_does_the_same_for_all_workers_and_after_a_resume(
    digits: Dataset, changes: dict[str, Any]
) -> None:
    data = replace(PLAIN, **changes)
    every = loaded(digits, data, steps=6)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    for workers in (1, 3):
        assert same(loaded(digits, data, workers=workers, steps=6), every)
    assert same(loaded(digits, data, from_step=2, steps=4), every[2:])


@pytest.mark.parametrize("changes", [POLICIES[0], POLICIES[-1]], ids=str)
def test_an_image_is_changed_by_a_key_of_its_own(changes: dict[str, Any]) -> None:
    transform = transform_of(replace(PLAIN, **changes))
    other = replace(transform, seed=1)
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    results = Counter()
    for made, epoch, position in [(transform, 0, p) for p in range(40)] + [
        (transform, 1, 7),
        (other, 0, 7),
    ]:
        out = pixels.copy()
        made.augment(epoch, position, out)
        results[out.tobytes()] += 1
    assert len(results) > 25  # some draw nothing, or the operation that changes nothing


def test_the_global_generators_go_on_where_they_were(digits: Dataset) -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), np.random.random(), torch.rand(1).item()

    def seed() -> None:
        random.seed(3), np.random.seed(3), torch.manual_seed(3)

    data = replace(PLAIN, auto_augment="rand-m9-mstd0.5", color_jitter=(0.4, 0.4, 0.4, 0.1))
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    seed()
    expected = draws()
    seed()
    apply(policies(data, SIDE), pixels, 0)
    assert draws() == expected
    seed()
    with pytest.raises(ZeroDivisionError):
        apply((*policies(data, SIDE), lambda image: 1 / 0), pixels, 0)  # type: ignore[arg-type,return-value]
    assert draws() == expected


def test_nothing_asked_for_changes_nothing_and_imports_nothing() -> None:
    assert policies(replace(PLAIN, color_jitter=(0.0, 0.0, 0.0, 0.0)), SIDE) == ()
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    out = pixels.copy()
    transform_of(PLAIN).augment(0, 0, out)
    assert (out == pixels).all()
    for module in ("loader.pipeline", "loader.decoder", "loader.transform", "images.policies"):
        outside = imports_at_the_top(trees()[f"wds_train.{module}"])
        assert not outside & {"timm", "torchvision"}, module


@pytest.mark.parametrize("name", ["rand-m10-inc1-n9-p1", "rand-m1-n9-p1", "v0-mstd5"])
def test_magnitudes_that_leave_no_bits_make_black_and_no_exception(name: str) -> None:
    data = DataRecipe(auto_augment=name)
    for number in range(100):
        apply(policies(data, 8), np.full((8, 8, 3), 200, np.uint8), number)


@pytest.mark.parametrize(
    "name",
    [
        "rnd-m9",
        "rand-m",
        "rand-9",
        "rand-m9-mstd",
        "rand-x3",
        "rand-tall",
        "rand-n0",
        "orignal",
        "original-m3",
    ],
)
def test_an_unknown_policy_is_refused_before_the_run_is_claimed(
    digits: Dataset, tmp_path: Path, stop: StopRequest, name: str
) -> None:
    recipe = Recipe("test", data=replace(PLAIN, auto_augment=name))
    options = TrainOptions(digits.store.url, str(tmp_path / "run"), recipe, workers=0)
    message = f"data.auto_augment = '{name}' is no policy known; there are rand-m9-mstd0.5-inc1"
    with pytest.raises(UsageError, match=re.escape(message)):
        train(options, stop)
    assert not (tmp_path / "run").exists()


def test_a_batch_of_repeats_that_cannot_be_read_is_refused_with_its_size(digits: Dataset) -> None:
    with pytest.raises(
        UsageError,
        match=r"global batch of 48 \(16 samples, 3 times each\) is read in 16 lanes, which 3",
    ):
        loaded(digits, replace(PLAIN, repeats=3), world=3)
    with pytest.raises(
        UsageError,
        match=r"1437 samples to train on, fewer than one global batch of 1440 \(480 samples, 3 times each\)",
    ):
        loaded(digits, replace(PLAIN, repeats=3), global_batch=480)


@pytest.mark.usefixtures("one_thread")
def test_a_training_gives_its_steps_what_the_recipe_says(
    digits: Dataset, tmp_path: Path, stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs of five steps of 240 images, of 120 samples each: 1200 of the 1437, twice. 8 px, then 16."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WDS_HOME", str(tmp_path / "home"))
    seen: list[Batch] = []
    step = Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda self, batch: seen.append(batch) or step(self, batch)
    )
    data = replace(
        PLAIN,
        size=16,
        start_size=8,
        size_ramp=(0.0, 0.5),
        repeats=2,
        eval_size=8,
        auto_augment="trivial",
    )
    recipe = Recipe(
        "test",
        batch=240,
        model=ModelRecipe(name="test_resnet"),
        data=data,
        schedule=ScheduleRecipe(epochs=2, warmup_epochs=0),
    )
    train(TrainOptions(digits.store.url, str(tmp_path / "run"), recipe, workers=1), stop)
    assert [tuple(batch.images.shape) for batch in seen] == [(240, 8, 8, 3)] * 5 + [
        (240, 16, 16, 3)
    ] * 5
    assert set(Counter(np.concatenate([batch.ids for batch in seen]).tolist()).values()) == {2}
