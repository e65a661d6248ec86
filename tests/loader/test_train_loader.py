"""The loader for a training loop of one's own: the trainer's order and pixels, its state, and what it refuses."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import loops
import numpy as np
import pytest
import torch
import trainers
from torch.utils.data import get_worker_info

import wds_train
from wds_train import Batch, DataError, Dataset, EvalLoader, TrainLoader, WdsTrainError
from wds_train.config.recipe import DataRecipe, Recipe
from wds_train.errors import UsageError
from wds_train.global_rng import drawn_from, generator_states
from wds_train.loader.pipeline import Pipeline
from wds_train.loader.plan import TrainPlan
from wds_train.loader.transform import TrainTransform

BATCH = 64


def loader(dataset: Any, **more: Any) -> TrainLoader:
    return TrainLoader(dataset, **{"batch": BATCH, "epochs": 2, "size": 16, "workers": 0} | more)


def equal(some: list[Batch], others: list[Batch]) -> bool:
    return [batch.step for batch in some] == [batch.step for batch in others] and all(
        torch.equal(one.images, other.images)
        and torch.equal(one.labels, other.labels)
        and np.array_equal(one.ids, other.ids)
        and np.array_equal(one.positions, other.positions)
        for one, other in zip(some, others, strict=True)
    )


@pytest.fixture(scope="module")
def whole(digits: Dataset) -> list[Batch]:
    return list(loader(digits))


def test_batches_are_those_of_the_trainer(digits: Dataset, whole: list[Batch]) -> None:
    split = digits.split("train")
    plan = TrainPlan(split.shard_samples, digits.fingerprint, 0, BATCH, range(2))
    recipe = Recipe("test", BATCH, data=DataRecipe(size=16))
    assert equal(
        whole,
        list(
            Pipeline(
                split,
                plan,
                TrainTransform(
                    recipe.data, recipe.seed, recipe.schedule.epochs, plan.steps_per_epoch
                ),
                0,
            )
        ),
    )
    assert [batch.epoch for batch in whole] == [0] * plan.steps_per_epoch + [
        1
    ] * plan.steps_per_epoch


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (4, 2)])
def test_ranks_and_workers_change_nothing(
    digits: Dataset, whole: list[Batch], world: int, workers: int
) -> None:
    ranks = [
        list(loader(digits, rank=rank, world=world, workers=workers, from_step=30))
        for rank in range(world)
    ]
    for parts, batch in zip(zip(*ranks, strict=True), whole[30:], strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert np.concatenate([part.ids for part in parts]).tolist() == batch.ids.tolist()


def test_a_loop_goes_on_where_it_was_left(digits: Dataset, whole: list[Batch]) -> None:
    """After a break, with the workers that read ahead; after a state is loaded; and where `step` is set."""
    training, seen = loader(digits, workers=2), []
    assert (len(training), training.steps_per_epoch, training.step) == (44, 22, 0)
    for batch in training:
        seen.append(batch)
        assert training.step == batch.step + 1
        if training.step in (3, 10):
            break
    seen += list(training)
    assert equal(seen, whole)
    assert (len(training), list(training)) == (0, [])
    training.step = 42
    assert equal(list(training), whole[42:])
    other = loader(digits, rank=0, world=1)
    other.load_state_dict(json.loads(json.dumps(training.state_dict(40))))
    assert (len(other), other.step) == (4, 40)
    other.start()
    assert equal(list(other), whole[40:])


def test_an_epoch_at_a_time(digits: Dataset, whole: list[Batch]) -> None:
    training = loader(digits, per_epoch=True)
    assert len(training) == 22
    first = list(training)
    assert (len(first), len(training)) == (22, 22)
    assert equal(first + list(training), whole)
    assert (list(training), len(training)) == ([], 0)


def test_killed_on_two_ranks_and_resumed_on_one(digits: Dataset, tmp_path: Path) -> None:
    """Every step's samples and pixels are those of a loop that was never killed, of one process."""

    def run(folder: Path, world: int, dies_at: int | None = None) -> list[int | None]:
        folder.mkdir(exist_ok=True)
        ranks = [
            trainers.CONTEXT.Process(
                target=loops.loop, args=(digits.store.url, folder, rank, world, dies_at)
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        return [process.exitcode for process in ranks]

    def noted(folder: Path, world: int) -> dict[int, list[Any]]:
        """Epoch, samples and the sum of the pixels of each step, over all ranks."""
        ranks = [
            [
                json.loads(line)
                for line in (folder / f"samples-{world}-{rank}.txt").read_text().splitlines()
            ]
            for rank in range(world)
        ]
        return {
            parts[0][0]: [
                parts[0][1],
                [sample for part in parts for sample in part[2]],
                sum(part[3] for part in parts),
            ]
            for parts in zip(*ranks, strict=True)
        }

    assert run(tmp_path / "whole", 1) == [0]
    assert run(tmp_path / "killed", 2, dies_at=27) == [-signal.SIGKILL] * 2
    assert run(tmp_path / "killed", 1) == [0]
    before, after = noted(tmp_path / "killed", 2), noted(tmp_path / "killed", 1)
    assert ([*before], [*after]) == ([*range(28)], [*range(25, 44)])
    assert before | after == noted(tmp_path / "whole", 1)


def test_pixels_normalised(digits: Dataset, whole: list[Batch]) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    (batch,) = list(loader(digits, from_step=43, normalize=(mean, std)))
    expected = (whole[43].images / 255 - torch.tensor(mean)) / torch.tensor(std)
    assert batch.images.dtype == torch.float32
    torch.testing.assert_close(batch.images, expected.permute(0, 3, 1, 2))


def test_a_mixture(digits: Dataset, small: str, captioned: str) -> None:
    mixed = loader(digits, mix=[(digits, 0.25)])
    assert (mixed.shares, mixed.steps_per_epoch) == ([48, 16], 1437 // 48)
    tail = list(loader(digits, mix=[(digits, 0.25)], workers=2, from_step=40))
    assert equal(list(mixed)[40:], tail)
    alone = list(loader(digits, batch=48, from_step=40))
    assert all(set(one.ids) <= set(both.ids) for one, both in zip(alone, tail, strict=True))
    with pytest.raises(UsageError, match="the state is of mix"):
        loader(digits).load_state_dict(mixed.state_dict())
    with pytest.raises(UsageError, match="cannot be mixed"):
        loader(digits, mix=[(captioned, 0.25)])


def crop(image: np.ndarray, key: str, rng: np.random.Generator) -> np.ndarray:
    left = int(rng.integers(0, 8))
    return (image[:8, left : left + 8, :1] * np.float32(rng.random())).astype(np.float32) + int(
        key.split("/", maxsplit=1)[0]
    )


def torchvision_crop(image: np.ndarray, key: str, rng: np.random.Generator) -> torch.Tensor:
    with wds_train.keyed(rng):
        return torch.from_numpy(image.copy()) * torch.rand(()) + random.random()


@pytest.mark.parametrize(
    ("transform", "shape"), [(crop, (8, 8, 1)), (torchvision_crop, (32, 32, 3))]
)
def test_a_function_of_one_s_own_gives_the_same_by_any_workers(
    digits: Dataset, transform: Any, shape: tuple[int, ...]
) -> None:
    one, two = (
        list(loader(digits, transform=transform, workers=workers, from_step=36))
        for workers in (0, 2)
    )
    assert equal(one, two)
    assert (one[0].images.shape, one[0].images.dtype) == ((BATCH, *shape), torch.float32)
    late = list(loader(digits, transform=transform, workers=1, from_step=41, rank=1, world=2))
    assert torch.equal(late[0].images, one[5].images[32:])


def test_a_function_has_the_image_or_its_bytes(digits: Dataset) -> None:
    def sizes(data: bytes, key: str, rng: np.random.Generator) -> int:
        assert data[1:4] == b"PNG"
        return len(data)

    (batch,) = list(loader(digits, from_step=43, transform=sizes, decode=False))
    assert batch.images.tolist() == digits.split("train").index.data_length[batch.ids].tolist()
    shown = EvalLoader(digits, 200, workers=0, transform=lambda image, key, rng: image)
    plain = EvalLoader(digits, 200, workers=0, size=32, crop_ratio=1)
    assert all(
        torch.equal(one.images, other.images) for one, other in zip(shown, plain, strict=True)
    )


def fails(image: np.ndarray, key: str, rng: np.random.Generator) -> np.ndarray:
    return image if key != "5/1517" else image[None][1]


def changes_shape(image: np.ndarray, key: str, rng: np.random.Generator) -> np.ndarray:
    return image if key != "5/1517" else image[1:]


def changes_dtype(image: np.ndarray, key: str, rng: np.random.Generator) -> np.ndarray:
    return image if key != "5/1517" else image.astype(np.float64)


def returns_none(image: np.ndarray, key: str, rng: np.random.Generator) -> None:
    return None


def draws_numpy(image: np.ndarray, key: str, rng: np.random.Generator) -> np.ndarray:
    return image + np.random.randint(0, 2, image.shape, np.uint8)


def draws_python(image: np.ndarray, key: str, rng: np.random.Generator) -> np.ndarray:
    return image + (random.random() < 0.5)


def draws_torch(image: np.ndarray, key: str, rng: np.random.Generator) -> Any:
    return torch.rand(2)


NAMED = r"train/shard-00000\d\.tar, key \d/\d+"
FIFTH = r"train/shard-00000\d\.tar, key 5/1517"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (fails, f"the transform failed on {FIFTH}: IndexError: index 1 is out of bounds"),
        (
            changes_shape,
            rf"returned uint8 \[31, 32, 3\] for {FIFTH}, and uint8 \[32, 32, 3\] for the first sample",
        ),
        (changes_dtype, rf"returned float64 \[32, 32, 3\] for {FIFTH}, and uint8 \[32, 32, 3\]"),
        (
            returns_none,
            f"returned a NoneType for {NAMED}, which is no array of numbers; return one of NumPy",
        ),
        (
            draws_numpy,
            rf"draws from the global generator of numpy\.random \({NAMED}\).* draw from the rng",
        ),
        (draws_python, rf"draws from the global generator of random \({NAMED}\)"),
        (draws_torch, rf"draws from the global generator of torch \({NAMED}\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_function_that_cannot_work_is_refused_with_the_key(
    digits: Dataset, transform: Any, message: str, workers: int
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        list(loader(digits, transform=transform, workers=workers))
    if transform is fails:  # where it failed is told
        cause = caught.value.__cause__
        assert (
            isinstance(cause, IndexError)
            if workers == 0
            else "return image if key" in caught.value.__notes__[0]
        )
    del caught  # it holds this frame, and the loader with its workers, which would go with the garbage collector


def test_one_who_draws_late_is_found(digits: Dataset) -> None:
    """In a worker that has made its first calls."""

    def late(image: np.ndarray, key: str, rng: np.random.Generator) -> np.ndarray:
        calls.append(key)
        return image + (
            np.uint8(np.random.randint(2)) if len(calls) > 40 and get_worker_info() else 0
        )

    calls: list[str] = []
    with pytest.raises(UsageError, match="draws from the global generator"):
        list(loader(digits, transform=late, workers=1))


def test_a_draw_of_somebody_else_is_no_fault_of_the_function(digits: Dataset) -> None:
    """A thread of a library may draw from a global generator during a call."""

    def disturbed(image: np.ndarray, key: str, rng: np.random.Generator) -> np.ndarray:
        calls.append(key)
        return image + (
            0 * np.uint8(random.getrandbits(1)) if len(calls) in (1, 3) else np.uint8(0)
        )

    calls: list[str] = []
    assert len(list(loader(digits, transform=disturbed, from_step=43))) == 1


def test_the_global_generators_of_the_loop_are_left_alone(digits: Dataset) -> None:
    before = generator_states()
    list(loader(digits, transform=torchvision_crop, workers=1, from_step=43))
    list(loader(digits, augment="rand-m9-mstd0.5-inc1", from_step=43))
    assert not drawn_from(before)


def refuses_five(image: np.ndarray, key: str, rng: np.random.Generator) -> np.ndarray:
    if key == "5/1517":
        raise DataError("it is a five")
    return image


def test_unreadable_samples_are_named_and_bounded(
    digits: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    batches = list(loader(digits, transform=refuses_five, workers=1, epochs=2))
    named = [entry for batch in batches for entry in batch.unreadable]
    assert {(entry.key, entry.cause) for entry in named} == {("5/1517", "it is a five")}
    (first,) = [batch for batch in batches if batch.unreadable][:1]
    assert (first.images[np.flatnonzero(first.ids == first.unreadable[0].sample)] == 128).all()
    assert f"unreadable sample: {named[0].shard}, key 5/1517: it is a five" in caplog.text
    with pytest.raises(
        DataError,
        match=r"1 of the 1408 samples of epoch \d .* max_bad = 0; the last: .*key 5/1517: it is a",
    ):
        list(loader(digits, transform=refuses_five, max_bad=0))

    def refuses_all(image: np.ndarray, key: str, rng: np.random.Generator) -> np.ndarray:
        raise DataError("it is of no use")

    with pytest.raises(
        DataError,
        match=r"none of the first 100 samples of .* can be read; the last: it is of no use",
    ):
        list(loader(digits, transform=refuses_all))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "the state is of seed 1, this loader is of 0"),
        ({"batch": 32}, "the state is of batch 32, this loader is of 64"),
        ({"split": "val"}, "the state is of split 'val', this loader is of 'train'"),
        (
            {"epochs": 3, "from_step": 66},
            "the state's step = 66 lies beyond the last of 44 steps; raise epochs",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_state_of_another_loader_is_refused(
    digits: Dataset, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        loader(digits).load_state_dict(loader(digits, **change).state_dict())


def test_a_state_of_another_dataset_or_of_nothing_is_refused(
    digits: Dataset, captioned: str
) -> None:
    with pytest.raises(
        UsageError, match=f"the state is of dataset '.*', this loader is of '{digits.fingerprint}'"
    ):
        loader(digits).load_state_dict(loader(captioned, batch=16).state_dict())
    with pytest.raises(UsageError, match="the state has no 'dataset'"):
        loader(digits).load_state_dict({"step": 3})
    state = loader(digits).state_dict()
    for step in ("3", None, -1, 2.5):
        with pytest.raises(UsageError, match=f"the state's step = {step!r} cannot work"):
            loader(digits).load_state_dict(state | {"step": step})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch = 0 cannot work: it must be a whole number of at least 1"),
        ({"batch": 64.0}, r"batch = 64\.0 cannot work"),
        ({"batch": 4096}, "1437 samples to train on, fewer than one global batch of 4096"),
        ({"batch": 48, "rank": 0, "world": 3}, "read in 16 lanes, which 3 ranks cannot share"),
        ({"rank": 2, "world": 2}, "rank = 2 cannot work: ranks of world = 2 are 0 to 1"),
        ({"rank": 2}, "rank = 2 and world = None belong together"),
        ({"epochs": 0}, "epochs = 0 cannot work"),
        ({"from_step": 45}, "from_step = 45 lies beyond the last of 44 steps"),
        ({"workers": -1}, "workers = -1 cannot work"),
        ({"split": "vol"}, "no split 'vol'; it has train, val"),
        ({"size": 4}, r"size = 4 cannot work: it must be at least 8 pixels"),
        ({"augment": "rand-x"}, "'rand-x' is no policy known"),
        ({"device": "gpu"}, "device = 'gpu' is none of PyTorch's"),
        ({"device": "mps"}, "device = 'mps' cannot work"),
        ({"normalize": (0.5, 0.5)}, r"normalize = \(0\.5, 0\.5\) cannot work"),
        ({"normalize": True, "transform": draws_torch}, "draws from"),
        (
            {"normalize": True, "transform": crop},
            r"normalize is for images, .* returns float32 \[8, 8, 1\]",
        ),
        ({"decode": False}, "decode = False gives the bytes to a transform"),
        ({"mix": [("./nowhere", 0.5)]}, "there is no dataset at .*/nowhere"),
        ({"max_bad": 2}, r"max_bad = 2 cannot work"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused(digits: Dataset, change: dict[str, Any], message: str) -> None:
    with pytest.raises(WdsTrainError, match=message):
        next(iter(loader(digits, **change)))


def test_a_rank_of_many_that_does_not_know_its_place_is_refused(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UsageError, match=r"WORLD_SIZE = 2, but torch\.distributed is not initialised"
    ):
        loader(digits)
    assert len(loader(digits, rank=0, world=1)) == 44


def test_names_are_those_of_the_commands(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "numbers").symlink_to(digits.store.url)
    monkeypatch.setenv("WDS_BUCKET", str(tmp_path))
    assert loader("numbers").state_dict() == loader(tmp_path / "datasets" / "numbers").state_dict()
    with pytest.raises(UsageError, match=r"neither an address nor a name; write \./no/where"):
        Dataset.open("no/where")


def test_evaluation_sees_each_sample_once(digits: Dataset) -> None:
    """Over all ranks, and again after an iteration that was left."""
    for world, workers in ((1, 2), (3, 0)):
        ids: list[int] = []
        for rank in range(world):
            validation = EvalLoader(
                digits, 50, size=16, rank=rank, world=world, workers=workers, normalize=True
            )
            next(iter(validation))
            batches = list(validation)
            assert (len(batches), validation.samples) == (len(validation), 360)
            ids += [sample for batch in batches for sample in batch.ids.tolist()]
        assert sorted(ids) == list(range(360))
    assert batches[0].images.shape == (50, 3, 16, 16)
