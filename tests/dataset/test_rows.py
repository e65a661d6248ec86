"""A split with an index for each shard is the split with one index.

It has the same order, pixels, rows and damage. Its rows are read once a machine.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wds_train.cli import main
from wds_train.commands.inspect import inspect
from wds_train.config.recipe import DataRecipe
from wds_train.dataset.index import SCHEMA
from wds_train.dataset.integrity import verify
from wds_train.dataset.reader import Dataset
from wds_train.dataset.shared_index import ROW, SharedIndex
from wds_train.errors import StoreError, WdsTrainError
from wds_train.evaluation.evaluate import spread
from wds_train.loader.cache import BlockCache
from wds_train.loader.pipeline import Pipeline
from wds_train.loader.plan import EvalPlan, Plan, TrainPlan
from wds_train.loader.transform import TrainTransform

TRANSFORM = TrainTransform(
    DataRecipe(size=24, scale=(0.3, 1.0), ratio=(0.75, 1.33)), seed=0, epochs=1, steps_per_epoch=29
)


@pytest.fixture(scope="session")
def twin_at(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `digits`, whose 1,437 samples of train have an index for each shard.

    Not to be written to.
    """
    folder = tmp_path_factory.mktemp("twin")
    arguments = [
        "shards",
        "digits",
        str(folder / "data"),
        "--shard-mb",
        "1",
        "--spool",
        str(folder / "spool"),
    ]
    assert main([*arguments, "--whole-index", "1000"]) == 0
    return folder / "data"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WDS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def twin(twin_at: Path) -> Dataset:
    return Dataset.open(str(twin_at))


@pytest.fixture
def copy(twin_at: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(twin_at, tmp_path / "copy"))


def test_it_is_the_same_dataset(digits: Dataset, twin: Dataset) -> None:
    assert (digits.manifest.format, twin.manifest.format) == (1, 2)
    assert twin.fingerprint == digits.fingerprint and not [*verify(twin)]
    assert isinstance(twin.split("train").index, SharedIndex) and not isinstance(
        twin.split("val").index, SharedIndex
    )
    facts = [inspect(dataset) | {"dataset": ""} for dataset in (digits, twin)]
    assert facts[0] == facts[1]
    one = digits.split("train").index
    two = twin.split("train").index
    rows = np.arange(len(one))
    for name in SCHEMA.names:
        column = getattr(one, name)
        shared = getattr(two, name)
        if name == "key":
            assert column.to_pylist() == [two.key_of(n) for n in rows.tolist()]
            continue
        assert shared[rows].dtype == column.dtype
        assert (shared[rows] == column).all() and shared[5] == column[5]
    assert (two.label[:] == one.label).all()
    with pytest.raises(TypeError):
        two.label == 3  # noqa: B015 (a silent False, were it not refused)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["train", "eval", "cached"])
def test_batches_are_the_same(
    digits: Dataset, twin: Dataset, tmp_path: Path, kind: str, workers: int
) -> None:
    found = []
    for dataset in (digits, twin):
        split = dataset.split("train")
        cache = None
        plan: Plan = EvalPlan(len(split), 300)
        if kind != "eval":
            plan = TrainPlan(
                split.shard_samples, dataset.fingerprint, 3, 96, range(2), from_step=25
            )
        if kind == "cached":
            folder = tmp_path / f"cache-{len(found)}"
            cache = BlockCache(folder, 1 << 20, split, dataset)
        found.append(list(Pipeline(split, plan, TRANSFORM, workers, cache)))
        if kind == "cached":  # blocks as they lie in the shards, of no more than was allowed
            shards = [dataset.store.read(name) for name in split.shard_names]
            blocks = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
            assert (
                len(blocks) > len(shards) and sum(map(len, blocks)) <= 1 << 20
            )  # one that is wrong is dropped
            assert all(any(block in shard for shard in shards) for block in blocks) and len(
                {*blocks}
            ) == len(blocks)
    assert len(found[0]) == len(found[1]) == (5 if kind == "eval" else 3)
    for one, two in zip(*found, strict=True):
        assert one.step == two.step and (one.ids == two.ids).all() and not two.unreadable
        assert (one.images == two.images).all() and (one.labels == two.labels).all()


