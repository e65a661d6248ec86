"""Every kind of source, as it is really laid out, ends in the same samples.

If one is wrong, the message names the cause.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import struct
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import layouts
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from answers import conversion
from PIL import Image

from wds_train.conversion.convert import Conversion
from wds_train.conversion.pack import make_shard
from wds_train.conversion.shard_plan import Options, Plan
from wds_train.conversion.sources import huggingface
from wds_train.conversion.sources import torchvision as torchvision_source
from wds_train.conversion.sources.detect import name_of, open_source
from wds_train.conversion.sources.names import key_of
from wds_train.conversion.sources.scan import read_bytes
from wds_train.conversion.sources.spool import Spool
from wds_train.conversion.sources.tars import tar_members
from wds_train.dataset.index import image_of
from wds_train.dataset.reader import Dataset
from wds_train.dataset.shard import KEY, KEY_LENGTH
from wds_train.errors import AccessDenied, DataError, UsageError
from wds_train.storage.local import LocalStore

LAYOUTS = ["image_folder", "ilsvrc", "kaggle", "save_to_disk", "parquet", "webdataset"]


def convert(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run the command in this process; what it printed. Errors are raised."""
    code, output = conversion(capsys, *arguments)
    assert code == 0, output
    return output


def samples(dataset: Path) -> dict[str, Counter[tuple[str, str]]]:
    """Return (class id, sha256 of the image) of all samples by split, read by index and shard."""
    opened = Dataset.open(str(dataset))
    content = {}
    for split in opened.manifest.splits:
        reader = opened.split(split)
        content[split] = Counter(
            (
                opened.manifest.classes[reader.index.label[n]].id,
                hashlib.sha256(_image(reader, n)).hexdigest(),
            )
            for n in range(len(reader))
        )
    return content


def _image(reader, n: int) -> memoryview:  # type: ignore[no-untyped-def]
    name = reader.shard_names[reader.index.shard[n]]
    record = reader.store.read(name, int(reader.index.offset[n]), int(reader.index.length[n]))
    return image_of(reader.index, n, memoryview(record))


def expected(tree: layouts.Tree) -> dict[str, Counter[tuple[str, str]]]:
    return {
        split: Counter(
            (wnid, hashlib.sha256(data).hexdigest())
            for wnid, images in classes.items()
            for _, data in images
        )
        for split, classes in tree.items()
    }


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_ends_in_the_same_samples(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = layouts.small_tree()
    root = getattr(layouts, layout)(tmp_path / "source", tree)
    output = convert(capsys, root, tmp_path / "out", "--shard-mb", "0.03")
    assert "train 15 samples" in output and "val 9 samples" in output and "3 classes" in output
    found, wanted = samples(tmp_path / "out"), expected(tree)
    if layout == "webdataset":  # labels are all that its tars hold
        classes = {str(label): wnid for label, wnid in enumerate(layouts.WNIDS)}
        found = {
            s: Counter({(classes[c], sha): n for (c, sha), n in rows.items()})
            for s, rows in found.items()
        }
    assert found == wanted
    assert len(Dataset.open(str(tmp_path / "out")).manifest.split("train").shards) > 1
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()], (
        "the spool was left behind"
    )


