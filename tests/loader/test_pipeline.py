"""The loader on real bytes: the same batches for every number of ranks and workers, from any step, and damage named."""

import itertools
import os
import shutil
import signal
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from wds_train.cli import main
from wds_train.commands.order import list_order
from wds_train.config.recipe import DataRecipe
from wds_train.dataset.index import read_index
from wds_train.dataset.reader import Dataset
from wds_train.errors import DataError, RunError, UsageError
from wds_train.loader.batch import Batch
from wds_train.loader.fetch import Fetcher, Memory
from wds_train.loader.mixture import Mixture
from wds_train.loader.order import WINDOW
from wds_train.loader.pipeline import Pipeline
from wds_train.loader.plan import EvalPlan, Request, TrainPlan, split_batch
from wds_train.loader.transform import EvalTransform, Place, TrainTransform
from wds_train.storage.local import LocalStore

BATCH = 48
TRANSFORM = TrainTransform(
    DataRecipe(size=24, scale=(0.3, 1.0), ratio=(0.75, 1.33)), seed=0, epochs=1, steps_per_epoch=29
)


def plan_of(dataset: Dataset, **changes: object) -> TrainPlan:
    split = dataset.split("train")
    return replace(
        TrainPlan(split.shard_samples, dataset.fingerprint, 0, BATCH, range(1)), **changes
    )  # type: ignore[arg-type]


def order_lines(dataset: Dataset, **changes: int) -> list[tuple[int, int, str, int]]:
    arguments = {
        "seed": 0,
        "epoch": 0,
        "global_batch": BATCH,
        "world": 1,
        "workers": 0,
        "from_step": 0,
        "steps": None,
    } | changes
    return list(list_order(dataset, **arguments))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole_epoch(digits: Dataset) -> list[tuple[int, int, str, int]]:
    return order_lines(digits)


@pytest.mark.parametrize("workers", [0, 1, 3, 4])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_and_workers_change_nothing(
    digits: Dataset, whole_epoch: list[tuple[int, int, str, int]], world: int, workers: int
) -> None:
    assert order_lines(digits, world=world, workers=workers) == whole_epoch


def test_an_epoch_reads_each_key_once_and_the_next_epoch_differs(digits: Dataset) -> None:
    first, second = order_lines(digits), order_lines(digits, epoch=1)
    keys = [key for _, _, key, _ in first]
    assert len(keys) == len(set(keys)) == 1437 // BATCH * BATCH
    assert [position for _, position, _, _ in first] == list(range(len(keys)))
    assert keys != [key for _, _, key, _ in second]
    assert all(key.split("/")[0] == str(label) for _, _, key, label in first)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (2, 1), (4, 0)])
def test_from_a_step_on_is_the_tail(
    digits: Dataset, whole_epoch: list[tuple[int, int, str, int]], world: int, workers: int
) -> None:
    tail = [line for line in whole_epoch if line[0] >= 17]
    assert order_lines(digits, from_step=17, world=world, workers=workers) == tail
    assert order_lines(digits, from_step=17, steps=2, world=world) == tail[: 2 * BATCH]


