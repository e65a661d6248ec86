"""One device's arithmetic: resumes are exact, the EMA is as defined, every draw is derived."""

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV2

from wds_train.config.presets import preset
from wds_train.config.recipe import EmaRecipe, Recipe
from wds_train.config.schedule import average_decay
from wds_train.config.settings import with_settings
from wds_train.dataset.reader import Dataset
from wds_train.errors import DataError, RunError, UsageError
from wds_train.loader.batch import Batch, Unreadable
from wds_train.loader.pipeline import Pipeline
from wds_train.loader.plan import EvalPlan
from wds_train.loader.transform import EvalTransform
from wds_train.training.engine import Trainer

CPU = torch.device("cpu")
TINY = [
    "model.name=test_resnet",
    "schedule.epochs=2",
    "schedule.warmup_epochs=1",
    "mix.mixup=0.2",
    "mix.cutmix=1",
    "optimizer.name=sgd",
    "optimizer.lr=0.1",
    "optimizer.weight_decay=5e-4",
    "batch=8",
]


def recipe(*settings: str) -> Recipe:
    return with_settings(preset("digits"), [*TINY, *settings])


def trainer(*settings: str) -> Trainer:
    return Trainer(recipe(*settings), 10, steps_per_epoch=10, device=CPU)


def batch(step: int, unreadable: int = 0) -> Batch:
    rng = np.random.default_rng(step)
    images = torch.from_numpy(rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    ids = np.arange(8)
    named = [
        Unreadable(i, "train/shard-000000.tar", f"key{i}", "it is broken")
        for i in range(unreadable)
    ]
    return Batch(step, ids, ids, images, torch.from_numpy(rng.integers(0, 10, 8)), named)


def assert_same_state(one: Trainer, other: Trainer) -> None:
    first = one.snapshot()
    second = other.snapshot()
    assert first.tensors.keys() == second.tensors.keys()
    assert [
        name for name in first.tensors if not torch.equal(first.tensors[name], second.tensors[name])
    ] == []
    assert (first.progress, first.extra) == (second.progress, second.extra)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "lamb", "adamw"])
def test_resuming_between_any_two_steps_is_exact(optimizer: str) -> None:
    settings = (f"optimizer.name={optimizer}", "optimizer.lr=0.01", "model.drop_path=0.2")
    unbroken = trainer(*settings)
    first = trainer(*settings)
    for step in range(6):
        unbroken.step(batch(step))
    for step in range(3):
        first.step(batch(step))
    encoded = first.snapshot().encode()
    torch.manual_seed(99)  # whatever a fresh process has in its generators
    np.random.seed(99)
    second = trainer(*settings)
    second.restore(type(first.snapshot()).decode(encoded, first.snapshot().progress))
    assert_same_state(first, second)
    for step in range(3, 6):
        second.step(batch(step))
    assert_same_state(unbroken, second)


def test_a_snapshot_does_not_change_with_the_training() -> None:
    running = trainer()
    running.step(batch(0))
    snapshot = running.snapshot()
    before = {name: value.clone() for name, value in snapshot.tensors.items()}
    running.step(batch(1))
    assert all(torch.equal(before[name], value) for name, value in snapshot.tensors.items())


def test_the_seed_decides_the_initial_weights() -> None:
    assert_same_state(trainer(), trainer())
    one = trainer().model.state_dict()
    other = trainer("seed=1").model.state_dict()
    assert not torch.equal(one["fc.weight"], other["fc.weight"])


def test_the_ema_is_the_weighted_mean_of_all_weights_seen() -> None:
    """Against the sum that it stands for, in float64, with the decay's warm-up."""
    running = trainer("ema.decay=0.5")
    expected = running.model.get_parameter("fc.weight").detach().double().clone()
    for step in range(5):
        running.step(batch(step))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = (
            decay * expected
            + (1 - decay) * running.model.get_parameter("fc.weight").detach().double()
        )
    actual = running.ema.module.get_parameter("fc.weight").double()
    assert torch.allclose(actual, expected, rtol=0, atol=1e-7)
    counted = [name for name in running.model.state_dict() if name.endswith("num_batches_tracked")]
    assert counted
    assert all(running.ema.module.state_dict()[name] == 5 for name in counted)