@pytest.mark.parametrize("layout", ["ilsvrc", "parquet"])
def test_imagenette_is_the_same_through_three_layouts(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = layouts.imagenette()
    convert(
        capsys, layouts.image_folder(tmp_path / "folder", tree), tmp_path / "a", "--shard-mb", "20"
    )
    convert(
        capsys,
        getattr(layouts, layout)(tmp_path / layout, tree),
        tmp_path / "b",
        "--shard-mb",
        "20",
    )
    found = samples(tmp_path / "a")
    assert {split: rows.total() for split, rows in found.items()} == {"train": 9_469, "val": 3_925}
    assert found == samples(tmp_path / "b") == expected(tree)


def test_classes_have_their_human_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = layouts.small_tree()
    convert(capsys, layouts.image_folder(tmp_path / "folder", tree), tmp_path / "a")
    convert(capsys, layouts.ilsvrc(tmp_path / "tars", tree), tmp_path / "b")
    convert(capsys, layouts.kaggle(tmp_path / "kaggle", tree), tmp_path / "c")
    named = [
        {c.id: c.name for c in Dataset.open(str(tmp_path / n)).manifest.classes} for n in "abc"
    ]
    assert named[0]["n01440764"] == "tench, Tinca tinca"  # from timm's table
    assert (
        named[1] == named[2] == {wnid: f"words of {wnid}" for wnid in layouts.WNIDS}
    )  # from the source itself


def test_ilsvrc_takes_a_plain_ground_truth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = layouts.small_tree()
    root = layouts.ilsvrc(tmp_path / "tars", tree, devkit=False)
    code, output = conversion(capsys, root, tmp_path / "out")
    assert code == 1 and "needs ILSVRC2012_devkit_t12.tar.gz" in output
    assert not (tmp_path / "out").exists()
    wnids = [wnid for wnid, _, _ in layouts._numbered(tree)]
    (root / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(wnids[:-1]))
    code, output = conversion(capsys, root / "ILSVRC2012_img_train.tar", tmp_path / "out")
    assert code == 1 and "holds 9 images, the ground truth has 8 lines" in output
    (root / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(wnids))
    convert(capsys, root / "ILSVRC2012_img_train.tar", tmp_path / "out")
    assert samples(tmp_path / "out") == expected(tree)


def test_a_stream_larger_than_the_spool_is_read_in_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same bytes whatever the spool holds; and it never holds more than its limit."""
    root = layouts.parquet(tmp_path / "parquet", layouts.small_tree())
    convert(capsys, root, tmp_path / "all", "--shard-mb", "0.01")
    limit = 12_000
    with Spool(tmp_path / "spool", "x", limit) as spool:
        source = open_source(str(root), spool)
        assert source.stream is not None
        conversion = Conversion(
            Plan(source, Options(shard_bytes=int(0.01 * (1 << 20)))),
            LocalStore(tmp_path / "passes"),
        )
        done, windows = conversion.begin(overwrite=False), 0
        assert done == []
        for window in conversion.tasks(set()):
            windows += 1
            assert 0 < (spool.folder / "images").stat().st_size <= limit + 1
            done += map(make_shard, window)
        conversion.finish(done)
    assert windows > 3
    whole, passes = (Dataset.open(str(tmp_path / name)).manifest for name in ("all", "passes"))
    assert whole == passes


def test_a_shard_that_no_spool_could_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = layouts.parquet(tmp_path / "parquet", layouts.small_tree())
    code, output = conversion(capsys, root, tmp_path / "out", "--spool-gb", "0.00001")
    assert code == 2 and "the spool holds 10000" in output


def test_hub_datasets_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The hub cannot be reached from a test; a stream of local Parquet takes the same path."""
    import datasets

    tree = layouts.small_tree()
    root = layouts.parquet(tmp_path / "parquet", tree)
    files = {
        split: str(root / f"data/{split}-00000-of-00001.parquet")
        for split in ("train", "validation")
    }
    splits = datasets.load_dataset(
        "parquet", data_files=files, streaming=True, cache_dir=str(tmp_path / "cache")
    )
    with Spool(tmp_path / "spool", "x") as spool:
        source = huggingface.from_iterable("some/id", splits, spool)
        conversion = Conversion(Plan(source, Options()), LocalStore(tmp_path / "out"))
        conversion.begin(overwrite=False)
        conversion.finish(
            [make_shard(task) for window in conversion.tasks(set()) for task in window]
        )
    assert samples(tmp_path / "out") == expected(tree)
    assert Dataset.open(str(tmp_path / "out")).manifest.source == "huggingface some/id"


def test_torchvision_imagenette_takes_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = layouts.small_tree()
    layouts.image_folder(
        tmp_path / "home" / "torchvision" / "imagenette2", tree
    )  # where torchvision puts the download
    convert(capsys, "torchvision:Imagenette", tmp_path / "out")
    assert samples(tmp_path / "out") == expected(tree)
    names = [entry.name for entry in Dataset.open(str(tmp_path / "out")).manifest.classes]
    assert names == [
        "tench, Tinca tinca",
        "English springer, English springer spaniel",
        "church, church building",
    ]


def test_torchvision_images_in_memory_become_png(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CIFAR's own archive cannot be fetched here: a dataset of its shape stands in for it."""
    images = [
        Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32)) for data in layouts.photos()
    ]

    class Cifar:
        classes = ("airplane", "automobile")

        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            self.rows = [
                (image, n % 2) for n, image in enumerate(images[:16] if train else images[16:])
            ]

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, n: int):  # type: ignore[no-untyped-def]
            return self.rows[n]

    from torchvision import datasets

    monkeypatch.setattr(datasets, "CIFAR10", Cifar)
    with Spool(tmp_path / "spool", "x") as spool:
        source = torchvision_source.open_torchvision("CIFAR10", tmp_path, spool)
        assert {split: table.num_rows for split, table in source.splits.items()} == {
            "train": 16,
            "test": 8,
        }
        row = source.splits["train"].to_pylist()[3]
        data = read_bytes(row["path"], row["offset"], row["length"])
        assert Image.open(io.BytesIO(data)).tobytes() == images[3].tobytes()
        with pytest.raises(UsageError, match="'Nothing'"):
            torchvision_source.open_torchvision("Nothing", tmp_path, spool)


