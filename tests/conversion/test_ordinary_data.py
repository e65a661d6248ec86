"""Data as people have it: folders by any name, tables, odd files.

Each is understood, or refused in one sentence.
"""

import contextlib
import gzip
import hashlib
import io
import json
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import layouts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from answers import conversion
from PIL import Image

from wds_train.cli import main as wds_train
from wds_train.conversion.image_policy import ImagePolicy, check
from wds_train.dataset.reader import Dataset
from wds_train.images.crop import Box
from wds_train.images.decode import decode_crop, probe
from wds_train.storage.local import LocalStore

PHOTOS = layouts.photos()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_HOME", str(tmp_path / "home"))


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def tree(
    *folders: str, classes: tuple[str, ...] = ("cat", "dog"), images: int = 4
) -> dict[str, bytes]:
    """`images` photographs in each class folder of each of `folders`."""
    return {
        f"{folder}{name}/{n}.jpg": PHOTOS[n]
        for folder in folders
        for name in classes
        for n in range(images)
    }


def understood(out: Path) -> dict[str, dict[str, int]]:
    """Per split, the number of samples of every class."""
    made = Dataset.open(str(out))
    counts = {}
    for split in made.manifest.splits:
        labels = np.bincount(made.split(split).index.label, minlength=len(made.manifest.classes))
        counts[split] = {
            entry.id: int(n) for entry, n in zip(made.manifest.classes, labels, strict=True)
        }
    return counts


def hashes(root: Path) -> dict[str, str]:
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def of(*splits: str, each: int = 4) -> dict[str, dict[str, int]]:
    return {split: {"cat": each, "dog": each} for split in splits}