def test_pixels_are_the_same_from_any_step_by_any_workers(digits: Dataset) -> None:
    """Two epochs' augmented batches, against those of loaders that start in the middle of the second."""
    split = digits.split("train")
    plan = plan_of(digits, epochs=range(2))
    every = list(Pipeline(split, plan, TRANSFORM, 0))
    assert [batch.step for batch in every] == list(range(2 * plan.steps_per_epoch))
    for workers in (0, 2):
        late = list(Pipeline(split, replace(plan, from_step=40), TRANSFORM, workers))
        assert len(late) == len(every) - 40
        for one, other in zip(late, every[40:], strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
    assert every[0].images.shape == (BATCH, 24, 24, 3)


def test_augmentation_differs_between_epochs_and_places(digits: Dataset) -> None:
    places = [Place(0, (32, 32), epoch, position) for epoch in range(4) for position in range(50)]
    boxes = {TRANSFORM.draw(place) for place in places}
    assert len(boxes) > 150
    one, again, other = (TRANSFORM.draw(Place(0, (32, 32), epoch, 7)) for epoch in (1, 1, 2))
    assert one == again != other


class Counted(LocalStore):
    """Knows how much of the memory that it has read into is still in use, and how much was at most."""

    peak = 0

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._slabs: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        super().read_into(key, start, target)
        self._slabs[id(target.obj)] = target.obj
        self.peak = max(self.peak, self.held)

    @property
    def held(self) -> int:
        return sum(slab.nbytes for ref in self._slabs.valuerefs() if (slab := ref()) is not None)


def test_what_a_worker_holds_does_not_grow_with_the_dataset(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows and the slab of the last sample, besides what is fetched ahead: of one shard as of five."""
    monkeypatch.setattr("wds_train.loader.fetch.AHEAD_BYTES", 100_000)
    monkeypatch.setattr("wds_train.loader.fetch.SLAB_BYTES", 50_000)
    peaks = []
    for shards in (1, len(digits.split("train").shard_names)):
        store = Counted(Path(digits.store.url))
        split = replace(digits.split("train"), store=store)
        plan = TrainPlan(split.shard_samples[:shards], digits.fingerprint, 0, 1, range(1))
        assert sum(
            len(part.ids) for part in plan.parts(Fetcher(split)(plan.requests(0, 1)), 0, 1)
        ) == sum(split.shard_samples[:shards])
        assert store.held == 0
        peaks.append(store.peak)
    window = WINDOW * split.index.length.mean()
    assert 0.5 * window < min(peaks)
    assert max(peaks) < 2.5 * window + 150_000


@pytest.mark.parametrize("small", [0, 30, 10**6])
def test_small_requests_of_a_lane_are_joined_and_stay_in_order(digits: Dataset, small: int) -> None:
    plan = plan_of(digits, epochs=range(2))

    def by_lane(small: int) -> dict[int, list[Request]]:
        found: dict[int, list[Request]] = {}
        for request in plan.requests(0, 1, small):
            found.setdefault(request.lane, []).append(request)
        return found

    for lane, windows in by_lane(0).items():
        requests = by_lane(small)[lane]
        assert [i for each in requests for i in each.ids] == [
            i for each in windows for i in each.ids
        ]
        assert {each.epoch for each in requests} == {0, 1}
        alone = {(each.step, len(each.ids)) for each in windows}
        assert all(
            len(each.ids) <= small or (each.step, len(each.ids)) in alone for each in requests
        )
        for one, other in itertools.pairwise(requests):  # as much as fits
            assert len(one.ids) + len(other.ids) > small or one.epoch != other.epoch


def test_memory_is_read_into_again_once_nothing_of_it_is_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wds_train.loader.fetch.SLAB_BYTES", 1000)
    memory = Memory()

    def place(piece: memoryview) -> int:
        return int(np.frombuffer(piece, np.uint8).ctypes.data)

    first, second = memory.take(400), memory.take(600)
    kept, start = first[10:20], place(first)
    del first
    third = memory.take(600)  # another slab: a slice of the first piece is in use
    assert place(second) == start + 400
    assert not start <= place(third) < start + 1000
    del kept, second
    assert place(memory.take(700)) == start
    assert len(memory.take(5000)) == 5000


def test_pixels_do_not_come_through_shared_memory_files(digits: Dataset) -> None:
    """A container's /dev/shm has 64 MB: fewer than a few batches take."""
    maps, before = (
        Path("/proc/self/maps"),
        Path("/proc/self/maps").read_text().count("/dev/shm/torch"),
    )
    for _ in Pipeline(digits.split("train"), plan_of(digits), TRANSFORM, 2):
        assert maps.read_text().count("/dev/shm/torch") == before


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (3, 2), (4, 1)])
def test_validation_counts_every_sample_once(digits: Dataset, world: int, workers: int) -> None:
    split = digits.split("val")
    batches: dict[int, Batch] = {}
    for rank in range(world):
        plan = EvalPlan(len(split), 50, rank, world)
        batches |= {
            batch.step: batch for batch in Pipeline(split, plan, EvalTransform(32, 1.0), workers)
        }
    assert [int(i) for step in sorted(batches) for i in batches[step].ids] == list(range(360))
    assert len(batches[7].labels) == 10


