"""Conversion: the same bytes whatever happens on the way.

Nothing is left in the store that the manifest does not name.
"""

import contextlib
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import layouts
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from fault_proxy import FaultProxy
from PIL import Image

from shards.make_shards import main
from wds_train.conversion import pack
from wds_train.conversion.image_policy import ImagePolicy, check
from wds_train.dataset import shard as shard_format
from wds_train.dataset.integrity import verify
from wds_train.dataset.manifest import DatasetManifest
from wds_train.dataset.reader import Dataset
from wds_train.errors import DataError, NotFound, StoreError
from wds_train.storage import embedded
from wds_train.storage.base import Store
from wds_train.storage.local import LocalStore
from wds_train.storage.open import open_store
from wds_train.storage.s3 import S3Store

SHARD_MB = "0.02"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """480 images in three classes: about 90 shards of SHARD_MB."""
    tree: layouts.Tree = {"train": {}, "val": {}}
    for label, wnid in enumerate(layouts.WNIDS):
        images = [(f"{n:03d}.jpg", layouts.photos()[(8 * label + n) % 24]) for n in range(160)]
        tree["train"][wnid], tree["val"][wnid] = images[:140], images[140:]
    return layouts.image_folder(tmp_path_factory.mktemp("many") / "folder", tree)


def run(*arguments: str | Path, processes: int = 1) -> int:
    before, sys.argv = (
        sys.argv,
        ["make_shards", *map(str, arguments), "--processes", str(processes)],
    )
    try:
        return main()
    finally:
        sys.argv = before


def start(*arguments: str | Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "shards.make_shards", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def content(store: Store) -> dict[str, str]:
    return {entry.key: hashlib.sha256(store.read(entry.key)).hexdigest() for entry in store.list()}


def named(store: Store) -> set[str]:
    made = DatasetManifest.from_json(store.read("manifest.json"), store.url)
    assert made.report is not None
    assert made.format == 1 + any(isinstance(split.index, tuple) for split in made.splits.values())
    return made.objects() | {"manifest.json"}


@pytest.fixture(scope="session")
def unbroken_at(folder: Path) -> Path:
    """Return the place of an unbroken conversion of `folder`."""
    assert run(folder, folder.parent / "unbroken", "--shard-mb", SHARD_MB) == 0
    return folder.parent / "unbroken"


@pytest.fixture
def unbroken(unbroken_at: Path) -> dict[str, str]:
    return content(LocalStore(unbroken_at))


def records(store: Store) -> int:
    return sum(1 for entry in store.list(".wip/") if entry.key.endswith(".parquet"))


def test_killed_at_20_random_moments_it_ends_in_the_same_bytes(
    folder: Path, unbroken: dict[str, str], s3_url: str
) -> None:
    store, draw, kills = open_store(s3_url), random.Random(7), 0
    total = sum(name.endswith(".tar") for name in unbroken)
    assert total > 60
    while kills < 20:
        process = start(folder, s3_url, "--shard-mb", SHARD_MB, "--processes", str(1 + kills % 2))
        # Some moments while shards are made and uploaded, the last ones while index, manifest and
        # cleaning are due.
        goal = records(store) + draw.randrange(4) if kills < 15 else total
        while process.poll() is None and records(store) < goal:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.03))
        assert process.poll() is None or kills >= 15, process.stderr and process.stderr.read()
        process.kill()
        process.wait()
        kills += 1
        if "manifest.json" in content(
            store
        ):  # it was complete, all but the cleaning: begin once more
            assert named(store) <= content(store).keys()
            for entry in store.list():
                store.delete(entry.key)
    assert run(folder, s3_url, "--shard-mb", SHARD_MB) == 0
    assert content(store) == unbroken
    assert content(store).keys() == named(store)