def test_recognise_and_name() -> None:
    assert [
        name_of(a)
        for a in ("digits", "hf:ILSVRC/imagenet-1k", "hf:a/b:c", "torchvision:CIFAR10", "wds:/x/y")
    ] == [
        "digits",
        "imagenet-1k",
        "b",
        "CIFAR10",
        "y",
    ]


# Bad input.


GIF = (
    b"GIF89a\x01\x00\x01\x00\x80\x00\x00\xff\xff\xff\x00\x00\x00"
    b",\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
)


def _png_header(width: int, height: int) -> bytes:
    """Return the head of a PNG of so many pixels: a bomb must be refused before it is decoded."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rest = b"IDAT" + b"\0" * 8
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
        for part in (header, rest)
    )


HUGE = _png_header(16385, 4096)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return layouts.image_folder(tmp_path / "folder", layouts.small_tree())


def fails(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """Return the message of a conversion that must fail, and leave no manifest."""
    out = folder.parent / "out"
    code, output = conversion(capsys, folder, out, *arguments)
    assert code in (1, 2), output
    assert not (out / "manifest.json").exists()
    return output


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("bad.jpg", b"\xff\xd8\xff nothing", "cannot be decoded"),
        ("empty.jpg", b"", "zero bytes"),
        ("notes.doc", b"hello", "not an image that shards hold (.doc)"),
        ("none", b"hello", "not an image that shards hold (no extension)"),
        ("gif.jpg", GIF, "its format is GIF"),
        ("huge.png", HUGE, "it has 16385x4096 pixels, the loader takes 67108864"),
    ],
)
def test_bad_files_stop_the_conversion_or_are_counted(
    name: str, content: bytes, cause: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = folder / "train" / layouts.WNIDS[1] / name
    bad.write_bytes(content)
    output = fails(capsys, folder)
    assert str(bad) in output and cause in output and "1 samples cannot be used" in output
    assert "--max-bad" in output
    convert(capsys, folder, folder.parent / "out", "--max-bad", "0.05")
    assert samples(folder.parent / "out") == expected(layouts.small_tree())
    report = (folder.parent / "out" / "report.json").read_text()
    assert str(bad) in report and "left out" in report


def test_truncated_images_are_found_by_full_verification(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = folder / "val" / layouts.WNIDS[0] / "cut.jpg"
    bad.write_bytes(layouts.photos()[0][:-40])
    assert str(bad) in fails(capsys, folder, "--verify", "full")
    convert(capsys, folder, folder.parent / "out", "--overwrite")  # the header alone looks well


def test_oddities_are_kept_and_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = Image.open(io.BytesIO(layouts.photos()[0]))
    place = folder / "train" / layouts.WNIDS[0]
    photo.convert("CMYK").save(place / "cmyk.JPEG", "JPEG")
    photo.save(place / "really_png.JPEG", "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(place / "turned.JPEG", "JPEG", exif=exif)
    convert(capsys, folder, folder.parent / "out")
    report = (folder.parent / "out" / "report.json").read_text()
    assert "mode CMYK" in report and "EXIF orientation 6" in report
    reader = Dataset.open(str(folder.parent / "out")).split("train")
    rows = {reader.index.key_of(n): n for n in range(len(reader))}
    turned = rows[f"{layouts.WNIDS[0]}/turned"]
    assert (reader.index.width[turned], reader.index.height[turned]) == photo.size[::-1]
    assert _image(reader, rows[f"{layouts.WNIDS[0]}/cmyk"]) == (place / "cmyk.JPEG").read_bytes()
    with tarfile.open(folder.parent / "out" / "train" / "shard-000000.tar") as tar:
        assert f"{layouts.WNIDS[0]}/really_png.png" in tar.getnames()


def test_samples_of_one_name_get_keys_of_their_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = next((folder / "train" / layouts.WNIDS[0]).iterdir())
    first.with_suffix(".png").write_bytes(first.read_bytes())
    convert(capsys, folder, folder.parent / "out")
    reader = Dataset.open(str(folder.parent / "out")).split("train")
    keys = [key for key in reader.index.key.to_pylist() if first.stem in key]
    assert len(set(keys)) == 2 and f"{layouts.WNIDS[0]}/{first.stem}" in keys
    assert reader.index.key.to_pylist().count(keys[0]) == 1


def test_classes_must_have_images_and_be_in_train(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train" / "n09999999").mkdir()
    assert "n09999999 holds no images" in fails(capsys, folder)
    (folder / "train" / "n09999999").rmdir()
    (folder / "val" / "other").mkdir()
    assert "'other' is in" in fails(capsys, folder)


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"'{tmp_path}/nothing' does not exist" in fails(capsys, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "empty holds no class folders" in fails(capsys, tmp_path / "empty")


def test_names_of_all_kinds_become_keys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = [
        "a b.jpg",
        "a.b.jpg",
        "a_b.jpg",
        "äß 猫.jpg",
        "x" * 120 + ".jpg",
        "UPPER.JPG",
        "sub/deep/file.jpeg",
    ]
    place = folder / "train" / layouts.WNIDS[0]
    for name in odd:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(layouts.photos()[7])
    convert(capsys, folder, folder.parent / "out")
    reader = Dataset.open(str(folder.parent / "out")).split("train")
    keys = {reader.index.key_of(n) for n in range(len(reader))}
    assert len(keys) == len(reader) == 15 + len(odd)
    assert all(KEY.fullmatch(key) and len(key) <= KEY_LENGTH for key in keys)
    assert f"{layouts.WNIDS[0]}/sub/deep/file" in keys and f"{layouts.WNIDS[0]}/a_b" in keys


def test_a_name_that_is_no_utf8_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = os.fsencode(folder / "train" / layouts.WNIDS[0]) + b"/caf\xe9.jpg"
    Path(os.fsdecode(bad)).write_bytes(layouts.photos()[7])
    assert "caf\\udce9.jpg: its name is not UTF-8; rename it" in fails(capsys, folder)
    convert(capsys, folder, folder.parent / "out", "--max-bad", "0.1")
    assert samples(folder.parent / "out") == expected(layouts.small_tree())


def test_keys_differ_where_names_do() -> None:
    names = [
        "a b",
        "a_b",
        "a.b",
        "a-b",
        "a/b",
        "a//b",
        "ä",
        "ö",
        "",
        "x" * 200,
        "x" * 201,
        "/".join("y" * 60),
    ]
    keys = [key_of("class", name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(KEY.fullmatch(key) and len(key) <= KEY_LENGTH for key in keys), keys


def test_links_are_followed_and_loops_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder / "train" / layouts.WNIDS[0]
    outside = folder.parent / "elsewhere.jpg"
    outside.write_bytes(layouts.photos()[7])
    (place / "link.jpg").symlink_to(outside)
    convert(capsys, folder, folder.parent / "out")
    assert Dataset.open(str(folder.parent / "out")).manifest.split("train").samples == 16
    (place / "broken.jpg").symlink_to(folder.parent / "nowhere.jpg")
    code, output = conversion(capsys, folder, folder.parent / "second")
    assert code == 1 and "broken.jpg: it cannot be read: No such file" in output
    (place / "broken.jpg").unlink()
    (place / "loop").symlink_to(folder / "train")
    code, output = conversion(capsys, folder, folder.parent / "second")
    assert code == 1 and "is a link to a folder that holds it" in output


def test_system_litter_is_ignored_but_listed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, name in zip(
        layouts.WNIDS * 2, (".DS_Store", ".DS_Store", "Thumbs.db"), strict=False
    ):
        (folder / "train" / place / name).write_bytes(b"x")
    (folder / "train" / "README.md").write_text("hello")
    output = convert(capsys, folder, folder.parent / "out")
    assert ".DS_Store and 2 more: left by the operating system" in output
    assert output.count("\nignored ") == 2 and "README.md: outside the class folders" in output
    report = json.loads((folder.parent / "out" / "report.json").read_text())
    assert len(report["samples"]) == 4
    assert samples(folder.parent / "out") == expected(layouts.small_tree())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train" / layouts.WNIDS[0]).chmod(0)
    assert "no permission to list" in fails(capsys, folder)


def test_no_permission_is_named_whoever_runs_the_tests(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr(os, "scandir", denied)
    with (
        Spool(folder.parent, "x") as spool,
        pytest.raises(AccessDenied, match=f"no permission to list {folder}"),
    ):
        open_source(str(folder), spool, "imagefolder")


def test_no_permission_for_an_image_or_a_tar(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as open_to_all:
        Path(open_to_all).chmod(0o755)
        path = Path(open_to_all) / "some.tar"
        path.write_bytes(layouts.photos()[0])
        path.chmod(0)
        with unprivileged():
            with pytest.raises(
                AccessDenied, match=f"no permission to read {path}; check its owner and mode"
            ):
                read_bytes(str(path), 0, 1)
            with pytest.raises(
                AccessDenied, match=f"no permission to read {path}; check its owner and mode"
            ):
                list(tar_members(path))


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """As somebody whom files of mode 0 refuse: root is not one."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_classes_that_train_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = layouts.small_tree()
    root = layouts.ilsvrc(tmp_path / "tars", tree, devkit=False)
    wnids = ["n09999999", *(wnid for wnid, _, _ in layouts._numbered(tree))][:9]
    (root / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(wnids))
    assert "the ground truth names the class 'n09999999', which train lacks" in fails(capsys, root)
    root = layouts.kaggle(tmp_path / "kaggle", tree)
    solution = root / "LOC_val_solution.csv"
    solution.write_text(solution.read_text().replace(",n01440764", ",n09999999"))
    assert "the LOC_val_solution.csv names the class 'n09999999', which train lacks" in fails(
        capsys, root
    )