def test_the_ema_equals_timms_own_update() -> None:
    running = trainer("ema.decay=0.9")
    plain = ModelEmaV2(running.model)
    for step in range(5):
        running.step(batch(step))
        plain.decay = average_decay(EmaRecipe(decay=0.9), step, 1000) or 0.0
        plain.update(running.model)
    for name, value in plain.module.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(
                running.ema.module.state_dict()[name], value, rtol=1e-5, atol=1e-7
            ), name


def test_the_ema_scores_the_same_after_a_resume(digits: Dataset) -> None:
    split = digits.split("val")
    loader = Pipeline(split, EvalPlan(len(split), 64), EvalTransform(32, 1.0), 0)
    running = trainer()
    for step in range(4):
        running.step(batch(step))
    before = running.evaluate(loader, len(split))
    resumed = trainer()
    resumed.restore(running.snapshot())
    assert resumed.evaluate(loader, len(split)) == before
    assert before["val/loss"] != before["val/loss_ema"]


def test_validation_against_a_plain_count(digits: Dataset) -> None:
    split = digits.split("val")
    loader = Pipeline(split, EvalPlan(len(split), 64), EvalTransform(32, 1.0), 0)
    running = trainer()
    metrics = running.evaluate(loader, len(split))
    hits = hits5 = 0
    with torch.inference_mode():
        for each in loader:
            logits = running.model(running.normalise(each.images))
            for row, label in zip(logits.tolist(), each.labels.tolist(), strict=True):
                place = sorted(row, reverse=True).index(row[label])
                hits = hits + (place == 0)
                hits5 = hits5 + (place < 5)
    assert metrics["val/top1"] == pytest.approx(100 * hits / 360)
    assert metrics["val/top5"] == pytest.approx(100 * hits5 / 360)
    with pytest.raises(RunError, match="validation saw 360 samples of 361"):
        running.evaluate(loader, 361)


def test_an_unreadable_validation_sample_counts_as_wrong() -> None:
    running = trainer()
    whole = batch(0)
    part = batch(0, unreadable=8)
    assert running.evaluate([part], 8)["val/top5"] == 0.0
    assert running.evaluate([whole], 8)["val/top5"] > 0.0


def test_too_many_unreadable_samples_stop_the_run() -> None:
    running = trainer("data.max_bad=0.05")  # 80 samples an epoch: 4 may be unreadable
    running.step(batch(0, unreadable=4))
    with pytest.raises(
        DataError,
        match=r"5 of the 80 samples .* data.max_bad = 0.05; the last: train/shard-000000.tar, key key0: "
        r"it is broken",
    ):
        running.step(batch(1, unreadable=1))


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    running = trainer("optimizer.lr=1e30")
    with pytest.raises(
        RunError,
        match=r"the training loss is (nan|inf) by step \d+; lower optimizer.lr \(now 1e\+30\)",
    ):
        for step in range(10):
            running.step(batch(step))
            running.epoch_loss()


def test_unknown_names_are_refused_with_near_ones() -> None:
    with pytest.raises(UsageError, match=r"timm has no model 'resnet5O'; did you mean .*resnet50"):
        trainer("model.name=resnet5O")
    with pytest.raises(UsageError, match="timm has no optimizer 'sgdd'"):
        trainer("optimizer.name=sgdd")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the checkpoint does not fit the model test_resnet"):
        trainer().restore(trainer("model.name=resnet18").snapshot())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["model.name=vit_tiny_patch16_224"],
            r"data.size = 32 cannot work: vit_tiny_patch16_224 takes no images of that size "
            r"\(Input height",
        ),
        (
            ["model.blur_pool=true", "data.eval_size=16"],
            r"data.eval_size = 16 cannot work: test_resnet takes no images",
        ),
    ],
)
def test_sizes_that_the_model_cannot_take_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trainer(*settings)