def test_the_report_s_part_of_a_split(digits: Dataset, twin: Dataset) -> None:
    one, two = (spread(dataset.split("train"), 50).index for dataset in (digits, twin))
    assert one.key.to_pylist() == two.key.to_pylist() and (one.label == two.label).all()


def test_a_machine_reads_a_row_once(copy: Path, own_home: Path) -> None:
    first = Dataset.open(str(copy)).split("train").index
    some = first.crc32[np.arange(700)]  # of the first shards
    size = sum(path.stat().st_blocks for path in (own_home / "index").iterdir()) * 512
    assert 0 < size < len(first) * ROW.itemsize + 8192
    gone = sorted((copy / "train").glob("index-*.parquet"))
    for path in gone[: len(gone) // 2]:
        path.unlink()
    again = Dataset.open(str(copy)).split("train").index
    assert (again.crc32[np.arange(700)] == some).all()
    with pytest.raises(WdsTrainError, match=r"index-000000\.parquet"):  # keys are not kept
        again.key_of(0)


@pytest.mark.parametrize("place", [0, 40, -4], ids=["a row", "another", "a checksum"])
def test_rows_half_written_are_read_again(
    digits: Dataset, twin: Dataset, own_home: Path, place: int
) -> None:
    assert twin.split("train").index.length[:].all()
    (path,) = (own_home / "index").iterdir()
    data = bytearray(path.read_bytes())
    data[place : place + 4 or None] = b"\xff\0\xff\0"
    path.write_bytes(data)
    index = twin.split("train").index
    whole = digits.split("train").index
    assert (index.offset[:] == whole.offset).all() and (index.crc32[:] == whole.crc32).all()


def replace(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Put another object in the place of an index, and its size and sha256 into the manifest."""

    def apply(root: Path) -> None:
        manifest = json.loads((root / "manifest.json").read_bytes())
        entry = next(each for each in manifest["splits"]["train"]["index"] if each["name"] == name)
        data = change((root / name).read_bytes())
        (root / name).write_bytes(data)
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (root / "manifest.json").write_bytes(json.dumps(manifest).encode())

    return apply


def cells(column: str, value: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
        place = table.schema.get_field_index(column)
        field = table.schema.field(column)
        sink = pa.BufferOutputStream()
        pq.write_table(
            table.set_column(place, field, pa.array([value] * table.num_rows, field.type)), sink
        )
        return sink.getvalue().to_pybytes()

    return change


NAME = "train/index-000001.parquet"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda root: (root / NAME).unlink(), NAME),
    "cut": (lambda root: os.truncate(root / NAME, 100), "is not the index that the manifest names"),
    "no Parquet": (replace(NAME, lambda data: b"nothing"), "is not an index that can be read"),
    "of another shard": (replace(NAME, cells("shard", 0)), "it is not that of shard 1 alone"),
    "labels without a class": (
        replace(NAME, cells("label", 10)),
        "it holds labels 10..10, the dataset has 10 classes",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_index_is_named(
    name: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, sentence = DAMAGE[name]
    damage(copy)
    assert main(["order", str(copy), "--global-batch", "96"]) == 1
    error = capsys.readouterr().err
    assert sentence in error and NAME in error and "Traceback" not in error
    assert main(["verify", str(copy)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(
        NAME in line and (sentence in line or "what the manifest names" in line) for line in lines
    )
    assert len(lines) <= 3  # all else is whole


def test_a_manifest_with_too_few_indexes(copy: Path) -> None:
    made = Dataset.open(str(copy)).manifest
    split = dataclasses.replace(made.split("train"), index=made.split("train").indexes[1:])
    (copy / "manifest.json").write_bytes(
        dataclasses.replace(made, splits=made.splits | {"train": split}).to_json()
    )
    with pytest.raises(
        WdsTrainError, match=r"is damaged: splits.train has \d shards and \d indexes"
    ):
        Dataset.open(str(copy))


def test_a_folder_that_cannot_be_written(twin: Dataset, own_home: Path) -> None:
    own_home.write_bytes(b"no folder")
    with pytest.raises(StoreError, match="set WDS_HOME to another folder"):
        twin.split("train")


def test_a_full_disk(twin: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    index = twin.split("train").index

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"No space left on device.*free some room"):
        _ = index.label[3]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(StoreError, match="has 0 MB free, the index of 1,437 samples takes 0"):
        twin.split("train")
