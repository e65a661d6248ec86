"""The loader when the store, the network, the disk or the data misbehave: the same samples, or a clear error in time."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_proxy import Fault, FaultProxy

from wds_train.cli import main
from wds_train.commands.order import list_order
from wds_train.config.recipe import DataRecipe
from wds_train.dataset.integrity import verify
from wds_train.dataset.reader import Dataset
from wds_train.errors import AccessDenied, DataError, NotFound, Unavailable
from wds_train.loader.cache import BlockCache
from wds_train.loader.fetch import Fetcher
from wds_train.loader.order import blocks
from wds_train.loader.pipeline import Pipeline
from wds_train.loader.plan import Request, TrainPlan
from wds_train.loader.transform import TrainTransform
from wds_train.storage import embedded
from wds_train.storage.open import open_store

BATCH = 64
TRANSFORM = TrainTransform(
    DataRecipe(size=24, scale=(0.3, 1.0), ratio=(0.75, 1.33)), seed=0, epochs=1, steps_per_epoch=29
)


def plan_of(dataset: Dataset, **changes: object) -> TrainPlan:
    split = dataset.split("train")
    return replace(
        TrainPlan(split.shard_samples, dataset.fingerprint, 0, BATCH, range(1)), **changes
    )  # type: ignore[arg-type]


def lines(
    dataset: Dataset, world: int = 1, workers: int = 0, from_step: int = 0
) -> list[tuple[int, int, str, int]]:
    return list(
        list_order(
            dataset,
            seed=0,
            epoch=0,
            global_batch=BATCH,
            world=world,
            workers=workers,
            from_step=from_step,
            steps=None,
        )
    )


@pytest.fixture
def on_s3(digits: Dataset, s3_url: str) -> str:
    """The digits, copied object by object to the test's bucket."""
    copy(digits, s3_url)
    return s3_url


def copy(dataset: Dataset, url: str) -> None:
    target = open_store(url)
    for entry in dataset.store.list():
        target.write(entry.key, dataset.store.read(entry.key))


