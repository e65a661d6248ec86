"""`verify` finds every kind of damage and names it; `inspect` tells what is there.

`index` makes a dataset of foreign tars.
"""

import dataclasses
import hashlib
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import layouts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards.make_shards import main
from wds_train.cli import main as wds_train
from wds_train.dataset import integrity as audit
from wds_train.dataset.index import image_of
from wds_train.dataset.manifest import DatasetManifest, Index
from wds_train.dataset.reader import Dataset
from wds_train.storage.local import LocalStore
from wds_train.storage.open import open_store


def shards(*arguments: str | Path) -> int:
    before, sys.argv = sys.argv, ["make_shards", *map(str, arguments), "--processes", "1"]
    try:
        return main()
    finally:
        sys.argv = before


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = layouts.image_folder(tmp_path / "folder", layouts.small_tree())
    assert shards(folder, tmp_path / "out", "--shard-mb", "0.02") == 0
    return tmp_path / "out"


def verify(out: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of damage; the command's exit code must agree with them."""
    capsys.readouterr()
    code = wds_train(["verify", str(out)])
    *damage, summary = capsys.readouterr().out.splitlines()
    assert code == (1 if damage else 0), (damage, summary)
    assert ("whole" in summary) == (not damage)
    return damage


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def row(out: Path, number: int) -> tuple[str, int, int, Path]:
    """Key, offset and data offset of sample `number`, and the path of its shard."""
    reader = Dataset.open(str(out)).split("train")
    index = reader.index
    shard = out / reader.shard_names[index.shard[number]]
    return index.key_of(number), int(index.offset[number]), int(index.data_offset[number]), shard


def test_a_whole_dataset_is_whole(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(Dataset.open(str(out)).manifest.split("train").shards) > 2
    assert verify(out, capsys) == []


@pytest.mark.parametrize("place", ["data", "header", "size", "label", "padding"])
def test_a_flipped_byte_is_named(place: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, offset, data, shard = row(out, 7)
    flip(
        shard,
        {
            "data": data + 50,
            "header": offset + 3,
            "size": offset + 130,
            "label": offset + 512,
            "padding": offset + 520,
        }[place],
    )
    damage = verify(out, capsys)
    assert (
        damage[0] == f"train/{shard.name} {key}: its bytes do not match the checksum in the index"
    )
    assert (
        len(damage) == 2
        and "its sha256 differs from the manifest's; 1 samples are named" in damage[1]
    )


def test_a_flipped_byte_after_the_samples(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = out / "train" / "shard-000000.tar"
    flip(shard, shard.stat().st_size - 1)
    (damage,) = verify(out, capsys)
    assert (
        "train/shard-000000.tar: its sha256 differs" in damage and "outside the samples" in damage
    )


def test_a_cut_shard_names_what_is_lost(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, offset, _, shard = row(out, 1)
    shard.write_bytes(shard.read_bytes()[: offset + 700])
    damage = verify(out, capsys)
    reader = Dataset.open(str(out)).split("train")
    lost = [reader.index.key_of(n) for n in range(1, int(np.sum(reader.index.shard == 0)))]
    assert [line.split(":")[0] for line in damage[:-1]] == [
        f"train/{shard.name} {name}" for name in lost
    ]
    assert key in lost and f"it has {offset + 700} bytes" in damage[-1]


def test_a_missing_shard(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "val" / "shard-000000.tar").unlink()
    (damage,) = verify(out, capsys)
    assert damage.startswith("val/shard-000000.tar: it is missing, with ")


def test_swapped_shards(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (out / "train" / f"shard-00000{n}.tar" for n in (0, 1))
    first = one.read_bytes()
    second = two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert verify(out, capsys) == [
        "train/shard-000000.tar: it holds the bytes of train/shard-000001.tar",
        "train/shard-000001.tar: it holds the bytes of train/shard-000000.tar",
    ]


@pytest.mark.parametrize("forged", [False, True])
def test_a_wrong_label_in_the_index(
    forged: bool, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when the manifest was made to fit the changed index."""
    key, _, _, shard = row(out, 3)
    path = out / "train" / "index.parquet"
    table = pq.read_table(path)
    labels = table["label"].to_pylist()
    right, labels[3] = labels[3], (labels[3] + 1) % 3
    pq.write_table(table.set_column(5, "label", pa.array(labels, pa.int32())), path)
    if forged:
        made = DatasetManifest.from_json((out / "manifest.json").read_bytes(), "x")
        data = path.read_bytes()
        index = Index("train/index.parquet", len(data), hashlib.sha256(data).hexdigest())
        splits = made.splits | {"train": dataclasses.replace(made.splits["train"], index=index)}
        (out / "manifest.json").write_bytes(dataclasses.replace(made, splits=splits).to_json())
    damage = verify(out, capsys)
    line = f"train/{shard.name} {key}: its label is '{right}' in the shard and {labels[3]} in the index"
    assert line in damage
    assert any("train/index.parquet: it is not what the manifest names" in d for d in damage) == (
        not forged
    )


def test_a_damaged_index(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "train" / "index.parquet").write_bytes(b"nothing")
    damage = verify(out, capsys)
    assert any("not what the manifest names" in line for line in damage)
    assert any("is not an index that can be read" in line for line in damage)
    (out / "val" / "index.parquet").unlink()
    assert any("val/index.parquet: it is missing" in line for line in verify(out, capsys))


def test_inspect(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert wds_train(["inspect", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {name: split["samples"] for name, split in facts["splits"].items()} == {
        "train": 15,
        "val": 9,
    }
    assert facts["splits"]["train"]["per_class"] == dict.fromkeys(layouts.WNIDS, 5)
    sizes = [Image.open(path).size for path in (tmp_path / "folder" / "train").rglob("*.JPEG")]
    widths = facts["splits"]["train"]["quantiles"]["width"]
    assert (widths[0], widths[-1]) == (min(w for w, _ in sizes), max(w for w, _ in sizes))
    assert facts["bytes"] == sum(path.stat().st_size for path in out.rglob("*.tar"))
    assert facts["fingerprint"] == Dataset.open(str(out)).fingerprint
    assert wds_train(["inspect", str(out), "--grid", str(tmp_path / "grid.png")]) == 0
    text = capsys.readouterr().out
    assert "15 samples" in text and "English springer" in text
    sheet = Image.open(tmp_path / "grid.png")
    assert sheet.width == 1280
    assert len(set(Image.open(tmp_path / "grid.png").convert("L").tobytes())) > 200, (
        "no photographs on it"
    )


# Tars that stay where they lie.


def put(url: str, folder: Path) -> None:
    store = open_store(url)
    for path in folder.iterdir():
        store.write(f"tars/{path.name}", path.read_bytes())


def test_index_makes_a_dataset_of_tars_on_s3(
    tmp_path: Path, s3_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = layouts.small_tree()
    put(s3_url, layouts.webdataset(tmp_path / "wds", tree))
    store = open_store(s3_url)
    before = {entry.key: store.read(entry.key) for entry in store.list()}
    assert shards("index", s3_url) == 0
    after = {entry.key: store.read(entry.key) for entry in store.list()}
    assert {key: after[key] for key in before} == before, "the tars were touched"
    assert after.keys() - before.keys() == {
        "manifest.json",
        "report.json",
        "train/index.parquet",
        "val/index.parquet",
    }
    dataset = Dataset.open(s3_url)
    for split in ("train", "val"):
        reader = dataset.split(split)
        found = Counter[tuple[str, str]]()
        for n in range(len(reader)):
            shard = reader.shard_names[reader.index.shard[n]]
            record = store.read(shard, int(reader.index.offset[n]), int(reader.index.length[n]))
            image = image_of(reader.index, n, memoryview(record))
            found[layouts.WNIDS[reader.index.label[n]], hashlib.sha256(image).hexdigest()] += 1
        wanted = Counter(
            (wnid, hashlib.sha256(data).hexdigest())
            for wnid, images in tree[split].items()
            for _, data in images
        )
        assert found == wanted
    assert not list(audit.verify(dataset))
    assert shards("index", s3_url) == 0  # once more: the same
    flipped = bytearray(before["tars/some-val-000000.tar"])
    flipped[2000] ^= 1
    store.write("tars/some-val-000000.tar", flipped)
    assert [damage.shard for damage in audit.verify(dataset)] == ["tars/some-val-000000.tar"] * 2


def _rewrite(path: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> None:
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    change(members)
    path.write_bytes(layouts.tar_of([(info.name, data) for info, data in members]))


def test_index_names_what_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = layouts.webdataset(tmp_path / "wds", layouts.small_tree())
    path = root / "some-val-000000.tar"
    whole = path.read_bytes()

    def apart(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members.append(members.pop(0))

    def unlabelled(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        del members[next(n for n, (info, _) in enumerate(members) if info.name.endswith(".cls"))]

    def empty(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[:] = [(info, b"" if info.name.endswith(".jpg") else data) for info, data in members]

    for change, cause in (
        (apart, "do not lie side by side"),
        (unlabelled, "no .cls or .json member with a label"),
        (empty, "zero bytes"),
    ):
        path.write_bytes(whole)
        _rewrite(path, change)
        capsys.readouterr()
        assert shards("index", root) == 1
        captured = capsys.readouterr()
        assert cause in captured.out + captured.err and path.name in captured.out + captured.err
        assert not (root / "manifest.json").exists()
    path.write_bytes(whole)
    _rewrite(path, unlabelled)
    assert shards("index", root, "--max-bad", "0.1") == 0
    assert Dataset.open(str(root)).manifest.split("val").samples == 8
    assert not list(audit.verify(Dataset.open(str(root))))
    path.write_bytes(whole)
    assert shards("index", root) == 2
    assert "another manifest already" in capsys.readouterr().err
    assert shards("index", root, "--overwrite") == 0
    assert Dataset.open(str(root)).manifest.split("val").samples == 9


def test_index_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shards("index", tmp_path) == 2
    assert f"{tmp_path} holds no .tar files" in capsys.readouterr().err
    assert shards("index") == 2


def test_our_own_shards_can_be_sharded_again(out: Path, tmp_path: Path) -> None:
    """Through wds:, with the classes of the manifest beside them; the same samples, another cut."""
    assert shards(f"wds:{out}", tmp_path / "again") == 0
    old = Dataset.open(str(out))
    new = Dataset.open(str(tmp_path / "again"))
    assert new.manifest.classes == old.manifest.classes
    for split in ("train", "val"):
        one = old.split(split).index
        two = new.split(split).index
        assert sorted(zip(one.key.to_pylist(), one.label, one.data_length, strict=True)) == sorted(
            zip(two.key.to_pylist(), two.label, two.data_length, strict=True)
        )
    assert len(list(LocalStore(tmp_path / "again").list("train/"))) == 2