def test_finished_shards_are_not_made_again(
    folder: Path, unbroken: dict[str, str], s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made, real = open_store(s3_url), list[str](), pack.make_shard

    def stops(task: pack.ShardTask) -> pack.ShardDone:
        if len(made) == 10:
            raise DataError("stop here")
        made.append(task.name)
        return real(task)

    monkeypatch.setattr("wds_train.conversion.executors.make_shard", stops)
    assert run(folder, s3_url, "--shard-mb", SHARD_MB) == 1
    assert records(store) == 10 and "manifest.json" not in content(store)
    store.write(made[3], b"not what was uploaded")  # found by its tag, and made again
    store.delete(made[4])
    first = list(made)

    def counts(task: pack.ShardTask) -> pack.ShardDone:
        made.append(task.name)
        return real(task)

    monkeypatch.setattr("wds_train.conversion.executors.make_shard", counts)
    assert run(folder, s3_url, "--shard-mb", SHARD_MB) == 0
    assert set(first) & set(made[10:]) == {first[3], first[4]}
    assert content(store) == unbroken


def test_an_index_for_each_shard_outlives_kills(
    folder: Path, unbroken: dict[str, str], tmp_path: Path
) -> None:
    arguments = ["--shard-mb", SHARD_MB, "--whole-index", "100"]  # train has 420 samples, val 60
    assert run(folder, tmp_path / "whole", *arguments) == 0
    store = LocalStore(tmp_path / "killed")
    process = start(folder, store.url, *arguments, "--processes", "1")
    while process.poll() is None and records(store) < 30:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert "manifest.json" not in content(store)
    store.delete("train/index-000028.parquet")
    assert run(folder, store.url, *arguments) == 0
    made = content(store)
    assert made == content(LocalStore(tmp_path / "whole")) and made.keys() == named(store)
    other = {"train/index.parquet", "manifest.json"}
    assert {name: made[name] for name in unbroken.keys() - other} == {
        n: unbroken[n] for n in unbroken.keys() - other
    }
    dataset, before = Dataset.open(store.url), Dataset.open(str(folder.parent / "unbroken"))
    assert dataset.fingerprint == before.fingerprint and not [*verify(dataset)]
    tables = [
        pq.read_table(tmp_path / "killed" / each.name)
        for each in dataset.manifest.split("train").indexes
    ]
    assert pa.concat_tables(tables).equals(
        pq.read_table(folder.parent / "unbroken" / "train" / "index.parquet")
    )


def test_the_s3_server_is_killed(
    folder: Path, unbroken: dict[str, str], embedded_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WDS_S3_PATIENCE", "1")
    url = "s3://embedded/datasets/x"
    for goal in (5, 30):
        store = open_store("s3://embedded/datasets/x")  # starts the server again
        process = start(folder, url, "--shard-mb", SHARD_MB, "--processes", "2")
        while process.poll() is None and records(store) < goal:
            time.sleep(0.002)
        embedded.stop()  # with SIGKILL
        _, error = process.communicate()
        assert process.returncode == 1 and b"S3 server" in error, error
        assert b"Traceback" not in error
    assert run(folder, url, "--shard-mb", SHARD_MB) == 0
    store = open_store("s3://embedded/datasets/x")
    assert content(store) == unbroken


def below(pid: int) -> set[int]:
    """All processes that came from `pid`."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return set()
    return {int(child) for child in children}.union(*(below(int(child)) for child in children))


def test_workers_die_with_their_parent(folder: Path, tmp_path: Path) -> None:
    process, found = (
        start(folder, tmp_path / "out", "--shard-mb", SHARD_MB, "--processes", "2"),
        set[int](),
    )
    while (
        process.poll() is None and len(found) < 4
    ):  # two workers, what they fork from, and a resource tracker
        found |= below(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(found) >= 4 and not [pid for pid in found if Path(f"/proc/{pid}").exists()]


def test_other_settings_are_refused_unless_overwritten(
    folder: Path, s3_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_url)
    assert run(folder, s3_url, "--shard-mb", SHARD_MB) == 0
    before = content(store)
    assert run(folder, s3_url, "--shard-mb", SHARD_MB) == 0
    assert "complete already" in capsys.readouterr().out
    assert run(folder, s3_url, "--shard-mb", "0.03", "--seed", "5") == 2
    error = capsys.readouterr().err
    assert (
        "seed was 0, is now 5" in error
        and "shard_bytes was 20971, is now 31457" in error
        and "--overwrite" in error
    )
    assert content(store) == before
    store.write("train/mine.txt", b"not ours to remove")
    assert run(folder, s3_url, "--shard-mb", "0.03", "--overwrite") == 0
    assert content(store).keys() == named(store) | {"train/mine.txt"}
    assert len(content(store)) < len(before)


def test_an_unfinished_conversion_refuses_another_source(
    folder: Path,
    tmp_path: Path,
    s3_url: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, real = Path(shutil.copytree(folder, tmp_path / "folder")), pack.make_shard
    monkeypatch.setattr(
        "wds_train.conversion.executors.make_shard",
        lambda task: real(task) if task.number < 5 else 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        run(folder, s3_url, "--shard-mb", SHARD_MB)
    monkeypatch.setattr("wds_train.conversion.executors.make_shard", real)
    path = next((folder / "train" / layouts.WNIDS[0]).iterdir())
    path.write_bytes(path.read_bytes() + b"\0")
    assert run(folder, s3_url, "--shard-mb", SHARD_MB) == 2
    assert "source_sha256 was" in capsys.readouterr().err
    assert run(folder, s3_url, "--shard-mb", SHARD_MB, "--seed", "3", "--overwrite") == 0
    assert not list(verify(Dataset.open(s3_url)))
    assert run(folder, tmp_path / "fresh", "--shard-mb", SHARD_MB, "--seed", "3") == 0
    replaced, fresh = Dataset.open(s3_url).manifest, Dataset.open(str(tmp_path / "fresh")).manifest
    assert replaced.fingerprint == fresh.fingerprint  # what it replaced does not matter
    assert content(open_store(s3_url)).keys() == replaced.objects() | {"manifest.json"}


def test_processes_and_places_do_not_matter(
    folder: Path, unbroken: dict[str, str], tmp_path: Path, s3_url: str
) -> None:
    assert run(folder, s3_url, "--shard-mb", SHARD_MB, processes=2) == 0
    assert content(open_store(s3_url)) == unbroken
    assert run(folder, tmp_path / "seed", "--shard-mb", SHARD_MB, "--seed", "1") == 0
    other = content(LocalStore(tmp_path / "seed"))
    assert other["train/shard-000000.tar"] != unbroken["train/shard-000000.tar"]


def test_a_dask_cluster_makes_the_same_shards(
    folder: Path, unbroken: dict[str, str], tmp_path: Path
) -> None:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=2, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        address = cluster.scheduler_address.replace("tcp://", "dask://")
        assert run(folder, tmp_path / "out", "--shard-mb", SHARD_MB, "--executor", address) == 0
    assert content(LocalStore(tmp_path / "out")) == unbroken


def test_executor_addresses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, tmp_path / "out", "--executor", "ray://x") == 2
    assert "'ray://x' is not of the form dask://HOST:PORT" in capsys.readouterr().err


def test_shards_are_of_equal_size_and_below_the_limit(unbroken_at: Path) -> None:
    sizes = [path.stat().st_size for path in (unbroken_at / "train").glob("*.tar")]
    assert max(sizes) <= float(SHARD_MB) * (1 << 20) and min(sizes) > max(sizes) / 3


def test_headers_are_tarfile_s_own() -> None:
    for name, size in (
        (b"a.cls", 1),
        (b"n01440764/n01440764_10026.jpg", 123_456),
        (b"x" * 100, (8 << 30) - 1),
    ):
        info = tarfile.TarInfo(name.decode())
        info.size = size
        assert shard_format._ustar_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_samples_are_shuffled_over_the_whole_source(unbroken_at: Path) -> None:
    labels = Dataset.open(str(unbroken_at)).split("train").index.label
    # Of 420 samples in three equal classes, neighbours are of one class a third of the time:
    # 140 +- 10 (one sigma).
    assert 100 < np.sum(labels[1:] == labels[:-1]) < 180


def test_stock_tools_read_the_output(unbroken_at: Path) -> None:
    out = unbroken_at
    shard = out / "train" / "shard-000000.tar"
    listing = subprocess.run(
        ["tar", "tf", str(shard)], capture_output=True, text=True, check=True
    ).stdout.split()
    index = pandas.read_parquet(out / "train" / "index.parquet")
    first = index[index.shard == 0]
    assert listing == [f"{key}.{extension}" for key in first.key for extension in ("cls", "jpg")]
    stock = (
        webdataset.WebDataset(str(shard), shardshuffle=False)
        .decode("pil")
        .to_tuple("__key__", "jpg", "cls")
    )
    read = [(key, image.size, label) for key, image, label in stock]
    assert read == [(row.key, (row.width, row.height), row.label) for row in first.itertuples()]
    with tarfile.open(shard) as tar:
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar} == {(0, 0, 0, 0o644, "")}
    rows = first.iloc[2]
    assert shard.read_bytes()[rows.data_offset :][: rows.data_length][:3] == b"\xff\xd8\xff"


def test_images_larger_than_asked_are_encoded_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = layouts.image_folder(tmp_path / "folder", layouts.small_tree())
    assert run(folder, tmp_path / "out", "--resize-shorter", "80", "--quality", "90") == 0
    reader = Dataset.open(str(tmp_path / "out")).split("train")
    sources = {
        path.relative_to(folder / "train").with_suffix("").as_posix(): path
        for path in folder.glob("train/*/*")
    }
    altered = 0
    for n in range(len(reader)):
        original = sources[reader.index.key_of(n)].read_bytes()
        start, length = int(reader.index.data_offset[n]), int(reader.index.data_length[n])
        stored = reader.store.read(reader.shard_names[0], start, length)
        was, now = Image.open(io.BytesIO(original)).size, Image.open(io.BytesIO(stored)).size
        assert now == (reader.index.width[n], reader.index.height[n])
        assert min(now) == min(80, *was) and abs(now[0] / now[1] - was[0] / was[1]) < 0.02
        assert (stored == original) == (min(was) <= 80)
        altered += stored != original
    assert 0 < altered < 15
    assert '"reencoded": ' in (tmp_path / "out" / "report.json").read_text()


def test_policy_upright_and_colours() -> None:
    photo = Image.open(io.BytesIO(layouts.photos()[4])).resize((200, 100))
    exif = Image.Exif()
    exif[0x0112] = 8
    out = io.BytesIO()
    photo.convert("CMYK").save(out, "JPEG", exif=exif)
    small = check(out.getvalue(), ImagePolicy(resize_shorter=50))
    image = Image.open(io.BytesIO(small.data))
    assert (image.mode, image.size, image.getexif().get(0x0112)) == ("RGB", (50, 100), None)
    assert (small.width, small.height, small.altered) == (50, 100, True)
    turned = np.asarray(photo.transpose(Image.Transpose.ROTATE_90).resize((50, 100)), dtype=float)
    assert np.abs(np.asarray(image, dtype=float) - turned).mean() < 12


def test_an_upload_that_does_not_hold_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path / "out")
    monkeypatch.setattr(LocalStore, "head", lambda *_: (5, "other"))
    with pytest.raises(StoreError, match=r"train/x\.tar is not what was uploaded"):
        pack.confirm(store, "train/x.tar", 3, store.write("train/x.tar", b"abc"))


def test_large_shards_go_in_parts_and_leave_none_behind(
    folder: Path, unbroken: dict[str, str], s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_url)
    assert isinstance(store, S3Store)
    where = {"Bucket": store.bucket, "Key": f"{store.prefix}/train/shard-000000.tar"}
    upload = store.client.create_multipart_upload(**where)["UploadId"]  # type: ignore[arg-type]
    store.client.upload_part(
        **where, UploadId=upload, PartNumber=1, Body=b"left by a killed conversion"
    )  # type: ignore[arg-type]
    monkeypatch.setattr("wds_train.storage.s3_write.PART_BYTES", 5 << 20)
    body = random.Random(1).randbytes(12 << 20)
    tag = store.write("big", body)
    assert (
        tag.endswith('-3"') and store.read("big") == body and store.head("big") == (len(body), tag)
    )
    store.delete("big")
    assert run(folder, s3_url, "--shard-mb", SHARD_MB) == 0
    assert content(store) == unbroken
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=store.bucket)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """66 JPEGs of 1 MiB, mostly padding behind the picture: two shards of two parts and a bit."""
    source, noise = tmp_path / "large", random.Random(3)
    for label in "ab":
        (source / label).mkdir(parents=True)
    for n in range(66):
        photo = layouts.photos()[n % 24]
        (source / "ab"[n % 2] / f"{n:02d}.jpg").write_bytes(
            photo + noise.randbytes((1 << 20) - len(photo))
        )
    return source


def parts_under_way(store: S3Store) -> dict[str, int]:
    """Return the number of parts of each upload that is neither complete nor aborted."""
    uploads = store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", ())
    found = {}
    for upload in uploads:
        where = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
        with contextlib.suppress(store.client.exceptions.ClientError):  # it is complete by now
            answer = store.client.list_parts(Bucket=store.bucket, **where)  # type: ignore[arg-type]
            found[upload["UploadId"]] = len(answer.get("Parts", ()))
    return found


def test_killed_between_the_parts_of_an_upload(
    large: Path, tmp_path: Path, fault_proxy: FaultProxy, s3_url: str
) -> None:
    assert run(large, tmp_path / "unbroken", "--shard-mb", "36", "--hold-out", "0") == 0
    unbroken = content(LocalStore(tmp_path / "unbroken"))
    assert sum(name.endswith(".tar") for name in unbroken) == 2
    store, seen = open_store(s3_url), set[str]()
    assert isinstance(store, S3Store)
    for processes, refused in (
        ("1", 2),
        ("2", 1),
        ("2", 3),
    ):  # without one of its three parts no upload ends
        fault = fault_proxy.fail(
            "status", method="PUT", key="shard-", query=f"partNumber={refused}", times=1e9
        )
        process = start(
            large, s3_url, "--shard-mb", "36", "--hold-out", "0", "--processes", processes
        )
        while process.poll() is None and not any(
            parts for upload, parts in parts_under_way(store).items() if upload not in seen
        ):
            time.sleep(0.005)
        process.kill()
        process.wait()
        left = {
            upload: parts for upload, parts in parts_under_way(store).items() if upload not in seen
        }
        assert any(0 < parts < 3 for parts in left.values()), "it was not killed within an upload"
        seen |= left.keys()
        fault.times = 0
    assert run(large, s3_url, "--shard-mb", "36", "--hold-out", "0", processes=2) == 0
    assert content(store) == unbroken
    assert content(store).keys() == named(store)
    assert not parts_under_way(store)


def test_an_image_that_vanishes_in_the_middle_of_an_upload(
    large: Path, s3_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that were uploaded are dropped, and so is the file that a directory would get."""
    store, reads, real = open_store(s3_url), [0], pack.read_bytes
    assert isinstance(store, S3Store)

    def vanishing(path: str, offset: int, length: int) -> bytes:
        reads[0] += 1
        if reads[0] % 60 == 0:  # three parts are under way
            raise DataError(f"{path} cannot be read")
        return real(path, offset, length)

    monkeypatch.setattr(pack, "read_bytes", vanishing)
    for place in (s3_url, large.parent / "local"):
        assert run(large, place, "--shard-mb", "80", "--hold-out", "0") == 1
        assert "cannot be read" in capsys.readouterr().err
        assert [entry.key for entry in open_store(str(place)).list()] == [".wip/plan.json"]
    assert not parts_under_way(store)
    assert not list((large.parent / "local").rglob(".tmp-*"))


def test_the_answer_to_an_upload_is_lost(
    folder: Path, unbroken: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWS forgets an upload that is complete: a second try at completing it gets a 404."""
    real, lost = LocalStore.write_pieces, list[str]()

    def answers_late(store: LocalStore, key: str, pieces: Iterator[bytes]) -> str:
        tag = real(store, key, pieces)
        if key.endswith("0.tar") and key not in lost:
            lost.append(key)
            raise NotFound(f"{key} has no such upload")
        return tag

    monkeypatch.setattr(LocalStore, "write_pieces", answers_late)
    assert run(folder, tmp_path / "out", "--shard-mb", SHARD_MB) == 0
    assert len(lost) > 5 and content(LocalStore(tmp_path / "out")) == unbroken


def peak_memory(source: Path, out: str) -> float:
    """Return the sum of the peaks of all processes of a conversion with two, resident MiB."""
    process, peaks = (
        start(source, out, "--shard-mb", "4", "--processes", "2", "--hold-out", "0"),
        dict[int, int](),
    )
    while process.poll() is None:
        for pid in {process.pid} | below(process.pid):
            with contextlib.suppress(OSError, IndexError):  # it has ended
                peaks[pid] = int(
                    Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]
                )
        time.sleep(0.005)
    assert process.returncode == 0
    return sum(peaks.values()) / 1024


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path, s3_url: str) -> None:
    """With 75 MiB more images, a conversion that kept what it has read would be seen."""
    image = layouts.photos()[0] + random.Random(5).randbytes(100 << 10)
    for name, count in (("small", 150), ("large", 900)):
        for label in "ab":
            (tmp_path / name / label).mkdir(parents=True)
        for n in range(count):
            (tmp_path / name / "ab"[n % 2] / f"{n:03d}.jpg").write_bytes(image)
    small, large = (peak_memory(tmp_path / name, f"{s3_url}/{name}") for name in ("small", "large"))
    assert large - small < 25, (small, large)


def test_pandas_stays_out_of_conversions(tmp_path: Path) -> None:
    """Its import takes longer than any other; pyarrow imports it when it gets Python values."""
    source = layouts.image_folder(tmp_path / "folder", layouts.small_tree())
    code = (
        "import sys; from shards.make_shards import main; assert main() == 0; "
        "assert 'pandas' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out"), "--processes", "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_dry_run_writes_nothing(
    folder: Path, s3_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, s3_url, "--shard-mb", SHARD_MB, "--dry-run") == 0
    output = capsys.readouterr().out
    assert "train: 420 samples" in output and "val: 60 samples" in output and "a month" in output
    assert not list(open_store(s3_url).list())


@pytest.mark.parametrize(
    "flag",
    ["--hold-out", "--shard-mb", "--processes", "--quality", "--resize-shorter", "--max-bad"],
)
def test_settings_that_cannot_work(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, sys.argv = sys.argv, ["make_shards", "digits", str(tmp_path / "out"), flag, "-3"]
    try:
        assert main() == 2
    finally:
        sys.argv = before
    assert f"{flag}: '-3' is not a" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_space(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(folder, tmp_path / "out", "--shard-mb", SHARD_MB) == 1
    error = capsys.readouterr().err
    assert f"no space left on the disk of {tmp_path}/out" in error and "Traceback" not in error
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_no_space_for_the_spool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is not here")
    monkeypatch.setattr("wds_train.conversion.sources.spool.FILE", "/dev/full")
    assert run("digits", tmp_path / "out", "--spool", tmp_path / "spool") == 1
    assert "no space left on the disk of" in capsys.readouterr().err


def test_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_HOME", str(tmp_path / "home"))
    for name in "ab":
        assert run("digits", tmp_path / name) == 0
    assert content(LocalStore(tmp_path / "a")) == content(LocalStore(tmp_path / "b"))
    made = Dataset.open(str(tmp_path / "a")).manifest
    assert {name: split.samples for name, split in made.splits.items()} == {
        "train": 1437,
        "val": 360,
    }
    assert [entry.id for entry in made.classes] == [str(n) for n in range(10)]
    table = pq.read_table(tmp_path / "a" / "train" / "index.parquet")
    assert set(table["width"].to_pylist()) == set(table["height"].to_pylist()) == {32}