def test_kaggle_images_and_lines_that_have_no_counterpart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = layouts.kaggle(tmp_path / "kaggle", layouts.small_tree())
    val = root / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    (val / "ILSVRC2012_val_00000001.JPEG").rename(val / "unknown.JPEG")
    output = fails(capsys, root)
    assert "unknown.JPEG: LOC_val_solution.csv does not name it" in output
    assert "ILSVRC2012_val_00000001: LOC_val_solution.csv names it, but it is not there" in output
    (root / "LOC_val_solution.csv").unlink()
    assert "LOC_val_solution.csv is missing" in fails(capsys, root)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "Image,Label\nILSVRC2012_val_00000001,n01440764\n",
            "its columns are ImageId and PredictionString",
        ),
        ("", "its columns are ImageId and PredictionString|names it|does not name it"),
        (
            "ImageId,PredictionString\nILSVRC2012_val_00000001,\n",
            "names no class for ILSVRC2012_val_00000001",
        ),
        (
            "ImageId,PredictionString\nILSVRC2012_val_00000001\n",
            "its columns are ImageId and PredictionString",
        ),
        ("ImageId,PredictionString\nILSVRC2012_val_00000001,'\x00\n", "LOC_val_solution.csv"),
    ],
)
def test_kaggle_solutions_that_are_none(
    text: str, cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = layouts.kaggle(tmp_path / "kaggle", layouts.small_tree())
    (root / "LOC_val_solution.csv").write_text(text)
    assert re.search(cause, fails(capsys, root))


@pytest.mark.parametrize(
    "number", [b"x", b"9999", b"-1", b"1.5", "²".encode(), b"9" * 5000, b"\xe9"]
)
def test_a_devkits_truth_that_is_no_number(
    number: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = layouts.ilsvrc(tmp_path / "tars", layouts.small_tree())
    (root / "ILSVRC2012_validation_ground_truth.txt").write_bytes(b"\n".join([b"1"] * 8 + [number]))
    assert f"the ground truth holds the id '{number[:40].decode(errors='replace')}'" in fails(
        capsys, root
    )


def test_one_key_in_several_tars_and_twice_in_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = tmp_path / "twice"
    twice.mkdir()
    for number, name in enumerate(("one.tar", "two.tar")):
        photos = layouts.photos()[2 * number : 2 * number + 2]
        pairs = [
            [(tarfile.TarInfo("a.cls"), b"%d" % n), (tarfile.TarInfo("a.jpg"), photo)]
            for n, photo in enumerate(photos)
        ]
        _tar(twice / name, [member for pair in pairs for member in pair])
    convert(capsys, twice, tmp_path / "out", "--hold-out", "0")
    reader = Dataset.open(str(tmp_path / "out")).split("train")
    assert len({*reader.index.key.to_pylist()}) == 4 and sorted(reader.index.label.tolist()) == [
        0,
        0,
        1,
        1,
    ]


@pytest.mark.parametrize("layout", ["save_to_disk", "parquet"])
def test_images_that_are_missing_in_a_table(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = layouts.small_tree()
    tree["train"][layouts.WNIDS[0]][2] = ("gone.JPEG", b"")
    root = getattr(layouts, layout)(tmp_path / layout, tree)
    assert "00000002: zero bytes" in fails(capsys, root)


@pytest.mark.parametrize("layout", ["flat", "parquet", "streamed"])
def test_a_share_is_held_out(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree: layouts.Tree = {"train": layouts.small_tree()["train"]}
    tree["train"]["n09999999"] = [("only.jpg", layouts.photos()[23])]
    root = layouts.image_folder(tmp_path / "folder", tree) / "train"
    arguments: list[str | Path] = ["--hold-out", "0.4", "--shard-mb", "0.01"]
    if layout != "flat":
        root = layouts.parquet(tmp_path / "parquet", tree)
        arguments += ["--spool-gb", "0.000012"] if layout == "streamed" else []
    output = convert(capsys, root, tmp_path / "none", "--hold-out", "0")
    assert "there is no val split, which training needs: --hold-out 0.1" in output
    assert samples(tmp_path / "none").keys() == {"train"}
    assert "val is 10% of each class of train, held out" in convert(
        capsys, root, tmp_path / "usual"
    )
    assert Dataset.open(str(tmp_path / "usual")).manifest.conversion["hold_out"] == 0.1
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        output = convert(capsys, root, tmp_path / name, *arguments, "--seed", seed)
        assert "no val split" not in output
    found = samples(tmp_path / "a")
    assert found["train"] + found["val"] == expected(tree)["train"]
    by_class = Counter(wnid for wnid, _ in found["val"].elements())
    assert by_class == dict.fromkeys(
        layouts.WNIDS, 2
    )  # of five; the only one of a class is for training
    assert samples(tmp_path / "b") == samples(tmp_path / "c") == found
    made = Dataset.open(str(tmp_path / "a")).manifest
    assert made == Dataset.open(str(tmp_path / "b")).manifest and made.conversion["hold_out"] == 0.4
    code, output = conversion(capsys, root, tmp_path / "a", "--shard-mb", "0.01")
    assert code == 2 and "hold_out was 0.4, is now 0.1" in output


def test_nothing_is_held_out_of_a_source_with_val(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "folder has train, val: nothing can be held out; leave --hold-out away" in fails(
        capsys, folder, "--hold-out", "0.1"
    )


def test_labels_outside_the_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = layouts.parquet(tmp_path / "parquet", layouts.small_tree())
    path = root / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    labels = table["label"].to_pylist()
    labels[4], labels[5] = 7, -1
    pq.write_table(table.set_column(1, "label", pa.array(labels, pa.int64())), path)
    output = fails(capsys, root)
    assert "its label 7 is outside the 3 classes" in output and "no label" in output
    convert(capsys, root, tmp_path / "out", "--max-bad", "0.2")
    assert Dataset.open(str(tmp_path / "out")).manifest.split("train").samples == 13


# Hostile tars: named, never executed, nothing written.


class Canary:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.mkdir, (str(Canary.path),)

    path = Path()


def _tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _link(name: str, target: str, kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def test_hostile_members_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Canary.path = tmp_path / "executed"
    photo, good = (
        layouts.photos()[0],
        [(tarfile.TarInfo("ok.cls"), b"0"), (tarfile.TarInfo("ok.jpg"), layouts.photos()[1])],
    )
    hostile = [
        (tarfile.TarInfo("evil.pyd"), pickle.dumps(Canary())),
        (tarfile.TarInfo("evil.cls"), b"0"),
        (tarfile.TarInfo("evil.jpg"), photo),
        (tarfile.TarInfo("../../escape.jpg"), photo),
        (tarfile.TarInfo("/absolute.jpg"), photo),
        _link("soft.jpg", "/etc/passwd", tarfile.SYMTYPE),
        _link("hard.jpg", "ok.jpg", tarfile.LNKTYPE),
        _link("fifo.jpg", "", tarfile.FIFOTYPE),
        _link("sparse.jpg", "", tarfile.GNUTYPE_SPARSE),
        (tarfile.TarInfo("label.cls"), b"cos\nsystem\n(S'true'\ntR."),
        (tarfile.TarInfo("label.jpg"), photo),
    ]
    path = _tar(tmp_path / "evil.tar", good + hostile)
    before = sorted(tmp_path.rglob("*"))
    code, output = conversion(capsys, f"wds:{path}", tmp_path / "out")
    assert code == 1, output
    for cause in (
        "../../escape.jpg: its name points outside",
        "/absolute.jpg: its name points outside",
        "soft.jpg: a symbolic link, not a file",
        "hard.jpg: a hard link",
        "fifo.jpg: a special file",
        "sparse.jpg: a sparse file",
        'label: its label is b"cos',
    ):
        assert cause in output
    assert not Canary.path.exists()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda data: data[:2000], "in the middle of"),
        (
            lambda data: data.rstrip(b"\0") + bytes(600),
            "without the blocks that end|in the middle of",
        ),
        (lambda data: data[:3] + b"\xff" + data[4:], "the tar header at byte 0 is damaged"),
        (gzip.compress, "compressed with gzip"),
        (lambda data: data + data, "more follows the end"),
    ],
)
def test_damaged_tars_are_refused(damage, cause: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    root = layouts.webdataset(tmp_path / "wds", layouts.small_tree())
    path = next(root.glob("some-val*.tar"))
    path.write_bytes(damage(path.read_bytes()))
    with Spool(tmp_path, "x") as spool, pytest.raises(DataError, match=cause) as caught:
        open_source(str(root), spool)
    assert str(path) in str(caught.value)


def test_sources_change_under_the_conversion(folder: Path) -> None:
    with Spool(folder.parent, "x") as spool:
        source = open_source(str(folder), spool)
    before = source.digest()
    path = next((folder / "train" / layouts.WNIDS[0]).iterdir())
    os.utime(path, (1, 1))
    with Spool(folder.parent, "x") as spool:
        assert open_source(str(folder), spool).digest() != before, (
            "a file of the same size was replaced unseen"
        )
    path.write_bytes(path.read_bytes()[:-5])
    conversion = Conversion(Plan(source, Options()), LocalStore(folder.parent / "out"))
    with pytest.raises(DataError, match=f"{path} ends at byte"):
        [make_shard(task) for window in conversion.tasks(set()) for task in window]