def test_a_second_iteration_gives_the_same(digits: Dataset) -> None:
    split = digits.split("val")
    loader = Pipeline(split, EvalPlan(len(split), 64), EvalTransform(32, 1.0), 2)
    loader.start()
    first, second = list(loader), list(loader)
    assert len(first) == 6
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


def damaged(dataset: Dataset, folder: Path, samples: list[int], at: str) -> Dataset:
    """A copy of the dataset with one byte of the train samples flipped, `at` the record's start or its data."""
    copy = folder / "damaged"
    shutil.copytree(dataset.store.url, copy)
    index = dataset.split("train").index
    for sample in samples:
        path = copy / dataset.split("train").shard_names[index.shard[sample]]
        data = bytearray(path.read_bytes())
        data[int((index.offset if at == "header" else index.data_offset)[sample]) + 20] ^= 1
        path.write_bytes(data)
    return Dataset.open(str(copy))


@pytest.mark.parametrize("at", ["header", "data"])
def test_a_flipped_byte_is_named_and_the_rest_unchanged(
    digits: Dataset, tmp_path: Path, at: str
) -> None:
    bad = damaged(digits, tmp_path, [5], at)
    clean = list(Pipeline(digits.split("train"), plan_of(digits, epochs=range(2)), TRANSFORM, 0))
    split = bad.split("train")
    seen = list(Pipeline(split, plan_of(bad, epochs=range(2)), TRANSFORM, 2))
    unreadable = [(batch.step, entry) for batch in seen for entry in batch.unreadable]
    assert {entry.key for _, entry in unreadable} == {split.index.key_of(5)}
    assert {entry.shard for _, entry in unreadable} == {"train/shard-000000.tar"}
    assert "checksum" in unreadable[0][1].cause
    for one, other in zip(seen, clean, strict=True):
        good = ~np.isin(one.ids, [5])
        assert torch.equal(one.images[good], other.images[good])
        assert (one.images[~good] == 128).all()


def test_order_stops_at_damage(
    digits: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = damaged(digits, tmp_path, list(range(40)), "data")
    assert main(["order", bad.store.url, "--global-batch", "64"]) == 1
    assert "train/shard-000000.tar, key" in capsys.readouterr().err


def test_a_missing_shard_is_an_error_with_its_name(digits: Dataset, tmp_path: Path) -> None:
    shutil.copytree(digits.store.url, tmp_path / "copy")
    (tmp_path / "copy/train/shard-000001.tar").unlink()
    bad = Dataset.open(str(tmp_path / "copy"))
    for workers in (0, 2):
        with pytest.raises(Exception, match=r"train/shard-000001\.tar does not exist"):
            list(Pipeline(bad.split("train"), plan_of(bad), TRANSFORM, workers))


def test_a_killed_worker_is_an_error_and_not_a_hang(digits: Dataset) -> None:
    loader = Pipeline(digits.split("train"), plan_of(digits, epochs=range(1000)), TRANSFORM, 2)
    batches = iter(loader)
    next(batches)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    workers = [pid for pid in children if b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[-1]), signal.SIGKILL)
    with pytest.raises(
        RunError,
        match=r"a loader worker died .*; if the machine ran out of memory, use fewer --workers",
    ):
        for _ in batches:
            pass