HELD = {"train": {"cat": 3, "dog": 3}, "val": {"cat": 1, "dog": 1}}
ANSWERS = b"file,label\n" + b"".join(
    b"%s/%d.jpg,%s\n" % (c, n, c) for c in (b"cat", b"dog") for n in range(4)
)
LAYOUTS = {
    "train, val": (tree("train/", "val/"), of("train", "val")),
    "training, validation": (tree("training/", "validation/"), of("train", "val")),
    "Train, Test": (tree("Train/", "Test/"), HELD | of("test")),
    "seg_train, seg_test, doubled": (
        tree("seg_train/seg_train/", "seg_test/seg_test/") | {"seg_pred/seg_pred/9.jpg": PHOTOS[9]},
        HELD | of("test"),
    ),
    "data/{train,val}": (
        tree("data/train/", "data/val/") | {"README.md": b"mine"},
        of("train", "val"),
    ),
    "archive/data/{train,valid,test}": (
        tree("archive/data/train/", "archive/data/valid/", "archive/data/test/"),
        of("train", "val", "test"),
    ),
    "train_images, dev-set, testing": (
        tree("train_images/", "dev-set/", "testing/"),
        of("train", "val", "test"),
    ),
    "flat": (tree(""), HELD),
    "flat, wrapped": (tree("animals/"), HELD),
    "test without classes": (
        tree("train/", "val/") | {"test/1.jpg": PHOTOS[1], "test/2.jpg": PHOTOS[2]},
        of("train", "val"),
    ),
    "a class called train": (
        tree("", classes=("bus", "train")),
        {"train": {"bus": 3, "train": 3}, "val": {"bus": 1, "train": 1}},
    ),
    "images, labels.csv": (
        {f"images/{name}": data for name, data in tree("").items()} | {"labels.csv": ANSWERS},
        HELD,
    ),
    "images, labels.csv with a split": (
        {f"images/{name}": data for name, data in tree("").items()}
        | {
            "labels.csv": b"".join(
                line
                + (
                    b";split\n"
                    if n == 0
                    else (b";train\n", b";validation\n", b";test\n", b";train\n")[n % 4]
                )
                for n, line in enumerate(ANSWERS.replace(b",", b";").splitlines())
            )
        },
        {"train": {"cat": 2, "dog": 2}, "val": {"cat": 1, "dog": 1}, "test": {"cat": 1, "dog": 1}},
    ),
    "train.csv, test.csv": (
        {f"images/{name}": data for name, data in tree("").items()}
        | {
            "train.csv": b"\xef\xbb\xbfid\tbreed\n"
            + ANSWERS.partition(b"\n")[2].replace(b".jpg", b"").replace(b",", b"\t"),
            "test.csv": b"id\ncat/0\n",
        },
        HELD,
    ),
    "train.csv, test.csv, in UTF-16, of the same names in other letters": (
        {
            f"{split}/{c}{n}.JPG": PHOTOS[n]
            for split in ("train", "test")
            for c in ("cat", "dog")
            for n in range(4)
        }
        | {
            f"{split}.csv": (
                "file,label\n"
                + "".join(f"{c}{n}.jpg,{c}\n" for c in ("cat", "dog") for n in range(4))
            ).encode("utf-16")
            for split in ("train", "test")
        },
        HELD | of("test"),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, counts = LAYOUTS[name]
    root = put(tmp_path / "mine", files)
    before = hashes(root)
    code, output = conversion(capsys, root, tmp_path / "out")
    assert code == 0, output
    assert understood(tmp_path / "out") == counts
    classes = ", ".join(counts["train"])
    first = next(line for line in output.splitlines() if "classes (" in line)
    assert f"2 classes ({classes}); " in first  # what was understood is said before the work
    assert first.endswith(
        ", ".join(f"{split} {sum(found.values())}" for split, found in counts.items())
    )
    assert hashes(root) == before


REFUSED_LAYOUTS = {
    "splits alone": (tree("val/", "test/"), "names of splits"),
    "images and masks": (
        tree("", classes=("images", "masks")),
        "is no folder of classes: the classes would be images, masks",
    ),
    "one class": (tree("", classes=("cat",)), "holds one class folder, 'cat'"),
    "images alone": ({"1.jpg": PHOTOS[0], "2.jpg": PHOTOS[1]}, "holds no class folders"),
    "two names of a split": (
        tree("train/", "val/", "validation/"),
        "val and validation, which are all names of the split val",
    ),
    "several data sets": (tree("one/train/", "two/train/"), "holds several data sets: one, two"),
    "a class that train lacks": (
        tree("train/") | tree("val/", classes=("cow",)),
        "the class 'cow' is in",
    ),
    "a table of other columns": (
        {"1.jpg": PHOTOS[0], "t.csv": b"x,y,z\n1,2,3\n"},
        "t.csv has the columns x, y, z",
    ),
    "a table of no images": (
        {"1.jpg": PHOTOS[0], "t.csv": b"file,label\n7.jpg,cat\n8.jpg,dog\n"},
        "2 x there is no such image",
    ),
    "a table of one label": (
        {"1.jpg": PHOTOS[0], "2.jpg": PHOTOS[1], "t.csv": b"file,label\n1.jpg,cat\n2.jpg,cat\n"},
        "know one label, 'cat'",
    ),
    "folds": (
        tree("fold0/", "fold1/"),
        "is no folder of classes: the classes would be fold0, fold1",
    ),
    "val without classes": (
        tree("train/") | {"val/1.jpg": PHOTOS[1], "val/2.jpg": PHOTOS[2]},
        "val holds no class folders: sort its images into folders called as those of train",
    ),
    "a class that is no UTF-8": (
        tree("", classes=("cat", "d\udcf6g")),
        "the class 'd\\udcf6g' has a name that cannot",
    ),
    "a class of two lines": (
        tree("", classes=("cat", "d\ng")),
        "the class 'd\\ng' has a name that cannot be printed",
    ),
    "a table of captions": (
        {f"{n}.jpg": PHOTOS[n % 24] for n in range(30)}
        | {
            "t.csv": b"file,label\n"
            + b"".join(b"%d.jpg,photo number %d\n" % (n, n) for n in range(30))
        },
        "30 different labels in 30 samples",
    ),
}


@pytest.mark.parametrize("name", REFUSED_LAYOUTS)
def test_layouts_that_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, sentence = REFUSED_LAYOUTS[name]
    refused(capsys, sentence, put(tmp_path / "mine", files))


def refused(
    capsys: pytest.CaptureFixture[str], sentence: str, source: Path | str, *flags: str
) -> None:
    folder = Path(str(source).removeprefix("wds:"))
    before, out = hashes(folder), folder.with_name("out")
    code, output = conversion(capsys, source, out, *flags)
    assert code in (1, 2), output
    assert sentence in output, output
    assert "Traceback" not in output
    assert not (out / "manifest.json").exists() and hashes(folder) == before


# Odd files among good ones: what becomes of each.


def encoded(form: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(PHOTOS[0])).save(out, form, **options)
    return out.getvalue()


def animated() -> bytes:
    out, frames = (
        io.BytesIO(),
        [Image.open(io.BytesIO(PHOTOS[n])).resize((40, 40)) for n in range(3)],
    )
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


KEPT = ""  # the odd file becomes a sample
IGNORED = "ignored"
ODD_FILES: dict[str, tuple[bytes, str, tuple[str, ...]]] = {
    "photo.JPG": (PHOTOS[5], KEPT, ()),
    "photo.jpeg": (PHOTOS[5], KEPT, ()),
    "photo.jfif": (PHOTOS[5], KEPT, ()),
    "photo.jpe": (PHOTOS[5], KEPT, ()),
    "really a png.jpg": (encoded("PNG"), KEPT, ()),
    "really a jpeg.png": (PHOTOS[5], KEPT, ()),
    "photo.webp": (encoded("WEBP"), KEPT, ()),
    "0.png": (encoded("PNG"), KEPT, ()),  # beside 0.jpg
    "two words, and a comma.jpg": (PHOTOS[5], KEPT, ()),
    "ünï cödé 猫.jpg": (PHOTOS[5], KEPT, ()),
    "a.b.c.jpg": (PHOTOS[5], KEPT, ()),
    "deep/er/photo.jpg": (PHOTOS[5], KEPT, ()),
    "x" * 200 + ".jpg": (PHOTOS[5], KEPT, ()),
    "-rf.jpg": (PHOTOS[5], KEPT, ()),
    "photo.bmp": (encoded("BMP"), "not an image that shards hold (.bmp); --reencode takes it", ()),
    "photo.gif": (encoded("GIF"), "not an image that shards hold (.gif); --reencode takes it", ()),
    "photo.tiff": (
        encoded("TIFF"),
        "not an image that shards hold (.tiff); --reencode takes it",
        (),
    ),
    "photo.avif": (
        encoded("AVIF"),
        "not an image that shards hold (.avif); --reencode takes it",
        (),
    ),
    "bmp.jpg": (encoded("BMP"), "its format is BMP", ()),
    "one.bmp": (encoded("BMP"), KEPT, ("--reencode",)),
    "one.gif": (encoded("GIF"), KEPT, ("--reencode",)),
    "one.tif": (encoded("TIFF"), KEPT, ("--reencode",)),
    "one.tiff": (encoded("TIFF", compression="tiff_lzw"), KEPT, ("--reencode",)),
    "one.avif": (encoded("AVIF"), KEPT, ("--reencode",)),
    "gif.jpg": (encoded("GIF"), KEPT, ("--reencode",)),
    "moving.gif": (animated(), KEPT, ("--reencode",)),
    "cut.bmp": (encoded("BMP")[:3000], "cannot be decoded", ("--reencode",)),
    "caption.txt": (b"a cat", IGNORED, ()),
    "box.xml": (b"<annotation/>", IGNORED, ()),
    "meta.json": (b"{}", IGNORED, ()),
    "notes.csv": (b"a,b", IGNORED, ()),
    "Thumbs.db": (b"x", IGNORED, ()),
    "desktop.ini": (b"x", IGNORED, ()),
    ".DS_Store": (b"x", IGNORED, ()),
    "._0.jpg": (b"x", IGNORED, ()),
    "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg": (PHOTOS[5], IGNORED, ()),
    "__MACOSX/0.jpg": (PHOTOS[5], IGNORED, ()),
    ".ipynb_checkpoints/0.jpg": (PHOTOS[5], IGNORED, ()),
    "empty.jpg": (b"", "zero bytes", ()),
    "text.jpg": (b"this is no picture", "cannot be decoded", ()),
    "cut.jpg": (PHOTOS[5][:40], "cannot be", ()),
    "photo.svg": (b"<svg/>", "not an image that shards hold (.svg)", ()),
    "photo.heic": (b"\0\0\0\x18ftypheic", "not an image that shards hold (.heic)", ()),
    "movie.mp4": (b"x", "not an image that shards hold (.mp4)", ()),
    "no extension": (PHOTOS[5], "not an image that shards hold (no extension)", ()),
    "model.pkl": (b"cos\nsystem\n(S'true'\ntR.", "not an image that shards hold (.pkl)", ()),
    "photo.jpg.part": (PHOTOS[5], IGNORED, ()),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_odd_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, result, flags = ODD_FILES[name]
    root = put(tmp_path / "mine", tree("train/", "val/") | {f"train/cat/{name}": data})
    if result not in (KEPT, IGNORED):
        refused(capsys, result, root, *flags)
        code, output = conversion(capsys, root, tmp_path / "out", *flags)
        share = output.rpartition("--max-bad ")[2].split()[0]
        assert (
            conversion(capsys, root, tmp_path / "out", *flags, "--max-bad", share)[0] == 0
        )  # what it says suffices
    else:
        code, output = conversion(capsys, root, tmp_path / "out", *flags)
        assert code == 0, output
    assert understood(tmp_path / "out")["train"] == {"cat": 5 if result == KEPT else 4, "dog": 4}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["reencoded"] == ("--reencode" in flags and result == KEPT)
    if result == IGNORED:
        assert [row["what"] for row in report["samples"]] == ["ignored"]
    assert wds_train(["verify", str(tmp_path / "out")]) == 0


def test_a_link_to_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = put(tmp_path / "mine", tree("train/", "val/"))
    (root / "train" / "cat" / "loop").symlink_to(root / "train" / "cat" / "loop")
    code, output = conversion(capsys, root, tmp_path / "out")
    assert code == 1 and "loop: it cannot be read: Too many levels of symbolic links" in output


# Labels: of tars, of tables of Hugging Face.


def tar_with(root: Path, *samples: dict[str, bytes], name: str = "train-0.tar") -> Path:
    """A tar whose sample n has the members `n.EXTENSION`."""
    files = [
        (f"{n:03d}.{extension}", data)
        for n, sample in enumerate(samples)
        for extension, data in sample.items()
    ]
    return put(root, {name: layouts.tar_of(files)})


def labelled(extension: str, *labels: bytes) -> list[dict[str, bytes]]:
    return [{"jpg": PHOTOS[n], extension: label} for n, label in enumerate(labels)]


TARS: dict[str, tuple[list[dict[str, bytes]], dict[str, int]]] = {
    "numbers": (labelled("cls", b"0", b"1", b"1\n", b" 0 "), {"0": 2, "1": 2}),
    "numbers with a gap": (labelled("cls", b"0", b"2", b"2", b"0"), {"0": 2, "2": 2}),
    "names": (labelled("cls", b"cat", b"dog", b"cat", b"dog"), {"cat": 2, "dog": 2}),
    "names of figures": (labelled("cls", b"003", b"007", b"003", b"007"), {"003": 2, "007": 2}),
    "a number among names": (labelled("cls", b"7", b"cat", b"7", b"cat"), {"7": 2, "cat": 2}),
    "JSON text": (labelled("cls", b'"cat"', b'"dog"', b'"cat"', b'"dog"'), {"cat": 2, "dog": 2}),
    "JSON field": (
        labelled("json", b'{"label": 1}', b'{"label": 0}', b'{"label": 1}', b'{"label": 0}'),
        {"0": 2, "1": 2},
    ),
    "JSON class": (
        labelled("json", *[b'{"class": "%s"}' % name for name in (b"a", b"b", b"a", b"b")]),
        {"a": 2, "b": 2},
    ),
    "txt": (labelled("txt", b"cat", b"dog", b"cat", b"dog"), {"cat": 2, "dog": 2}),
    "label.txt": (labelled("label.txt", b"cat", b"dog", b"cat", b"dog"), {"cat": 2, "dog": 2}),
    "captions beside labels": (
        [sample | {"txt": b"a photo"} for sample in labelled("cls", b"0", b"1", b"0", b"1")],
        {"0": 2, "1": 2},
    ),
    "image.jpg, label.cls": (
        [{"image.jpg": PHOTOS[n], "label.cls": b"%d" % (n % 2)} for n in range(4)],
        {"0": 2, "1": 2},
    ),
    "huge numbers": (
        labelled("cls", b"2000000000", b"3000000000", b"2000000000", b"3000000000"),
        {"2000000000": 2, "3000000000": 2},
    ),
}


@pytest.mark.parametrize("name", TARS)
def test_labels_of_tars(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, counts = TARS[name]
    root = tar_with(tmp_path / "mine", *samples)
    code, output = conversion(capsys, root, tmp_path / "out", "--hold-out", "0")
    assert code == 0, output
    assert understood(tmp_path / "out") == {"train": counts}
    packed = put(
        tmp_path / "packed", {"train-0.tar.gz": gzip.compress((root / "train-0.tar").read_bytes())}
    )
    assert conversion(capsys, packed, tmp_path / "gz", "--hold-out", "0")[0] == 0
    assert (
        Dataset.open(str(tmp_path / "gz")).fingerprint
        == Dataset.open(str(tmp_path / "out")).fingerprint
    )
    if "txt" not in name:  # in place, one sample after the other, a text may as well be a caption
        code, output = conversion(capsys, "index", root)
        assert code == 0, output
        assert understood(root) == {"train": counts}
        assert wds_train(["verify", str(root)]) == 0


def test_names_for_the_labels_of_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tar_with(tmp_path / "mine", *labelled("cls", b"0", b"1", b"0", b"1"))
    put(root, {"classes.txt": b"cat\ndog\ncow\n"})
    assert conversion(capsys, root, tmp_path / "out", "--hold-out", "0")[0] == 0
    assert understood(tmp_path / "out") == {"train": {"cat": 2, "dog": 2, "cow": 0}}
    put(root, {"classes.txt": b"cat\n"})
    code, output = conversion(capsys, root, tmp_path / "other")
    assert code == 1 and "holds the label 1, " in output and "names 1 classes" in output


def test_members_that_lie_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [(f"{n}.cls", b"%d" % (n % 2)) for n in range(4)] + [
        (f"{n}.jpg", PHOTOS[n]) for n in range(4)
    ]
    root = put(tmp_path / "mine", {"a.tar": layouts.tar_of(files)})
    assert conversion(capsys, root, tmp_path / "out", "--hold-out", "0")[0] == 0
    assert understood(tmp_path / "out") == {"train": {"0": 2, "1": 2}}
    nested = [
        (f"{n}/{name}", data)
        for n in range(4)
        for name, data in (("image.jpg", PHOTOS[n]), ("label.cls", b"%d" % (n % 2)))
    ]
    assert (
        conversion(
            capsys,
            put(tmp_path / "nested", {"a.tar": layouts.tar_of(nested)}),
            tmp_path / "two",
            "--hold-out",
            "0",
        )[0]
        == 0
    )
    assert understood(tmp_path / "two") == {"train": {"0": 2, "1": 2}}


def parquet(
    root: Path, images: pa.Array, labels: pa.Array, metadata: dict[bytes, bytes] | None = None
) -> Path:
    root.mkdir()
    table = pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)
    pq.write_table(table, root / "train.parquet")
    return root


BYTES = pa.array(list(PHOTOS[:4]))
FOUR = pa.array([0, 1, 0, 1])
HF: dict[str, tuple[Callable[[Path], Path], str | dict[str, int]]] = {
    "plain": (lambda p: parquet(p, BYTES, FOUR), {"0": 2, "1": 2}),
    "dictionary": (
        lambda p: parquet(p, BYTES, pa.array(["a", "b", "a", "b"]).dictionary_encode()),
        {"a": 2, "b": 2},
    ),
    "texts": (lambda p: parquet(p, BYTES, pa.array(["a", "b", "a", "b"])), {"a": 2, "b": 2}),
    "truths": (
        lambda p: parquet(p, BYTES, pa.array([True, False, True, False])),
        {"False": 2, "True": 2},
    ),
    "huge": (
        lambda p: parquet(p, BYTES, pa.array([3 * 10**9, 5, 5, 3 * 10**9])),
        {"5": 2, "3000000000": 2},
    ),
    "broken metadata": (
        lambda p: parquet(p, BYTES, FOUR, {b"huggingface": b"{nothing"}),
        {"0": 2, "1": 2},
    ),
    "odd metadata": (lambda p: parquet(p, BYTES, FOUR, {b"huggingface": b"[1]"}), {"0": 2, "1": 2}),
    "floats": (
        lambda p: parquet(p, BYTES, pa.array([0.5, 1.0, 0.5, 1.0])),
        "the column 'label' holds double",
    ),
    "lists": (
        lambda p: parquet(p, BYTES, pa.array([[0], [1], [0], [1]])),
        "the column 'label' holds list<",
    ),
    "image lists": (
        lambda p: parquet(p, pa.array([[b"x"]] * 4), FOUR),
        "the column 'image' holds list<",
    ),
    "image texts": (
        lambda p: parquet(p, pa.array(["x"] * 4), FOUR),
        "the column 'image' holds string",
    ),
    "no bytes": (
        lambda p: parquet(p, pa.array([{"path": "x"}] * 4), FOUR),
        "the column 'image' holds struct<",
    ),
    "all without labels": (
        lambda p: parquet(p, BYTES, pa.array([None, None, None, None], pa.int64())),
        "4 x no label",
    ),
    "all empty": (lambda p: parquet(p, pa.array([b""] * 4), FOUR), "4 x zero bytes"),
    "names no list": (
        lambda p: parquet(
            p,
            BYTES,
            FOUR,
            {
                b"huggingface": json.dumps(
                    {
                        "info": {
                            "features": {
                                "image": {},
                                "label": {"_type": "ClassLabel", "names": "ab"},
                            }
                        }
                    }
                ).encode()
            },
        ),
        "are no list of texts",
    ),
}


@pytest.mark.parametrize("name", HF)
def test_tables_of_hugging_face(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, result = HF[name]
    root = make(tmp_path / "mine")
    if isinstance(result, str):
        refused(capsys, result, root)
    else:
        code, output = conversion(capsys, root, tmp_path / "out", "--hold-out", "0")
        assert code == 0, output
        assert understood(tmp_path / "out") == {"train": result}


def test_columns_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mine"
    root.mkdir()
    pq.write_table(pa.table({"photo": BYTES, "kind": FOUR, "other": FOUR}), root / "train.parquet")
    refused(capsys, "has the columns photo, kind, other", root)
    flags = ("--image-column", "photo", "--label-column", "kind", "--hold-out", "0")
    assert conversion(capsys, root, tmp_path / "out", *flags)[0] == 0
    assert understood(tmp_path / "out") == {"train": {"0": 2, "1": 2}}
    table = {f"pics/{n}.jpg": PHOTOS[n] for n in range(4)} | {
        "all.csv": b"which,what,x\n" + b"".join(b"%d.jpg,%d,1\n" % (n, n % 2) for n in range(4))
    }
    flags = ("--image-column", "which", "--label-column", "what", "--hold-out", "0")
    assert conversion(capsys, put(tmp_path / "csv", table), tmp_path / "two", *flags)[0] == 0
    assert understood(tmp_path / "two") == {"train": {"0": 2, "1": 2}}


# Which way is up.


def tiff(order: str, kind: int, value: int) -> bytes:
    """EXIF data with the one tag Orientation, of a TIFF type."""
    e = "<" if order == "II" else ">"
    cell = struct.pack(
        e + {1: "B3x", 2: "4s", 3: "H2x", 4: "I"}[kind], b"%d\0\0\0" % value if kind == 2 else value
    )
    return order.encode() + struct.pack(f"{e}HIHHHI", 42, 8, 1, 0x112, kind, 1) + cell + bytes(4)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize("kind", [1, 2, 3, 4])
@pytest.mark.parametrize("value", [0, 3, 6, 9])
def test_conversion_and_training_turn_alike(form: str, order: str, kind: int, value: int) -> None:
    image, exif = Image.open(io.BytesIO(PHOTOS[0])).resize((60, 40)), tiff(order, kind, value)
    out = io.BytesIO()
    image.save(
        out,
        form,
        exif=exif if form == "PNG" else b"Exif\0\0" + exif,
        **({"lossless": True} if form == "WEBP" else {}),
    )
    data = out.getvalue()
    turned = value == 6 and kind != 2
    size = (40, 60) if turned else (60, 40)
    for verify in ("header", "full"):
        found = check(data, ImagePolicy(verify=verify))
        assert (found.width, found.height) == size == tuple(probe(data))
    pixels = np.empty((size[1], size[0], 3), np.uint8)
    decode_crop(data, Box(0, 0, *size), pixels)
    upright = Image.open(io.BytesIO(data)).convert("RGB")
    right = np.asarray(
        upright.rotate({3: 180, 6: -90}.get(value, 0) if kind != 2 else 0, expand=True)
    )
    assert np.abs(pixels.astype(int) - right).mean() < 2
    small = check(data, ImagePolicy(resize_shorter=20))
    assert (small.width < small.height) == turned


def test_xmp_alone_turns_nothing() -> None:
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
        b"</rdf:RDF></x:xmpmeta>"
    )
    for form in ("JPEG", "PNG", "WEBP"):
        data = encoded(form, xmp=xmp)
        found = check(data, ImagePolicy(verify="full"))
        assert (
            (found.width, found.height)
            == tuple(probe(data))
            == Image.open(io.BytesIO(PHOTOS[0])).size
        )


def test_sixteen_bits_are_scaled() -> None:
    grey = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    out = io.BytesIO()
    Image.fromarray(grey).save(out, "PNG")
    small = Image.open(
        io.BytesIO(check(out.getvalue(), ImagePolicy(resize_shorter=32, quality=95)).data)
    )
    right = (grey >> 8).astype(int).reshape(32, 2, 32, 2).mean(axis=(1, 3))
    assert np.abs(np.asarray(small.convert("L")).astype(int) - right).mean() < 2


# Source and destination.


@pytest.mark.parametrize("form", ["same", "link", "inside", "around", "tars", "overwrite", "dots"])
def test_a_conversion_never_writes_into_its_source(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "data" / "mine", tree("train/", "val/"))
    source: Path | str = root
    target, flags = root, list[str]()
    if form == "link":
        (tmp_path / "link").symlink_to(root)
        target = tmp_path / "link"
    elif form == "inside":
        target = root / "shards" / "out"
    elif form == "around":
        target = tmp_path / "data"
    elif form == "dots":
        target = root / "train" / ".." / "x" / ".." / "val"
    elif form in ("tars", "overwrite"):
        made = tmp_path / "made"
        assert conversion(capsys, root, made)[0] == 0
        source, target = f"wds:{made}", made
        flags = ["--overwrite", "--seed", "4"] if form == "overwrite" else []
    before = hashes(tmp_path)
    code, output = conversion(capsys, source, target, *flags)
    assert code == 2 and "overlap" in output, output
    assert hashes(tmp_path) == before


def test_files_of_others_are_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "mine", tree("train/", "val/"))
    out = put(tmp_path / "out", {"train/shard-000000.tar": b"theirs", "notes.txt": b"theirs"})
    before = hashes(out)
    for flags in ((), ("--overwrite",)):
        code, output = conversion(capsys, root, out, *flags)
        assert (
            code == 2 and "holds train/shard-000000.tar, which no manifest of ours names" in output
        )
        assert hashes(out) == before


def test_an_overwritten_dataset_stays_whole_until_the_new_one_is(tmp_path: Path) -> None:
    root = put(tmp_path / "mine", tree("train/", "val/", images=20))
    out, draw = tmp_path / "out", random.Random(2)
    begin = [
        sys.executable,
        "-m",
        "shards.make_shards",
        str(root),
        str(out),
        "--shard-mb",
        "0.01",
        "--processes",
        "1",
    ]
    subprocess.run(begin, check=True, capture_output=True)
    (out / "mine.txt").write_text("mine")
    before, seeds = Dataset.open(str(out)).fingerprint, set[str]()
    for kill in range(8):
        process = subprocess.Popen(
            [*begin, "--overwrite", "--seed", "5"],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5 + draw.random() * 0.8 if kill < 7 else 120)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert wds_train(["verify", str(out)]) == 0  # the one or the other, and whole
        seeds.add(Dataset.open(str(out)).fingerprint)
    fresh = tmp_path / "fresh"
    subprocess.run(
        [*begin[:4], str(fresh), *begin[5:], "--seed", "5"], check=True, capture_output=True
    )
    after = Dataset.open(str(out))
    assert after.fingerprint == Dataset.open(str(fresh)).fingerprint and seeds <= {
        before,
        after.fingerprint,
    }
    assert {e.key for e in LocalStore(out).list()} == after.manifest.objects() | {
        "manifest.json",
        "mine.txt",
    }


def test_two_overwrites_at_once(tmp_path: Path) -> None:
    root = put(tmp_path / "mine", tree("train/", "val/", images=20))
    out = tmp_path / "out"
    begin = [
        sys.executable,
        "-m",
        "shards.make_shards",
        str(root),
        str(out),
        "--shard-mb",
        "0.01",
        "--processes",
        "1",
    ]
    subprocess.run(begin, check=True, capture_output=True)
    both = [
        subprocess.Popen(
            [*begin, "--overwrite", "--seed", seed],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for seed in ("5", "6")
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert 0 in [process.returncode for process in both]
    assert not any(b"Traceback" in error for error in errors), errors
    assert wds_train(["verify", str(out)]) == 0


# A person's folder, from end to end.


def test_an_ordinary_folder_is_sharded_trained_on_and_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "pets", tree("Train/", "Test/", images=20))
    code, output = conversion(capsys, root, tmp_path / "shards")
    assert code == 0 and "val is 10% of each class of train, held out" in output
    settings = [
        "model.name=test_resnet",
        "schedule.epochs=2",
        "schedule.warmup_epochs=1",
        "batch=8",
        "data.size=32",
    ]
    settings += ["data.eval_size=32"]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    run = str(tmp_path / "run")
    kept_apart = (tmp_path / "shards/test").rename(
        tmp_path / "elsewhere"
    )  # neither training nor validation reads it
    assert (
        wds_train(
            ["train", "--dataset", str(tmp_path / "shards"), "--run", run, *flags, "--workers", "0"]
        )
        == 0
    )
    kept_apart.rename(tmp_path / "shards/test")
    capsys.readouterr()
    code = wds_train(
        [
            "eval",
            run,
            "--dataset",
            str(tmp_path / "shards"),
            "--split",
            "test",
            "--json",
            "--workers",
            "0",
        ]
    )
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["samples"] == 40
    assert (
        wds_train(
            [
                "eval",
                run,
                "--dataset",
                str(tmp_path / "shards"),
                "--split",
                "test",
                "--workers",
                "0",
            ]
        )
        == 0
    )
    scored = capsys.readouterr().out
    assert "test: 40 samples" in scored and ", the best on val, at " in scored
    assert (
        wds_train(
            [
                "eval",
                run,
                "--dataset",
                str(tmp_path / "shards"),
                "--split",
                "tset",
                "--workers",
                "0",
            ]
        )
        == 1
    )
    assert "it has train, val, test" in capsys.readouterr().err