def shard_bytes(proxy: FaultProxy) -> int:
    return sum(
        count
        for (method, key), count in proxy.sent.items()
        if method == "GET" and key.endswith(".tar")
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_under_random_faults_gives_the_same_samples(
    digits: Dataset,
    on_s3: str,
    fault_proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    """5 % of the requests for shards fail, in every way that S3 fails in."""
    for module in ("s3_session", "s3_read"):
        monkeypatch.setattr(
            f"wds_train.storage.{module}.SOCKET_SECONDS", 1.0
        )  # a stalled body is given up after so long
    clean = [
        batch.images for batch in Pipeline(digits.split("train"), plan_of(digits), TRANSFORM, 0)
    ]
    dataset = Dataset.open(on_s3)
    forever = float("inf")
    fault_proxy.faults += [
        Fault("reset", "GET", ".tar", after=0, times=forever, share=0.01),
        Fault("reset", "GET", ".tar", after=3000, times=forever, share=0.01),
        Fault("truncate", "GET", ".tar", after=1000, times=forever, share=0.01),
        Fault("status", "GET", ".tar", status=503, times=forever, share=0.01),
        Fault("stall", "GET", ".tar", after=2000, times=forever, share=0.01),
    ]
    faulty = list(Pipeline(dataset.split("train"), plan_of(dataset), TRANSFORM, workers))
    assert [batch.unreadable for batch in faulty] == [[] for _ in clean]
    assert all(
        torch.equal(batch.images, images) for batch, images in zip(faulty, clean, strict=True)
    )


def test_a_byte_flipped_on_the_way_is_fetched_again(
    digits: Dataset, on_s3: str, fault_proxy: FaultProxy
) -> None:
    dataset = Dataset.open(on_s3)
    fault_proxy.faults.append(Fault("flip", "GET", ".tar", after=700))
    batches = list(Pipeline(dataset.split("train"), plan_of(dataset), TRANSFORM, 0))
    assert fault_proxy.faults[0].times == 0
    assert [batch.unreadable for batch in batches if batch.unreadable] == []


def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the seed of the faults decides which request has which."""
    monkeypatch.setattr("wds_train.loader.fetch.FETCH_THREADS", 1)
    monkeypatch.setattr("wds_train.dataset.integrity.SHARDS_AT_ONCE", 1)


def test_a_network_that_flips_bytes_changes_nothing(
    digits: Dataset, on_s3: str, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a tenth of all that is read, be it manifest, index or shard."""
    one_thread(monkeypatch)
    clean = [
        batch.images for batch in Pipeline(digits.split("train"), plan_of(digits), TRANSFORM, 0)
    ]
    flips = fault_proxy.fail("flip", method="GET", after=700, times=float("inf"), share=0.1)
    for _ in range(3):  # a few dozen requests each
        dataset = Dataset.open(on_s3)
        batches = list(Pipeline(dataset.split("train"), plan_of(dataset), TRANSFORM, 0))
        assert [batch.unreadable for batch in batches if batch.unreadable] == []
        assert all(
            torch.equal(batch.images, images) for batch, images in zip(batches, clean, strict=True)
        )
        assert lines(dataset) == lines(digits)
        assert [str(damage) for damage in verify(dataset)] == []
    assert flips.times == float("inf") and fault_proxy.count("GET") > 100


def test_what_is_damaged_in_the_store_is_named_after_three_more_readings(
    digits: Dataset, on_s3: str, fault_proxy: FaultProxy
) -> None:
    dataset = Dataset.open(on_s3)
    split = dataset.split("train")
    shard, at = split.shard_names[0], int(split.index.data_offset[5])
    data = bytearray(dataset.store.read(shard))
    data[at + 9] ^= 1
    dataset.store.write(shard, data)
    before = fault_proxy.count("GET", shard)
    (window,) = Fetcher(split)([Request(0, 0, 0, np.array([5]))])
    assert str(window.records[0]) == "its bytes do not match the checksum in the index"
    assert fault_proxy.count("GET", shard) - before == 4
    key = split.index.key_of(5)
    with pytest.raises(DataError, match=f"{shard}, key {key}: its bytes do not match the checksum"):
        lines(dataset)
    damage = [str(each) for each in verify(dataset)]
    assert damage[0] == f"{shard} {key}: its bytes do not match the checksum in the index"
    assert len(damage) == 2 and "1 samples are named above" in damage[1]


def test_a_dead_server_is_an_error_within_the_deadline(
    on_s3: str, fault_proxy: FaultProxy, aws_env: pytest.MonkeyPatch
) -> None:
    aws_env.setenv("WDS_S3_PATIENCE", "3")
    dataset = Dataset.open(on_s3)
    fault_proxy.faults.append(Fault("reset", "GET", ".tar", times=float("inf")))
    for workers in (0, 2):
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"train/shard-\d+\.tar"):
            list(Pipeline(dataset.split("train"), plan_of(dataset), TRANSFORM, workers))
        assert time.monotonic() - began < 100  # not the usual 120 s


@pytest.mark.parametrize(
    ("status", "code", "error"), [(403, "AccessDenied", AccessDenied), (404, "NoSuchKey", NotFound)]
)
def test_what_is_final_is_not_tried_again(
    on_s3: str, fault_proxy: FaultProxy, status: int, code: str, error: type[Exception]
) -> None:
    never_open = open_store(on_s3)  # one that was open waits for new credentials
    fault_proxy.faults.append(
        Fault("status", "GET", "shard-000000.tar", status=status, code=code, times=float("inf"))
    )
    before = fault_proxy.requests.total()
    with pytest.raises(error):
        list(never_open.read("train/shard-000000.tar", 0, 100))
    assert (
        fault_proxy.requests.total() - before == 2
    )  # the presigned range, and boto3 to say what is wrong


def test_from_a_step_on_little_more_than_the_rest_is_fetched(
    on_s3: str, fault_proxy: FaultProxy
) -> None:
    dataset = Dataset.open(on_s3)
    split = dataset.split("train")
    sizes = {split.index.key_of(i): int(split.index.length[i]) for i in range(len(split))}
    tail = lines(dataset, from_step=12)
    needed = sum(sizes[key] for _, _, key, _ in tail)
    window = (
        sum(sizes.values()) - needed
    )  # of 22 steps, none lies over a window back: all lanes' windows hold them
    assert needed <= shard_bytes(fault_proxy) <= needed + window / 2


def test_a_rank_of_four_fetches_a_quarter(on_s3: str, fault_proxy: FaultProxy) -> None:
    dataset = Dataset.open(on_s3)
    whole = sum(shard.bytes for shard in dataset.manifest.split("train").shards)
    for rank in range(4):
        before = shard_bytes(fault_proxy)
        list(Pipeline(dataset.split("train"), plan_of(dataset, rank=rank, world=4), None, 0))
        assert shard_bytes(fault_proxy) - before <= 1.15 * whole / 4


class Cached:
    """An epoch through a cache in `folder`."""

    def __init__(self, url: str, folder: Path, max_bytes: int = 1 << 40) -> None:
        self.dataset = Dataset.open(url)
        self.split = self.dataset.split("train")
        self.cache = BlockCache(folder, max_bytes, self.split, self.dataset)

    def epoch(self, epoch: int, workers: int = 0) -> Iterator[torch.Tensor]:
        plan = plan_of(self.dataset, epochs=range(epoch, epoch + 1))
        plan = replace(plan, from_step=epoch * plan.steps_per_epoch)
        for batch in Pipeline(self.split, plan, TRANSFORM, workers, self.cache):
            assert not batch.unreadable
            yield batch.images


def assert_epoch(images: Iterator[torch.Tensor], digits: Dataset, epoch: int) -> None:
    plan = plan_of(digits, epochs=range(epoch, epoch + 1))
    clean = Pipeline(
        digits.split("train"), replace(plan, from_step=epoch * plan.steps_per_epoch), TRANSFORM, 0
    )
    assert all(torch.equal(one, batch.images) for one, batch in zip(images, clean, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_with_a_cache_later_epochs_read_no_s3(
    digits: Dataset, on_s3: str, fault_proxy: FaultProxy, tmp_path: Path, workers: int
) -> None:
    first = Cached(on_s3, tmp_path)
    list(first.epoch(0, workers))
    list(
        first.epoch(1, workers)
    )  # an epoch drops a tail, so that the blocks of one may lack a few of another's
    before = shard_bytes(fault_proxy)
    assert_epoch(Cached(on_s3, tmp_path).epoch(2, workers), digits, 2)
    missing = len(blocks(digits.split("train").shard_samples)[0]) - len(list(tmp_path.rglob("0*")))
    assert missing == 0
    assert shard_bytes(fault_proxy) == before


def test_a_cache_keeps_no_more_than_its_size(digits: Dataset, on_s3: str, tmp_path: Path) -> None:
    cached = Cached(on_s3, tmp_path, max_bytes=1_000_000)
    assert_epoch(cached.epoch(0), digits, 0)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert 800_000 < sum(path.stat().st_size for path in files) <= 1_000_000


def test_damaged_cache_files_are_noticed(digits: Dataset, on_s3: str, tmp_path: Path) -> None:
    list(Cached(on_s3, tmp_path).epoch(0))
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    flipped = bytearray(files[0].read_bytes())
    flipped[700] ^= 1
    files[0].write_bytes(flipped)
    files[1].write_bytes(files[1].read_bytes()[:100])
    files[2].write_bytes(b"")
    files[3].with_name(f".{files[3].name}.1").write_bytes(b"left by a kill")
    assert_epoch(Cached(on_s3, tmp_path).epoch(1), digits, 1)


def test_a_full_disk_only_ends_the_caching(
    digits: Dataset, on_s3: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real one, of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        assert_epoch(Cached(on_s3, disk).epoch(0), digits, 0)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert capfd.readouterr().err.count("No space left on device; nothing more is added to it") == 1


@pytest.mark.parametrize(
    "trouble", ["a file in its place", "taken away", "read-only", "no file can be read"]
)
def test_a_cache_that_fails_is_switched_off(
    trouble: str, digits: Dataset, on_s3: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """After an epoch that filled half of it. The next one has the same samples, and a line that says so."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk)]
    if (
        trouble == "read-only"
        and subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a tmpfs needs root")
    try:
        list(Cached(on_s3, disk, max_bytes=1_000_000).epoch(0))
        cached = Cached(on_s3, disk)
        files = [path for path in disk.rglob("*") if path.is_file()]
        assert files
        if trouble in ("a file in its place", "taken away"):
            shutil.rmtree(disk)
        if trouble == "a file in its place":
            disk.write_bytes(b"")
        elif trouble == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        elif trouble == "no file can be read":
            for path in files:
                path.unlink()
                path.mkdir()
        assert_epoch(cached.epoch(1), digits, 1)
    finally:
        if trouble == "read-only":
            subprocess.run(["umount", str(disk)], check=True)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"cache: {disk}") and line.endswith("the store is read instead")


def test_two_processes_share_a_cache_and_a_kill_leaves_it_whole(
    digits: Dataset, on_s3: str, tmp_path: Path
) -> None:
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_faults import *\n"
    script += f"while True: list(Cached({on_s3!r}, Path({str(tmp_path)!r})).epoch(0)); print('epoch', flush=True)"
    both = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        process.stdout.readline()
    for process in both:
        process.kill()
        process.communicate()
    assert_epoch(Cached(on_s3, tmp_path).epoch(1), digits, 1)


def test_a_cache_that_cannot_be_made_is_refused(
    digits: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    command = [
        "train",
        "--dataset",
        digits.store.url,
        "--run",
        str(tmp_path / "run"),
        "--cache-dir",
        str(tmp_path / "file/x"),
    ]
    assert main(command) == 1
    assert f"the cache folder {tmp_path}/file/x" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_server_killed_in_the_middle_of_an_epoch(digits: Dataset, embedded_home: Path) -> None:
    """SIGKILL to the real server: the loader waits, the server comes back, the epoch is whole."""
    copy(digits, "s3://embedded/digits")
    dataset = Dataset.open("s3://embedded/digits")
    batches = iter(
        Pipeline(dataset.split("train"), plan_of(dataset, epochs=range(6)), TRANSFORM, 0)
    )
    images = [next(batches).images for _ in range(3)]
    embedded.stop()
    embedded.ensure_running()
    images += [batch.images for batch in batches]
    clean = Pipeline(digits.split("train"), plan_of(digits, epochs=range(6)), TRANSFORM, 0)
    assert all(torch.equal(one, batch.images) for one, batch in zip(images, clean, strict=True))