def test_refusals(digits: Dataset) -> None:
    with pytest.raises(
        UsageError, match="global batch of 48 is read in 16 lanes, which 3 ranks cannot share"
    ):
        plan_of(digits, world=3)
    with pytest.raises(
        UsageError,
        match="1437 samples to train on, fewer than one global batch of 2000; set a smaller one, --set batch=256 say",
    ):
        plan_of(digits, global_batch=2000)
    with pytest.raises(UsageError, match="--from-step 30 is beyond the epoch, which has 29 steps"):
        order_lines(digits, from_step=30)
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        digits.split("test")


def test_a_mixture_takes_fixed_shares_of_exact_orders(digits: Dataset) -> None:
    """64 a batch: 48 of the train split, 16 of the val split, whose epochs are shorter, from any step."""
    train, val = digits.split("train"), digits.split("val")
    assert split_batch(64, [0.25]) == [48, 16]
    main_plan = TrainPlan(train.shard_samples, digits.fingerprint, 0, 48, range(2))
    other_plan = TrainPlan(val.shard_samples, "other", 0, 16, range(99))

    def batches(from_step: int, workers: int) -> list[Batch]:
        plans = [
            (train, replace(main_plan, from_step=from_step)),
            (val, replace(other_plan, from_step=from_step)),
        ]
        return list(
            Mixture([Pipeline(split, plan, TRANSFORM, workers) for split, plan in plans], seed=0)
        )

    every = batches(0, 0)
    assert len(every) == 2 * main_plan.steps_per_epoch
    tail = batches(31, 2)
    assert all(
        torch.equal(one.images, other.images) for one, other in zip(tail, every[31:], strict=True)
    )
    alone = list(Pipeline(train, main_plan, TRANSFORM, 0))
    for mixed, part in zip(every, alone, strict=True):
        assert set(part.ids.tolist()) <= set(mixed.ids.tolist())
        assert len(mixed.labels) == 64
    first_epoch = [
        int(i)
        for batch in list(Pipeline(val, other_plan, None, 0))[: other_plan.steps_per_epoch]
        for i in batch.ids
    ]
    assert len(first_epoch) == len(set(first_epoch)) == 352


def test_a_mixture_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(
        UsageError,
        match=r"mixing \[0.6, 0.5\] into a batch of 64 leaves none for the first dataset",
    ):
        split_batch(64, [0.6, 0.5])


def test_an_index_that_is_none_is_refused_by_name(digits: Dataset) -> None:
    good = pq.read_table(pa.BufferReader(digits.store.read("train/index.parquet")))
    empty = good.set_column(0, "shard", pa.nulls(len(good), pa.int32()))
    for table, cause in ((good.drop_columns("crc32"), "crc32"), (empty, "it has empty cells")):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        with pytest.raises(DataError, match=f"here is not an index that can be read: .*{cause}"):
            read_index(sink.getvalue().to_pybytes(), "here")
    with pytest.raises(DataError, match="here is not an index that can be read"):
        read_index(b"PAR1 not really", "here")


def test_what_is_read_ahead_grows_with_what_was_needed(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, drawn = digits.split("train"), [0]
    requests = [Request(n, 0, 0, np.arange(10 * n, 10 * n + 10)) for n in range(120)]
    sizes = [int(split.index.length[request.ids].sum()) for request in requests]
    monkeypatch.setattr("wds_train.loader.fetch.AHEAD_BYTES", 32 * max(sizes))

    def asked() -> Iterator[Request]:
        for request, size in zip(requests, sizes, strict=True):
            drawn[0] += size
            yield request

    ahead = [drawn[0] - sum(sizes[: n + 1]) for n, _ in enumerate(Fetcher(split)(asked()))]
    assert ahead[0] <= 4 * max(sizes)
    assert 20 * max(sizes) < max(ahead) <= 32 * max(sizes)
    assert max(ahead[:10]) < max(ahead) / 2
