"""Folders as people have them.

Each image's colour is its class, so that a wrong label is seen, whatever the layout.
"""

import functools
import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import layouts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from answers import conversion
from PIL import Image

from wds_train.dataset.index import image_of
from wds_train.dataset.reader import Dataset

Files = dict[str, bytes]
Counts = dict[str, dict[str, int]]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_HOME", str(tmp_path / "home"))


def colour_of(name: str) -> tuple[int, int, int]:
    digest = hashlib.sha256(name.encode()).digest()
    return digest[0], digest[1], digest[2]


@functools.cache
def painted(name: str, number: int) -> bytes:
    """A PNG in the colour of the class `name`; no two numbers give the same bytes."""
    pixels = np.empty((8, 8, 3), np.uint8)
    pixels[:] = colour_of(name)
    pixels[7, 7] = number % 256, number // 256, 7
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def put(root: Path, files: Files) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def folders(
    *places: str, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3, below: str = ""
) -> Files:
    """`each` images in PLACE/CLASS/BELOW, for every place and class."""
    return {
        f"{place}{name}/{below}{n}.png": painted(name, 1000 * where + n)
        for where, place in enumerate(places)
        for name in classes
        for n in range(each)
    }


def flat(place: str, labels: dict[str, str], start: int = 0) -> Files:
    """An image PLACE/NAME.png for each name of `labels`, in the colour of its label."""
    return {
        f"{place}{name}.png": painted(label, start + n)
        for n, (name, label) in enumerate(labels.items())
    }


def rows_of(header: str, labels: dict[str, str], pattern: str = "{name},{label}") -> bytes:
    lines = [header, *(pattern.format(name=name, label=label) for name, label in labels.items())]
    return "\n".join([*lines, ""]).encode()


def read(out: Path) -> Counts:
    """Per split, how often each class occurs; every image has the colour of its class."""
    opened = Dataset.open(str(out))
    counts: Counts = {}
    for split in opened.manifest.splits:
        reader = opened.split(split)
        found: Counter[str] = Counter()
        for n in range(len(reader)):
            name = reader.shard_names[reader.index.shard[n]]
            record = reader.store.read(
                name, int(reader.index.offset[n]), int(reader.index.length[n])
            )
            pixels = np.asarray(
                Image.open(io.BytesIO(image_of(reader.index, n, memoryview(record))))
            )
            label = opened.manifest.classes[reader.index.label[n]].id
            assert tuple(pixels[0, 0]) == colour_of(label), (
                f"{reader.index.key_of(n)} is not {label}"
            )
            found[label] += 1
        counts[split] = dict(sorted(found.items()))
    return counts


def hashes(root: Path) -> dict[str, str]:
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def of(*splits: str, each: int = 3) -> Counts:
    return {split: {"cat": each, "dog": each} for split in splits}


def named(count: int, *classes: str, start: int = 0) -> dict[str, str]:
    """image name -> class, `count` of each in turn."""
    return {f"img{start + n:03d}": classes[n % len(classes)] for n in range(count * len(classes))}


PETS = named(4, "cat", "dog")
FEW = named(3, "cat", "dog")
MORE = named(2, "cat", "dog", start=100)
SIX = of("train")
EIGHT = of("train", each=4)

# (files, flags, what it is read as, what is said)
Case = tuple[Files, tuple[str, ...], Counts, str]

TABLES: dict[str, Case] = {
    "HAM10000": (
        flat("HAM10000_images_part_1/", {k: v for k, v in PETS.items() if k < "img004"})
        | flat("HAM10000_images_part_2/", {k: v for k, v in PETS.items() if k >= "img004"}, 50)
        | {
            "HAM10000_metadata.csv": rows_of(
                "lesion_id,image_id,dx,dx_type,age,sex",
                PETS,
                "L{name},{name},{label},histo,50.0,male",
            ),
            "hmnist_8_8_L.csv": b"pixel0000,pixel0001,label\n" + b"12,13,1\n" * 8,
        },
        (),
        EIGHT,
        "hmnist_8_8_L.csv",
    ),
    "chest X-rays": (
        flat("images_001/images/", FEW)
        | flat("images_002/images/", MORE, 60)
        | {
            "Data_Entry_2017.csv": rows_of(
                "Image Index,Finding Labels,Follow-up #", FEW | MORE, "{name}.png,{label},0"
            ),
            "README.md": b"x",
        },
        (),
        {"train": {"cat": 5, "dog": 5}},
        "Data_Entry_2017.csv",
    ),
    "parts called batches": (
        flat("batch_1/", FEW)
        | flat("batch_2/", MORE, 60)
        | {"labels.csv": rows_of("file,label", FEW | MORE)},
        (),
        {"train": {"cat": 5, "dog": 5}},
        "labels.csv",
    ),
    "class folders that are months": (
        flat("january/", FEW)
        | flat("june/", MORE, 60)
        | {"labels.csv": rows_of("filename,species", FEW | MORE)},
        (),
        {"train": {"cat": 5, "dog": 5}},
        "are not the classes, the table is",
    ),
    "images in one folder, the table in another": (
        flat("images/", PETS) | {"data/labels.csv": rows_of("filename,label", PETS)},
        (),
        EIGHT,
        "data/labels.csv",
    ),
    "the table deep below": (
        flat("pics/all/", PETS)
        | {"meta/v2/annotations.tsv": rows_of("img\tclass", PETS, "{name}.png\t{label}")},
        (),
        EIGHT,
        "annotations.tsv",
    ),
    "metadata.csv in the folders of the splits": (
        flat("train/", FEW)
        | flat("validation/", FEW, 50)
        | {
            "train/metadata.csv": rows_of("file_name,label", FEW, "{name}.png,{label}"),
            "validation/metadata.csv": rows_of("file_name,label", FEW, "{name}.png,{label}"),
        },
        (),
        of("train", "val"),
        "metadata.csv",
    ),
    "metadata.jsonl in the folders of the splits": (
        flat("train/", FEW)
        | flat("test/", FEW, 50)
        | {
            f"{split}/metadata.jsonl": "".join(
                json.dumps({"file_name": f"{name}.png", "label": label}) + "\n"
                for name, label in FEW.items()
            ).encode()
            for split in ("train", "test")
        },
        (),
        of("train", "test"),
        "metadata.jsonl",
    ),
    "metadata.csv that captions class folders": (
        folders("train/")
        | {
            "train/metadata.csv": b"file_name,text\n"
            + b"".join(b"cat/%d.png,a photo of %d\n" % (n, n) for n in range(3))
        },
        (),
        SIX,
        "class folders",
    ),
    "Tiny ImageNet": (
        folders("train/", below="images/")
        | flat("val/images/", MORE, 70)
        | flat("test/images/", {"t1": "cat", "t2": "dog"}, 90)
        | {
            "val/val_annotations.txt": "".join(
                f"{n}.png\t{c}\t0\t0\t8\t8\n" for n, c in MORE.items()
            ).encode(),
            "wnids.txt": b"cat\ndog\n",
            "words.txt": b"cat\ta cat\ndog\ta dog\n",
        },
        (),
        SIX | of("val", each=2),
        "val is labelled by the column '2' of val_annotations.txt",
    ),
    "Caffe's lists": (
        flat("images/", FEW)
        | flat("images/", MORE, 50)
        | {
            "train.txt": "".join(
                f"images/{n}.png {['cat', 'dog'].index(c)}\n" for n, c in FEW.items()
            ).encode(),
            "val.txt": "".join(
                f"images/{n}.png {['cat', 'dog'].index(c)}\n" for n, c in MORE.items()
            ).encode(),
            "labels.txt": b"cat\ndog\n",
        },
        ("--classes", "labels.txt"),
        SIX | of("val", each=2),
        "train.txt",
    ),
    "a table by paths of another machine": (
        folders("pics/", below="x/")
        | {
            "all.csv": rows_of(
                "path,label",
                {
                    f"C:\\\\data\\\\pics\\\\{c}\\\\x\\\\{n}.png": c
                    for c in ("cat", "dog")
                    for n in range(3)
                },
            )
        },
        (),
        SIX,
        "",
    ),
    "a table named": (
        flat("", PETS)
        | {
            "right.csv": rows_of("file,label", PETS),
            "wrong.csv": rows_of(
                "file,label", {name: "cow" if n % 3 else "pig" for n, name in enumerate(PETS)}
            ),
        },
        ("--table", "right.csv"),
        EIGHT,
        "right.csv",
    ),
    "a table that says what the folders say": (
        folders("")
        | {
            "labels.csv": rows_of(
                "file,label", {f"{c}/{n}.png": c for c in ("cat", "dog") for n in range(3)}
            )
        },
        (),
        SIX,
        "labels the images as their folders do",
    ),
    "pictograms beside signs": (
        folders("Train/", classes=("0", "1", "2"))
        | flat("Test/", {f"{n:05d}": str(n % 3) for n in range(3)}, 200)
        | flat("Meta/", {"0": "0", "1": "1", "2": "2"}, 300)
        | {
            "Train.csv": b"Width,Height,ClassId,Path\n"
            + b"".join(b"8,8,%d,Train/%d/%d.png\n" % (c, c, n) for c in range(3) for n in range(3)),
            "Test.csv": b"Width,Height,ClassId,Path\n"
            + b"".join(b"8,8,%d,Test/%05d.png\n" % (n % 3, n) for n in range(3)),
            "Meta.csv": b"Path,ClassId,ShapeId\n"
            + b"".join(b"Meta/%d.png,%d,1\n" % (n, n) for n in range(3)),
        },
        (),
        {"train": dict.fromkeys("012", 3), "test": dict.fromkeys("012", 1)},
        "Meta.csv",
    ),
    "one-hot columns": (
        flat("ISIC_images/", PETS)
        | {
            "truth.csv": b"image,cat,dog\n"
            + "".join(
                f"{n},{float(c == 'cat')},{float(c == 'dog')}\n" for n, c in PETS.items()
            ).encode()
        },
        (),
        EIGHT,
        "2 columns of 0 and 1",
    ),
    "a Parquet of paths": (flat("img/", PETS), ("parquet",), EIGHT, "labels.parquet"),
    "lists of one column say the splits": (
        folders("images/")
        | {
            "meta/train.txt": b"cat/0\ncat/1\ndog/0\ndog/1\n",
            "meta/test.txt": b"cat/2\ndog/2\n",
        },
        (),
        of("train", each=2) | of("test", each=1),
        "splits by",
    ),
    "CelebA's list of splits": (
        flat("img_align/img_align/", PETS)
        | {
            "labels.csv": rows_of("image_id,species,height", PETS, "{name}.png,{label},3"),
            "list_eval_partition.csv": b"image_id,partition\n"
            + b"".join(
                b"img%03d.png,%s\n" % (n, (b"train", b"train", b"val", b"test")[n // 2])
                for n in range(8)
            ),
        },
        (),
        {"train": {"cat": 2, "dog": 2}, "val": {"cat": 1, "dog": 1}, "test": {"cat": 1, "dog": 1}},
        "splits by list_eval_partition.csv",
    ),
    "class folders and a list of splits": (
        folders("images/")
        | {
            "split.csv": b"path,split\n"
            + b"".join(
                b"%s/%d.png,%s\n" % (c, n, b"test" if n == 2 else b"train")
                for c in (b"cat", b"dog")
                for n in range(3)
            )
        },
        (),
        of("train", each=2) | of("test", each=1),
        "splits by split.csv",
    ),
    "Roboflow's _classes.csv in each split": (
        flat("train/", FEW)
        | flat("valid/", MORE, 50)
        | {
            f"{split}/_classes.csv": b"filename, cat, dog\n"
            + "".join(
                f"{n}.png, {int(c == 'cat')}, {int(c == 'dog')}\n" for n, c in labels.items()
            ).encode()
            for split, labels in (("train", FEW), ("valid", MORE))
        },
        (),
        SIX | of("val", each=2),
        "2 columns of 0 and 1",
    ),
    "numbers and their names": (
        flat("pics/", {n: ["cat", "dog"].index(c).__str__() for n, c in PETS.items()})
        | {
            "t.csv": rows_of("filename,Label,ClassName", PETS, "{name},{label},{label}")
            .replace(b",cat,", b",0,")
            .replace(b",dog,", b",1,")
        },
        (),
        {"train": {"0": 4, "1": 4}},
        "2 classes (cat, dog)",
    ),
    "a table with a line for images and no header": (
        flat("pics/", FEW)
        | {"labels.csv": "".join(f"pics/{n}.png,{c}\n" for n, c in FEW.items()).encode()},
        (),
        SIX,
        "labels.csv",
    ),
    "JSON of file and label": (
        flat("pics/", PETS)
        | {"labels.json": json.dumps({f"{n}.png": c for n, c in PETS.items()}).encode()},
        (),
        EIGHT,
        "labels.json",
    ),
}


def convert(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, Path]:
    files, flags, _, _ = case
    root = put(tmp_path / "mine", files)
    if flags == ("parquet",):
        table = pa.table({"path": [f"{name}.png" for name in PETS], "label": [*PETS.values()]})
        pq.write_table(table, root / "labels.parquet")
        flags = ()
    paths = [str(root / flag) if flag in files else flag for flag in flags]
    before = hashes(root)
    held = [] if "--hold-out" in flags or "--group" in flags else ["--hold-out", "0"]
    code, output = conversion(capsys, root, tmp_path / "out", *paths, *held)
    if code == 2 and "nothing can be held out" in output:
        code, output = conversion(capsys, root, tmp_path / "out", *paths)
    assert hashes(root) == before
    assert "Traceback" not in output
    return code, output, tmp_path / "out"


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, out = convert(TABLES[name], tmp_path, capsys)
    assert code == 0, output
    assert read(out) == TABLES[name][2], output
    assert TABLES[name][3] in output


MADE_UP = b"id,label\n" + b"".join(b"t%d,4\n" % n for n in range(6))
NO_LABELS: dict[str, Case] = {
    "sample_submission": (
        flat("train/", FEW)
        | flat("test/", dict.fromkeys([f"t{n}" for n in range(6)], "x"), 50)
        | {"train.csv": rows_of("id,label", FEW), "sample_submission.csv": MADE_UP},
        (),
        SIX,
        "sample_submission.csv",
    ),
    "a submission by another name": (
        flat("train/", FEW)
        | flat("test/", dict.fromkeys([f"t{n}" for n in range(6)], "x"), 50)
        | {"train.csv": rows_of("id,label", FEW), "mySubmission_format.csv": MADE_UP},
        (),
        SIX,
        "mySubmission_format.csv",
    ),
    "placeholders of test images": (
        flat("train/", FEW)
        | flat("test/", dict.fromkeys([f"t{n}" for n in range(6)], "x"), 50)
        | {"train.csv": rows_of("id,label", FEW), "answers.csv": MADE_UP},
        (),
        SIX,
        "placeholders",
    ),
    "rows of test images in one table": (
        flat("train/", FEW)
        | flat("test/", MORE, 50)
        | {"labels.csv": rows_of("file,label", FEW | MORE)},
        (),
        SIX | of("test", each=2),
        "",
    ),
    "-1 beside numbers": (
        flat("", {"a": "0", "b": "1", "c": "0", "d": "1", "e": "-1"})
        | {"t.csv": b"file,label\na,0\nb,1\nc,0\nd,1\ne,-1\n"},
        (),
        {"train": {"0": 2, "1": 2}},
        "1 without a label ('-1') are left out",
    ),
    "empty beside numbers": (
        flat("", {"a": "0", "b": "1", "c": "0", "d": "1", "e": ""})
        | {"t.csv": b"file,label\na,0\nb,1\nc,0\nd,1\ne,\n"},
        (),
        {"train": {"0": 2, "1": 2}},
        "1 without a label (empty) are left out",
    ),
    "NaN and 3.0 beside numbers": (
        flat("", {"a": "0", "b": "1", "c": "0", "d": "1", "e": "nan", "f": "2"})
        | {"t.csv": b"file,label\na,0.0\nb,1.0\nc,0\nd,1.0\ne,nan\nf,2.0\n"},
        (),
        {"train": {"0": 2, "1": 2, "2": 1}},
        "1 without a label ('nan')",
    ),
    "NULL and ? beside numbers": (
        flat("", {"a": "0", "b": "1", "c": "0", "d": "1", "e": "", "f": ""})
        | {"t.csv": b"file,label\na,0\nb,1\nc,0\nd,1\ne,NULL\nf,?\n"},
        (),
        {"train": {"0": 2, "1": 2}},
        "2 without a label ('?', 'NULL')",
    ),
    "nan beside names": (
        flat("", {"a": "cat", "b": "dog", "c": "cat", "d": "dog", "e": ""})
        | {"t.csv": b"file,label\na,cat\nb,dog\nc,cat\nd,dog\ne,NaN\n"},
        (),
        of("train", each=2),
        "1 without a label ('NaN')",
    ),
    "-100, said": (
        flat("", {"a": "0", "b": "1", "c": "0", "d": "1", "e": ""})
        | {"t.csv": b"file,label\na,0\nb,1\nc,0\nd,1\ne,-100\n"},
        ("--no-label=-100",),
        {"train": {"0": 2, "1": 2}},
        "1 without a label ('-100')",
    ),
    "numbers in the order of numbers": (
        flat("", {f"i{n}": str(n) for n in range(12)})
        | {"t.csv": rows_of("file,label", {f"i{n}": str(n) for n in range(12)})},
        (),
        {"train": {str(n): 1 for n in range(12)}},
        "12 classes (0, 1, 2, 3,",
    ),
    "folders of numbers in the order of numbers": (
        folders("", classes=tuple(map(str, range(12)))),
        (),
        {"train": {str(n): 3 for n in range(12)}},
        "12 classes (0, 1, 2, 3,",
    ),
    "from 1 to 10": (
        flat("", {f"i{n}": str(n) for n in range(1, 11)})
        | {"t.csv": rows_of("file,label", {f"i{n}": str(n) for n in range(1, 11)})},
        (),
        {"train": {str(n): 1 for n in range(1, 11)}},
        "10 classes (1, 2, 3,",
    ),
    "12, 47, 60000": (
        flat("", {f"i{n}": ("12", "47", "60000")[n % 3] for n in range(6)})
        | {
            "t.csv": rows_of(
                "file,label", {f"i{n}": ("12", "47", "60000")[n % 3] for n in range(6)}
            )
        },
        (),
        {"train": {"12": 2, "47": 2, "60000": 2}},
        "not all of 0...2: class 0 is 12, class 2 is 60000",
    ),
}


@pytest.mark.parametrize("name", NO_LABELS)
def test_what_is_no_label(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, out = convert(NO_LABELS[name], tmp_path, capsys)
    assert code == 0, output
    assert read(out) == NO_LABELS[name][2], output
    assert NO_LABELS[name][3] in output


def split_table(column: str, *cells: str, header: str = "file,label") -> Files:
    """Six images, in turn of the splits `cells`."""
    lines = [f"{header},{column}"] + [
        f"{name},{label},{cells[n % len(cells)]}" for n, (name, label) in enumerate(FEW.items())
    ]
    return flat("pics/", FEW) | {"t.csv": "\n".join(lines).encode()}


TWO_TWO_TWO = {
    "train": {"cat": 1, "dog": 1},
    "val": {"cat": 1, "dog": 1},
    "test": {"cat": 1, "dog": 1},
}
IN_TURN = ("a", "a", "b", "b", "c", "c")


def turn(*words: str) -> tuple[str, ...]:
    return tuple(word for word in words for _ in range(2))


SPLITS: dict[str, Case] = {
    "partition": (split_table("partition", *turn("train", "val", "test")), (), TWO_TWO_TWO, ""),
    "Usage, as FER2013": (
        split_table("Usage", *turn("Training", "PublicTest", "PrivateTest")),
        (),
        TWO_TWO_TWO,
        "",
    ),
    "a column by its cells": (
        split_table("where", *turn("train", "dev", "test")),
        (),
        TWO_TWO_TWO,
        "splits by the column 'where'",
    ),
    "is_train": (
        split_table("is_train", *turn("1", "1", "0")),
        (),
        {"train": {"cat": 2, "dog": 2}, "test": {"cat": 1, "dog": 1}},
        "",
    ),
    "is_valid, as fastai": (
        split_table("is_valid", *turn("False", "False", "True")),
        (),
        {"train": {"cat": 2, "dog": 2}, "val": {"cat": 1, "dog": 1}},
        "",
    ),
    "numbers, said": (
        split_table("split", *turn("0", "1", "2")),
        ("--split", "0=train", "--split", "1=val", "--split", "2=test"),
        TWO_TWO_TWO,
        "",
    ),
    "unlabeled rows": (
        split_table("split", *turn("train", "val", "unlabeled")),
        (),
        {k: TWO_TWO_TWO[k] for k in ("train", "val")},
        "",
    ),
    "folds are no splits": (
        split_table("fold", "0", "1", "2"),
        (),
        SIX,
        "the column 'fold' of t.csv (0, 1, 2) is not read as splits",
    ),
    "folders train, eval": (folders("train/", "eval/"), (), of("train", "val"), ""),
    "folders train, holdout": (folders("train/", "holdout/"), (), of("train", "val"), ""),
    "folders train, extra, said": (
        folders("train/", "extra/"),
        ("--split", "extra=test"),
        of("train", "test"),
        "",
    ),
    "folders train, extra, left out": (
        folders("train/", "extra/"),
        ("--split", "extra=none"),
        SIX,
        "left out of every split",
    ),
    "STL's unlabeled": (
        folders("train/") | flat("unlabeled/", {f"u{n}": "x" for n in range(20)}, 500),
        (),
        SIX,
        "20 images that are left out of every split",
    ),
    "a class folder called unlabeled": (
        folders("train/") | flat("train/unlabeled/", {f"u{n}": "x" for n in range(5)}, 500),
        (),
        SIX,
        "5 images that are left out of every split",
    ),
    "unlabeled with folders": (
        folders("train/") | folders("unlabelled/", each=9),
        (),
        SIX,
        "left out of every split",
    ),
    "each class split": (
        folders("", classes=("cat", "dog"), below="train/")
        | folders("", classes=("cat", "dog"), each=2, below="test/"),
        (),
        SIX | of("test", each=2),
        "class folders with test, train in each",
    ),
    "each class split, wrapped": (
        folders("data/", below="Training/") | folders("data/", each=2, below="Validation/"),
        (),
        SIX | of("val", each=2),
        "",
    ),
    "each class split, with images without labels": (
        folders("", below="train/") | folders("", each=5, below="unlabeled/"),
        (),
        SIX,
        "left out of every split",
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_splits(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, out = convert(SPLITS[name], tmp_path, capsys)
    assert code == 0, output
    assert read(out) == SPLITS[name][2], output
    assert SPLITS[name][3] in output


FOLDERS: dict[str, Case] = {
    "a repository": (
        folders("Dataset/", classes=tuple("0123456789"))
        | flat("Examples/", {"e1": "x", "e2": "y"})
        | {"README.md": b"#"},
        (),
        {"train": {str(n): 3 for n in range(10)}},
        "2 images beside the data set Dataset",
    ),
    "a repository with docs": (
        folders("images/") | flat("docs/", {"logo": "x"}) | {"train.py": b"", "src/model.py": b""},
        (),
        SIX,
        "below images/",
    ),
    "a repository whose data has any name": (
        folders("flowers/") | flat("screenshots/", {"s": "x"}) | {"requirements.txt": b""},
        (),
        SIX,
        "below flowers/",
    ),
    "a repository with a picture at its top": (
        folders("flowers/") | {"banner.png": painted("x", 900), "README.md": b"![](banner.png)"},
        (),
        SIX,
        "1 images beside the data set flowers",
    ),
    "scripts beside the data": (
        folders("dataset/", classes=("with_mask", "without_mask"))
        | {"face_detector/deploy.prototxt": b"x", "train.py": b""},
        (),
        {"train": {"with_mask": 3, "without_mask": 3}},
        "below dataset/",
    ),
    "folders without images beside classes": (
        folders("") | {"weights/best.pt": b"x", "logs/run/events.out": b"x"},
        (),
        SIX,
        "a folder without images",
    ),
    "one domain of several": (
        folders("amazon/images/"),
        (),
        SIX,
        "below amazon/images/",
    ),
    "domains together, said": (
        folders("amazon/images/", "dslr/images/"),
        ("--class-level", "3"),
        of("train", each=6),
        "class folders 3 levels below",
    ),
    "sessions in classes, said": (
        folders("", below="2020/") | folders("", each=2, below="2021/"),
        ("--class-level", "1"),
        {"train": {"cat": 5, "dog": 5}},
        "",
    ),
    "one class sorted further, said": (
        folders("", classes=("cat", "dog", "cow"))
        | {f"pig/{d}/{n}.png": painted("pig", n + 10 * d) for d in range(2) for n in range(2)},
        ("--class-level", "1"),
        {"train": {"cat": 3, "cow": 3, "dog": 3, "pig": 4}},
        "class folders 1 level below",
    ),
    "images of a class in a folder of their own": (folders("", below="images/"), (), SIX, ""),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, out = convert(FOLDERS[name], tmp_path, capsys)
    assert code == 0, output
    assert read(out) == FOLDERS[name][2], output
    assert FOLDERS[name][3] in output


LITTER = (
    "Icon\r",
    "Thumbs.db:encryptable",
    "0.png:Zone.Identifier",
    "movie.crdownload",
    "0.png.part",
    "0.png~",
    "~$notes.docx",
    "x.tmp",
    "report.gdoc",
    "0.png.aria2",
    "#autosave#",
    "link.lnk",
)
LITTER_FOLDERS = (
    "#recycle",
    "@Recycle",
    "#snapshot",
    "@tmp",
    "System Volume Information",
    "$RECYCLE.BIN",
    "__pycache__",
    "@eaDir",
)


@pytest.mark.parametrize("place", ["cat/", ""])
@pytest.mark.parametrize("name", LITTER)
def test_litter(place: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = folders("") | {f"{place}{name}": b"x"}
    code, output, out = convert((files, (), {}, ""), tmp_path, capsys)
    assert code == 0, output
    assert read(out) == SIX
    kept = json.loads((out / "report.json").read_text())["samples"]
    assert [row["what"] for row in kept] == ["ignored"]


@pytest.mark.parametrize("place", ["", "train/", "train/cat/"])
@pytest.mark.parametrize("name", LITTER_FOLDERS)
def test_folders_of_litter(
    place: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = folders("train/", "val/") | {
        f"{place}{name}/old{n}.png": painted("litter", n) for n in range(4)
    }
    code, output, out = convert((files, (), {}, ""), tmp_path, capsys)
    assert code == 0, output
    assert read(out) == of("train", "val")


ROWS: dict[str, Case] = {
    "a row twice": (
        flat("", FEW) | {"t.csv": rows_of("file,label", FEW) + b"img000,cat\n"},
        (),
        SIX,
        "the same row once more",
    ),
    "all rows twice": (
        flat("", FEW)
        | {"t.csv": rows_of("file,label", FEW) + rows_of("file,label", FEW).partition(b"\n")[2]},
        (),
        SIX,
        "6 x the same row once more",
    ),
    "a file by two names": (
        flat("pics/", FEW) | {"t.csv": rows_of("file,label", FEW) + b"pics/img000.png,cat\n"},
        (),
        SIX,
        "the same row once more",
    ),
    "case, folded": (
        flat("", {"a": "dog", "b": "dog", "c": "cat", "d": "cat", "e": "dog"})
        | {"t.csv": b"file,label\na,dog\nb,Dog\nc,cat\nd,cat\ne,dog\n"},
        ("--label-case", "fold"),
        {"train": {"cat": 2, "dog": 3}},
        "",
    ),
    "case, kept": (
        flat("", {"a": "a", "b": "A", "c": "a", "d": "A"})
        | {"t.csv": b"file,label\na,a\nb,A\nc,a\nd,A\n"},
        ("--label-case", "keep"),
        {"train": {"A": 2, "a": 2}},
        "",
    ),
    "a list of classes": (
        flat("", {"a": "cat", "b": "dog", "c": "cat", "d": "dog"})
        | {"t.csv": b"file,label\na,1\nb,0\nc,1\nd,0\n", "names.txt": b"dog\ncat\ncow\n"},
        ("--classes", "names.txt"),
        of("train", each=2),
        "3 classes (dog, cat, cow)",
    ),
    "a list of classes that counts from 1": (
        flat("", {"a": "cat", "b": "dog", "c": "cat", "d": "dog"})
        | {"t.csv": b"file,label\na,1\nb,2\nc,1\nd,2\n", "names.json": b'["cat", "dog"]'},
        ("--classes", "names.json"),
        of("train", each=2),
        "label 1 is cat",
    ),
    "a list of classes for folders": (
        folders("") | {"names.txt": b"dog\ncat\n"},
        ("--classes", "names.txt"),
        SIX,
        "2 classes (dog, cat)",
    ),
    "combinations that are classes": (
        flat("", {"a": "cat|dog", "b": "dog", "c": "cat|dog", "d": "dog"})
        | {
            "t.csv": b"file,label\na,cat|dog\nb,dog\nc,cat|dog\nd,dog\n",
            "names.txt": b"cat|dog\ndog\n",
        },
        ("--classes", "names.txt"),
        {"train": {"cat|dog": 2, "dog": 2}},
        "",
    ),
    "NFC and NFD": (
        flat("", {"cafe\u0301": "cat", "u\u0308ber": "dog", "plain": "cat"})
        | {"t.csv": "file,label\ncaf\u00e9,cat\n\u00fcber,dog\nplain,cat\n".encode()},
        (),
        {"train": {"cat": 2, "dog": 1}},
        "",
    ),
    "NFC and NFD in folders": (
        {f"train/{'cafe' + chr(0x301)}/{n}.png": painted("caf\u00e9", n) for n in range(3)}
        | {f"train/tea/{n}.png": painted("tea", n) for n in range(3)}
        | {f"val/{'caf' + chr(0xE9)}/{n}.png": painted("caf\u00e9", 50 + n) for n in range(3)}
        | {f"val/tea/{n}.png": painted("tea", 50 + n) for n in range(3)},
        (),
        {split: {"caf\u00e9": 3, "tea": 3} for split in ("train", "val")},
        "",
    ),
    "NFC and NFD in labels": (
        flat("", {"a": "caf\u00e9", "b": "tea", "c": "caf\u00e9", "d": "tea"})
        | {"t.csv": "file,label\na,caf\u00e9\nb,tea\nc,cafe\u0301\nd,tea\n".encode()},
        (),
        {"train": {"caf\u00e9": 2, "tea": 2}},
        "",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, out = convert(ROWS[name], tmp_path, capsys)
    assert code == 0, output
    assert read(out) == ROWS[name][2], output
    assert ROWS[name][3] in output


def table_of(**labels: str) -> Files:
    return flat("", labels) | {"t.csv": rows_of("file,label", labels)}


REFUSED: dict[str, tuple[Files, tuple[str, ...], str]] = {
    "labels with a bar": (
        table_of(a="cat|dog", b="cat", c="dog", d="dog"),
        (),
        "several labels in one cell, 'cat|dog'",
    ),
    "labels as a JSON list": (
        flat("", FEW) | {"t.csv": b'file,label\nimg000,"[""cat"", ""dog""]"\nimg001,cat\n'},
        (),
        "several labels in one cell",
    ),
    "labels with a comma": (
        flat("", FEW) | {"t.tsv": b"file\tlabel\nimg000\tcat, dog\nimg001\tcat\nimg002\tdog\n"},
        (),
        "several labels in one cell, 'cat, dog'",
    ),
    "labels of words": (
        table_of(
            **{
                f"i{n}": " ".join(
                    w for bit, w in enumerate(("clear", "water", "road", "farm")) if n >> bit & 1
                )
                for n in range(1, 16)
            }
        ),
        (),
        "several labels in one cell",
    ),
    "several columns that are 1": (
        flat("", FEW)
        | {"t.csv": b"image,cat,dog\n" + b"".join(b"img%03d,1,1\n" % n for n in range(6))},
        (),
        "2 labels; one label for each image",
    ),
    "one image, two labels": (
        flat("", FEW) | {"t.csv": rows_of("file,label", FEW) + b"img000,dog\n"},
        (),
        "it is labelled 'cat' in line 2 and 'dog' in line 8",
    ),
    "one image in train and val": (
        flat("pics/", FEW)
        | {
            "train.csv": rows_of("file,label", FEW),
            "val.csv": b"file,label\nimg000,cat\nimg001,dog\n",
        },
        (),
        "one image is named twice",
    ),
    "a workbook beside images": (
        flat("", FEW) | {"labels.xlsx": b"PK"},
        (),
        "if labels.xlsx holds the labels, save it as CSV",
    ),
    "a list of columns without names": (
        flat("images/", FEW)
        | {"list.txt": "".join(f"{n} {c == 'cat':d} 1 1\n" for n, c in FEW.items()).encode()},
        (),
        "list.txt has the columns 1, 2, 3, 4; say which one it is: --label-column NAME",
    ),
    "two lists that differ": (
        folders("images/")
        | {"train.txt": b"cat/0\ncat/1\ndog/0\ndog/1\n", "test.txt": b"cat/1\ncat/2\ndog/2\n"},
        (),
        "name the lists to use by one of them: --table",
    ),
    "two tables that differ": (
        flat("", FEW)
        | {
            "a.csv": rows_of("file,label", FEW),
            "b.csv": rows_of("file,label", dict(zip(FEW, reversed([*FEW.values()]), strict=True))),
        },
        (),
        "label the same images, and differ; say which one is right: --table",
    ),
    "labels in two cases": (
        table_of(a="dog", b="Dog", c="cat", d="cat"),
        (),
        "'Dog' and 'dog', which differ in case or blanks only; --label-case fold",
    ),
    "labels in capitals": (
        table_of(a="HAPPINESS", b="happiness", c="anger", d="anger"),
        (),
        "--label-case fold",
    ),
    "labels with two blanks": (
        table_of(a="big  dog", b="big dog", c="cat", d="cat"),
        (),
        "--label-case fold",
    ),
    "folders in two cases": (folders("", classes=("dog", "Dog")), (), "--label-case fold"),
    "NA beside names": (table_of(a="cat", b="dog", c="cat", d="NA"), (), "--no-label NA"),
    "None beside names": (table_of(a="cat", b="dog", c="cat", d="None"), (), "--no-label None"),
    "null beside names": (table_of(a="cat", b="dog", c="cat", d="null"), (), "--no-label null"),
    "-100 beside numbers": (table_of(a="0", b="1", c="0", d="-100"), (), "--no-label=-100"),
    "-1 and 1": (table_of(a="-1", b="1", c="1", d="-1"), (), "does -1 say that there is no label?"),
    "measurements": (
        table_of(a="0.5", b="1.25", c="0.5", d="1.25"),
        (),
        "a measurement is no class",
    ),
    "two columns of labels": (
        flat("", FEW)
        | {
            "t.csv": b"file,label,category\n"
            + "".join(f"{n},{c},{n[-1]}\n" for n, c in FEW.items()).encode()
        },
        (),
        "--label-column label, or --label-column category",
    ),
    "a split by an unknown word": (
        split_table("split", "train", "query"),
        (),
        "the split 'query', and it is not known what that is for",
    ),
    "a split by numbers": (split_table("split", "0", "1"), (), "--split 0=train"),
    "a partition by letters": (split_table("partition", "A", "B"), (), "--split A=train"),
    "an unknown split in a folder": (
        folders("train/", "gallery/"),
        (),
        "the split 'gallery', and it is not known",
    ),
    "is_valid of sound images": (
        split_table("is_valid", "1", "1", "0"),
        (),
        "or that an image is sound?",
    ),
    "two columns of splits": (
        flat("", FEW)
        | {
            "t.csv": b"file,label,split,phase\n"
            + "".join(
                f"{n},{c},train,{'train' if k else 'test'}\n"
                for k, (n, c) in enumerate(FEW.items())
            ).encode()
        },
        (),
        "--split-column",
    ),
    "domains of the same classes": (
        folders("amazon/images/", "dslr/images/", "webcam/images/"),
        (),
        "amazon/images, or --class-level 3",
    ),
    "colours of the same classes": (
        folders(
            "raw/color/",
            "raw/grayscale/",
            "raw/segmented/",
            classes=("Apple___scab", "Corn___rust"),
        ),
        (),
        "give the path of one, such as",
    ),
    "classes of classes": (
        folders("animals/") | folders("vehicles/", classes=("bus", "car")),
        (),
        "can be read in 2 ways",
    ),
    "sessions in classes": (
        folders("", below="2020/") | folders("", below="2021/"),
        (),
        "--class-level 1",
    ),
    "data beside images of another name": (
        folders("Dataset/") | flat("misc/", {"e": "x"}),
        (),
        "give its path",
    ),
    "a class split, another not": (
        folders("", classes=("cat",), below="train/")
        | folders("", classes=("cat",), below="test/")
        | folders("", classes=("dog",)),
        (),
        "holds folders of splits",
    ),
    "an archive beside its images": (
        folders("") | {"all.tar": b"\0" * 1024},
        (),
        "--source wds, or --source folder",
    ),
    "ilsvrc, and it is not": (folders(""), ("--source", "ilsvrc"), "which --source ilsvrc needs"),
    "kaggle, and it is not": (folders(""), ("--source", "kaggle"), "which --source kaggle needs"),
    "a table, and there is none": (
        folders(""),
        ("--source", "table"),
        "holds no table that labels its images",
    ),
    "tars, and there are none": (folders(""), ("--source", "wds"), "holds no .tar files"),
    "Hugging Face, and it is not": (
        folders(""),
        ("--source", "huggingface"),
        "holds neither .arrow nor .parquet",
    ),
    "a table that is not there": (
        folders(""),
        ("--table", "/nowhere/t.csv"),
        "--table /nowhere/t.csv is not there",
    ),
    "a label that the list lacks": (
        folders("") | {"names.txt": b"cat\ncow\n"},
        ("--classes", "names.txt"),
        "the label 'dog', which the list of 2 classes does not name",
    ),
    "a list that may count from 0 or 1": (
        table_of(a="1", b="2", c="1", d="2") | {"names.txt": b"x\ny\nz\n"},
        ("--classes", "names.txt"),
        "the labels 1 to 2 and no 0",
    ),
    "an empty list of classes": (
        folders("") | {"names.txt": b"\n"},
        ("--classes", "names.txt"),
        "is empty",
    ),
    "a pattern that does not match": (folders(""), ("--group", "patient_(\\d+)"), "does not match"),
    "a pattern that is none": (
        folders(""),
        ("--group", "("),
        "neither a column's name nor a pattern",
    ),
    "one group": (folders(""), ("--group", "(png)$"), "puts all samples into one group"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, flags, sentence = REFUSED[name]
    code, output, out = convert((files, flags, {}, ""), tmp_path, capsys)
    assert code in (1, 2), output
    assert sentence in output, output
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize("form", ["pattern", "column", "folder"])
def test_whole_groups_are_held_out(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = {f"patient_{p:02d}_{n}": ("cat", "dog")[n % 2] for p in range(10) for n in range(4)}
    files, flag = flat("", labels), "patient_(\\d+)"
    header, pattern = "file,label", "{name},{label}"
    if form == "column":
        header, pattern, flag = "file,label,patient", "{name},{label},{name}", "patient"
    files["t.csv"] = rows_of(header, labels, pattern)
    if form == "column":
        files["t.csv"] = "\n".join(
            line if line.startswith("file") else line.rpartition("_")[0]
            for line in files["t.csv"].decode().splitlines()
        ).encode()
    if form == "folder":
        files = {
            f"{label}/{name[:10]}/{name}.png": painted(label, n)
            for n, (name, label) in enumerate(labels.items())
        }
        flag = "patient_(\\d+)/"
    flags = (
        "--group",
        flag,
        "--hold-out",
        "0.2",
        *(("--class-level", "1") if form == "folder" else ()),
    )
    code, output, out = convert((files, flags, {}, ""), tmp_path, capsys)
    assert code == 0, output
    assert read(out) == {"train": {"cat": 16, "dog": 16}, "val": {"cat": 4, "dog": 4}}
    opened = Dataset.open(str(out))
    groups = {
        split: {key.split("patient_")[1][:2] for key in opened.split(split).index.key.to_pylist()}
        for split in ("train", "val")
    }
    assert not groups["train"] & groups["val"] and len(groups["val"]) == 2
    assert opened.manifest.conversion["group"] == flag


def test_what_was_understood_is_said_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = flat("pics/", FEW) | {
        "t.csv": rows_of("file,label", FEW),
        "other.csv": b"x,y,z\n1,2,3\n",
        "Thumbs.db": b"x",
    }
    root = put(tmp_path / "mine", files)
    code, dry = conversion(capsys, root, tmp_path / "out", "--dry-run")
    assert code == 0, dry
    code, output = conversion(capsys, root, tmp_path / "out")
    assert code == 0, output
    block = [line for line in output.splitlines() if line.startswith("  ")]
    assert [line for line in dry.splitlines() if line.startswith("  ")] == block
    assert [line.split()[0] for line in block] == [
        "layout",
        "labels",
        "counts",
        "counts",
        "ignored",
        "ignored",
    ][: len(block)]
    kept = json.loads((tmp_path / "out" / "report.json").read_text())["understood"]
    assert kept["labels"] == "the column 'label' of t.csv"
    assert kept["splits"] == {"train": 4, "val": 2}
    assert kept["classes"] == {"train": {"cat": 2, "dog": 2}, "val": {"cat": 1, "dog": 1}}
    assert any("other.csv" in sentence for sentence in kept["ignored"])


# Hugging Face's files and tars say splits and labels in columns and names.


def parquet(root: Path, columns: dict[str, list[object]], name: str = "data.parquet") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), root / name)
    return root


def images_of(*names: str) -> list[object]:
    return [{"bytes": painted(name, n), "path": f"{n}.png"} for n, name in enumerate(names)]


PARQUET: dict[str, tuple[dict[str, list[object]], tuple[str, ...], Counts]] = {
    "a column of splits": (
        {
            "image": images_of("a", "b", "a", "b"),
            "label": ["a", "b", "a", "b"],
            "split": ["train", "train", "val", "test"],
        },
        (),
        {"train": {"a": 1, "b": 1}, "val": {"a": 1}, "test": {"b": 1}},
    ),
    "a column of splits by another name": (
        {
            "image": images_of("a", "b", "a", "b"),
            "label": ["a", "b", "a", "b"],
            "usage": ["Training", "Training", "PublicTest", "PublicTest"],
        },
        (),
        {"train": {"a": 1, "b": 1}, "val": {"a": 1, "b": 1}},
    ),
    "unlabeled rows": (
        {
            "image": images_of("a", "b", "x", "b"),
            "label": ["a", "b", "a", "b"],
            "split": ["train", "train", "unlabeled", "val"],
        },
        (),
        {"train": {"a": 1, "b": 1}, "val": {"b": 1}},
    ),
    "floats with a gap": (
        {"image": images_of("0", "1", "0", "1", "x"), "label": [0.0, 1.0, 0.0, 1.0, None]},
        (),
        {"train": {"0": 2, "1": 2}},
    ),
    "NaN": (
        {"image": images_of("0", "1", "0", "1", "x"), "label": [0.0, 1.0, 0.0, 1.0, float("nan")]},
        (),
        {"train": {"0": 2, "1": 2}},
    ),
    "-1": (
        {"image": images_of("0", "1", "0", "1", "x"), "label": [0, 1, 0, 1, -1]},
        (),
        {"train": {"0": 2, "1": 2}},
    ),
    "from 1": (
        {"image": images_of("1", "2", "1", "2"), "label": [1, 2, 1, 2]},
        (),
        {"train": {"1": 2, "2": 2}},
    ),
    "texts of numbers": (
        {"image": images_of(*map(str, range(11))), "label": [*map(str, range(11))]},
        (),
        {"train": {str(n): 1 for n in range(11)}},
    ),
    "several label columns": (
        {
            "image": images_of("a", "b", "a", "b"),
            "genre": ["a", "b", "a", "b"],
            "artist": ["x", "x", "y", "y"],
        },
        ("--label-column", "genre"),
        {"train": {"a": 2, "b": 2}},
    ),
}


@pytest.mark.parametrize("name", PARQUET)
def test_parquet(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns, flags, counts = PARQUET[name]
    root = parquet(tmp_path / "mine", columns)
    held = () if "val" in counts else ("--hold-out", "0")
    code, output = conversion(capsys, root, tmp_path / "out", *flags, *held)
    assert code == 0, output
    assert read(tmp_path / "out") == {
        split: dict(sorted(found.items())) for split, found in counts.items()
    }


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"image": images_of("a", "b"), "label": [[0, 1], [1]]}, "holds list<"),
        ({"image": images_of("a", "b"), "label": ["a|b", "b"]}, "several labels in one cell"),
        (
            {"image": images_of("a", "b"), "label": ["a", "b"], "split": ["train", "query"]},
            "the split 'query'",
        ),
        ({"image": images_of("a", "b"), "label": ["Dog", "dog"]}, "--label-case fold"),
        (
            {"image": images_of("a", "b"), "label": ["a", "b"], "split": ["0", "1"]},
            "--split 0=train",
        ),
    ],
)
def test_parquet_that_is_refused(
    columns: dict[str, list[object]],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, output = conversion(capsys, parquet(tmp_path / "mine", columns), tmp_path / "out")
    assert code in (1, 2) and sentence in output, output


TWO: dict[str, list[object]] = {"image": images_of("a", "b"), "label": ["a", "b"]}


@pytest.mark.parametrize(
    ("files", "flags", "splits"),
    [
        (("train-00000-of-00001", "eval-00000-of-00001"), (), {"train", "val"}),
        (("train-00000-of-00001", "unlabeled-00000-of-00001"), (), {"train"}),
        (("train-00000-of-00001", "extra-00000-of-00001"), (), "the split 'extra'"),
        (
            ("train-00000-of-00001", "extra-00000-of-00001"),
            ("--split", "extra=test"),
            {"train", "test"},
        ),
        (("train-00000-of-00001", "extra-00000-of-00001"), ("--split", "extra=none"), {"train"}),
        (("part-0", "val-0"), (), {"train", "val"}),
        (("cats", "dogs"), (), {"train"}),
        (("red-00000-of-00001", "blue-00000-of-00001"), (), "the split 'blue'"),
    ],
)
def test_files_named_for_splits(
    files: tuple[str, ...],
    flags: tuple[str, ...],
    splits: set[str] | str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in files:
        parquet(tmp_path / "mine", TWO, f"{name}.parquet")
    held = () if "val" in splits else ("--hold-out", "0")
    code, output = conversion(capsys, tmp_path / "mine", tmp_path / "out", *flags, *held)
    if isinstance(splits, str):
        assert code == 2 and splits in output, output
    else:
        assert code == 0, output
        assert {*read(tmp_path / "out")} == splits


# Tables and folders that disagree, folders of splits by other names, lists of splits, files of
# other sets.


def two_labels(place: str, each: int = 4, start: int = 0) -> tuple[Files, dict[str, str]]:
    """Images of both classes in one folder, and their labels."""
    labels = named(each, "cat", "dog", start=start)
    return flat(place, labels, start), labels


PART_1, LABELS_1 = two_labels("part_a/")
PART_2, LABELS_2 = two_labels("part_b/", start=200)

DISAGREE: dict[str, Case] = {
    "HAM10000 with its test images": (
        PART_1
        | PART_2
        | flat("ISIC2018_Task3_Test_Images/", {f"t{n}": "x" for n in range(9)}, 700)
        | flat("ISIC2018_Task3_Train_Images/", {}, 800)
        | {"HAM10000_metadata.csv": rows_of("image_id,dx", LABELS_1 | LABELS_2)},
        (),
        {"train": {"cat": 8, "dog": 8}},
        "HAM10000_metadata.csv",
    ),
    "photos and previews of them": (
        two_labels("photos/")[0]
        | flat("previews/", {f"p{n}": "x" for n in range(4)}, 700)
        | {"labels.csv": rows_of("file,label", LABELS_1)},
        (),
        EIGHT,
        "4 images that no table names, 4 of them in previews/",
    ),
    "RSNA": (
        two_labels("stage_2_train_images/")[0]
        | flat("stage_2_test_images/", {f"t{n}": "x" for n in range(4)}, 700)
        | {"stage_2_train_labels.csv": rows_of("patientId,Target", LABELS_1)},
        (),
        EIGHT,
        "stage_2_train_labels.csv",
    ),
    "class folders and a table of sizes": (
        folders("")
        | {
            "info.csv": rows_of(
                "filename,width",
                {f"{c}/{n}.png": str(8 * (n % 2)) for c in ("cat", "dog") for n in range(3)},
            )
        },
        (),
        SIX,
        "its column 'width' is not called as labels are",
    ),
    "class folders and a table of photographers": (
        folders("")
        | {
            "info.csv": rows_of(
                "filename,photographer",
                {f"{c}/{n}.png": "ab"[n % 2] for c in ("cat", "dog") for n in range(3)},
            )
        },
        (),
        SIX,
        "'photographer'",
    ),
    "class folders and addresses": (
        folders("")
        | {
            "urls.csv": rows_of(
                "filename,url",
                {f"{c}/{n}.png": f"https://x/{c}{n}" for c in ("cat", "dog") for n in range(3)},
            )
        },
        (),
        SIX,
        "urls.csv",
    ),
    "leaf_train, leaf_test": (
        folders("leaf_train/", "leaf_test/"),
        (),
        of("train", "test"),
        "leaf_train/ (train)",
    ),
    "FER2013Train, FER2013Valid": (
        folders("FER2013Train/", "FER2013Valid/"),
        (),
        of("train", "val"),
        "",
    ),
    "train_v2, test_v2": (folders("train_v2/", "test_v2/"), (), of("train", "test"), ""),
    "a class called test_tube": (
        folders("", classes=("test_tube", "flask")),
        (),
        {"train": {"flask": 3, "test_tube": 3}},
        "",
    ),
    "GTSRB as it is downloaded": (
        {
            f"Final_Training/Images/{c:05d}/{n}.png": painted(f"{c:05d}", n)
            for c in range(3)
            for n in range(3)
        }
        | flat("Final_Test/Images/", {f"{n:05d}": f"{n % 3:05d}" for n in range(3)}, 200)
        | {
            "GT-final_test.csv": b"Filename;Width;ClassId\n"
            + b"".join(b"%05d.png;8;%d\n" % (n, n % 3) for n in range(3))
        },
        (),
        {"train": {f"{c:05d}": 3 for c in range(3)}, "test": {f"{c:05d}": 1 for c in range(3)}},
        "test is labelled by the column 'ClassId' of GT-final_test.csv",
    ),
    "trainval.txt and test.txt": (
        folders("images/")
        | {"trainval.txt": b"cat/0\ncat/1\ndog/0\ndog/1\n", "test.txt": b"cat/2\ndog/2\n"},
        (),
        of("train", each=2) | of("test", each=1),
        "splits by",
    ),
    "a list of test images alone": (
        folders("") | {"testing_list.txt": b"cat/2.png\ndog/2.png\n"},
        (),
        of("train", each=2) | of("test", each=1),
        "splits by testing_list.txt",
    ),
    "lists that hold labels, of some of the images": (
        folders("", each=5)
        | {
            "train.txt": b"".join(
                b"%s/%d.png %s\n" % (c, n, c) for c in (b"cat", b"dog") for n in range(3)
            ),
            "test.txt": b"".join(b"%s/3.png %s\n" % (c, c) for c in (b"cat", b"dog")),
        },
        (),
        SIX | of("test", each=1),
        "2 images that no list puts into a split",
    ),
    "lists with labels beside class folders": (
        folders("")
        | {
            "train.txt": b"".join(
                b"%s/%d.png %d\n" % (c, n, k)
                for k, c in enumerate((b"cat", b"dog"))
                for n in range(2)
            ),
            "test.txt": b"cat/2.png 0\ndog/2.png 1\n",
        },
        (),
        of("train", each=2) | of("test", each=1),
        "splits by",
    ),
    "RAF-DB, whose images are called by their splits": (
        {
            f"aligned/{split}_{n}.png": painted(str(n % 2 + 1), n)
            for n, split in enumerate(("train", "train", "train", "train", "test", "test"))
        }
        | {
            "list_patition_label.txt": b"".join(
                b"%s_%d.png %d\n" % (b"train" if n < 4 else b"test", n, n % 2 + 1) for n in range(6)
            )
        },
        (),
        {"train": {"1": 2, "2": 2}, "test": {"1": 1, "2": 1}},
        "",
    ),
    "VOC's lists": (
        folders("")
        | {
            "ImageSets/train.txt": b"cat/0\ndog/0\n",
            "ImageSets/val.txt": b"cat/1\ndog/1\n",
            "ImageSets/trainval.txt": b"cat/0\ncat/1\ndog/0\ndog/1\n",
            "ImageSets/test.txt": b"cat/2\ndog/2\n",
        },
        (),
        of("train", "val", "test", each=1),
        "splits by",
    ),
    "numbers before splits": (folders("01_train/", "02_test/"), (), of("train", "test"), ""),
    "a copy of a class": (
        folders("", classes=("cat", "dog", "dog - Copy")),
        ("--split", "dog - Copy=none"),
        SIX,
        "left out of every split",
    ),
    "results of a training beside class folders": (
        folders("")
        | {
            "test_results.json": b'{"top1": 0.5}',
            "train_config.json": b"{}",
            "requirements.txt": b"torch\n",
        },
        (),
        SIX,
        "",
    ),
    "--table keeps the list of splits": (
        flat("pics/", PETS)
        | {
            "labels.csv": rows_of("file,label", PETS),
            "splits.csv": b"file,split\n"
            + b"".join(b"img%03d,%s\n" % (n, b"test" if n > 5 else b"train") for n in range(8)),
        },
        ("--table", "labels.csv"),
        of("train") | of("test", each=1),
        "splits by splits.csv",
    ),
    "--table takes its family": (
        flat("pics/", FEW)
        | flat("pics/", MORE, 50)
        | {
            "style_train.csv": rows_of("file,label", FEW),
            "style_val.csv": rows_of("file,label", MORE),
            "genre_train.csv": rows_of("file,label", dict.fromkeys(FEW, "x")),
        },
        ("--table", "style_train.csv"),
        SIX | of("val", each=2),
        "style_val.csv",
    ),
    "Roboflow's column Unlabeled": (
        {
            f"{split}/{k}": v
            for split, start in (("train", 0), ("valid", 300))
            for k, v in flat("", FEW, start).items()
        }
        | {
            f"{split}/_classes.csv": b"filename,Unlabeled,cat,dog\n"
            + "".join(
                f"{n}.png,0,{int(c == 'cat')},{int(c == 'dog')}\n" for n, c in FEW.items()
            ).encode()
            for split in ("train", "valid")
        },
        (),
        of("train", "val"),
        "",
    ),
    "labels of several words": (
        flat("pics/", {"a": "A300", "b": "Boeing 707", "c": "Boeing 737", "d": "A300"})
        | {"list.txt": b"a.png A300\nb.png Boeing 707\nc.png Boeing 737\nd.png A300\n"},
        (),
        {"train": {"A300": 2, "Boeing 707": 1, "Boeing 737": 1}},
        "",
    ),
    "trainset.csv, testset.csv": (
        flat("pics/", FEW)
        | flat("pics/", MORE, 50)
        | {"trainset.csv": rows_of("file,label", FEW), "testset.csv": rows_of("file,label", MORE)},
        (),
        SIX | of("test", each=2),
        "",
    ),
    "predictions beside answers": (
        flat("pics/", FEW)
        | flat("pics/", MORE, 50)
        | {
            "train.csv": rows_of("file,label", FEW),
            "test.csv": rows_of("file,label", MORE),
            "predictions.csv": rows_of(
                "file,prediction", {n: "cat" if k % 3 else "dog" for k, n in enumerate(FEW | MORE)}
            ),
        },
        (),
        SIX | of("test", each=2),
        "predictions.csv",
    ),
    "placeholders where images share a folder": (
        flat("pics/", FEW)
        | flat("pics/", {f"t{n}": "x" for n in range(5)}, 50)
        | {
            "train.csv": rows_of("file,label", FEW),
            "test.csv": rows_of("file,label", {f"t{n}": "cat" for n in range(5)}),
        },
        (),
        SIX,
        "placeholders",
    ),
    "Oxford's trimaps": (
        flat("images/", PETS)
        | {f"annotations/trimaps/{name}.png": painted("x", 700 + n) for n, name in enumerate(PETS)}
        | {
            "annotations/trainval.txt": "".join(
                f"{n} {int(c == 'dog')} 1 1\n" for n, c in list(PETS.items())[:4]
            ).encode(),
            "annotations/test.txt": "".join(
                f"{n} {int(c == 'dog')} 1 1\n" for n, c in list(PETS.items())[4:]
            ).encode(),
        },
        ("--label-column", "2", "--classes", "annotations/names.json"),
        of("train", "test", each=2),
        "",
    ),
    "images and masks in each class": (
        folders("COVID/", "Normal/", classes=("images",), each=0)
        | {
            f"{c}/{kind}/{n}.png": painted(c if kind == "images" else "x", n)
            for c in ("cat", "dog")
            for kind in ("images", "masks")
            for n in range(3)
        },
        (),
        SIX,
        "3 images in a folder of masks",
    ),
    "unlabeled images in each class": (
        folders("")
        | {f"{c}/unlabeled/{n}.png": painted("x", n) for c in ("cat", "dog") for n in range(2)},
        (),
        SIX,
        "left out of every split",
    ),
    "test images in a folder of the same name": (
        folders("train/train/") | flat("test/test/", {"t1": "x", "t2": "x"}, 600),
        (),
        SIX,
        "images without labels",
    ),
    "ids without zeros": (
        flat("pics/", {f"{n:03d}": ("cat", "dog")[n % 2] for n in range(12)})
        | {"labels.csv": rows_of("id,label", {str(n): ("cat", "dog")[n % 2] for n in range(12)})},
        (),
        of("train", each=6),
        "",
    ),
    "a table of another suffix": (
        flat("pics/", FEW) | {"labels.csv": rows_of("file,label", FEW, "{name}.jpg,{label}")},
        (),
        SIX,
        "",
    ),
    "an empty label and a label": (
        flat("pics/", FEW) | {"labels.csv": rows_of("file,label", FEW) + b"img000,\n"},
        (),
        SIX,
        "the same row once more",
    ),
}
DISAGREE["Oxford's trimaps"][0]["annotations/names.json"] = b'{"0": "cat", "1": "dog"}'


@pytest.mark.parametrize("name", DISAGREE)
def test_tables_and_folders(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, out = convert(DISAGREE[name], tmp_path, capsys)
    assert code == 0, output
    assert read(out) == DISAGREE[name][2], output
    assert DISAGREE[name][3] in output


MANY_ROWS = {f"i{n:02d}": ("cat", "dog", "cow")[n % 3] for n in range(30)}
NO_WAY: dict[str, tuple[Files, tuple[str, ...], str]] = {
    "CUB-200": (
        {f"images/{c}/{c}_a{n}.png": painted(c, n) for c in ("cat", "dog") for n in range(8)}
        | {
            "images.txt": "".join(
                f"{n + 8 * k + 1} {c}/{c}_a{n}.png\n"
                for k, c in enumerate(("cat", "dog"))
                for n in range(8)
            ).encode(),
            "train_test_split.txt": b"".join(b"%d %d\n" % (n + 1, n % 2) for n in range(16)),
        },
        (),
        "train_test_split.txt seems to say which images are to train on",
    ),
    "a JSON of splits": (
        folders("")
        | {
            "splits.json": b'{"train": ["cat/0.png", "dog/0.png"], '
            b'"test": ["cat/1.png", "dog/1.png"]}'
        },
        (),
        "splits.json seems to say which images are to train on",
    ),
    "lists by an unknown suffix": (
        {f"{c}/{c}{n}.png": painted(c, n) for c in ("cat", "dog") for n in range(4)}
        | {"train.list": b"cat0\ncat1\ndog0\ndog1\n", "test.list": b"cat2\ncat3\ndog2\n"},
        (),
        "seems to say which images are to train on",
    ),
    "half of the images labelled otherwise": (
        {**two_labels("a/")[0], **two_labels("b/", start=200)[0]}
        | {"labels.csv": rows_of("file,label", dict(list(LABELS_1.items())[:5]))},
        (),
        "say which is right: --table",
    ),
    "names that several images have": (
        {f"{c}/{n}.png": painted(c, n) for c in ("a", "b") for n in range(4)}
        | {"labels.csv": b"file,label\n" + b"".join(b"%d.png,cat\n" % n for n in range(4))},
        (),
        "by names that several images have",
    ),
    "a folder test among classes": (
        folders("", classes=("cat", "dog", "cow")) | flat("test/", {"t1": "x"}),
        (),
        "test may be splits",
    ),
    "a folder test in a class": (
        folders("") | {"cat/test/9.png": painted("cat", 99)},
        (),
        "a folder test that may be a split",
    ),
    "Market-1501": (
        flat("bounding_box_train/", {"a": "x"})
        | flat("bounding_box_test/", {"b": "x"})
        | flat("query/", {"c": "x"}),
        (),
        "names of splits",
    ),
    "CycleGAN": (
        folders("trainA/", "trainB/", "testA/", "testB/", classes=("x", "y")),
        (),
        "the splits of several data sets",
    ),
    "gallery and query": (
        flat("gallery/", {"a": "x"}) | flat("query/", {"b": "x"}),
        (),
        "names of splits",
    ),
    "a split that holds one class more": (
        folders("train/") | folders("gallery/", classes=("cat", "dog", "pig")),
        (),
        "the split 'gallery', and it is not known",
    ),
    "superclasses of one class": (
        folders("a/", classes=("abbey", "airport"))
        | folders("b/", classes=("badlands",))
        | folders("c/", classes=("cabin",)),
        (),
        "can be read in 3 ways",
    ),
    "a repository of code and pictures": (
        flat("docs/", {"a": "x"}) | flat("src/", {"b": "y"}),
        (),
        "by the names of its folders",
    ),
    "a repository whose data lies among others": (
        folders("dataset/") | flat("Logo/", {"l": "x"}) | flat("model_v2/", {"m": "y"}),
        (),
        "can be read in",
    ),
    "pages and images": (
        flat("images/", {"a": "x"}) | flat("static/", {"b": "y"}),
        (),
        "is no folder of classes",
    ),
    "a table named that names nothing": (
        folders("") | {"other.csv": b"file,label\nnowhere1,cat\nnowhere2,dog\n"},
        ("--table", "other.csv"),
        "names no image below",
    ),
    "a table named whose columns are unclear": (
        folders("") | {"other.csv": b"file,a,b\ncat/0.png,1,2\n"},
        ("--table", "other.csv"),
        "say which one it is: --label-column NAME",
    ),
    "-1 beside names": (table_of(a="cat", b="dog", c="cat", d="-1"), (), "--no-label -1"),
    "combinations of labels": (
        flat("", FEW)
        | {"t.tsv": b"file\tlabel\nimg000\tcat, dog\nimg001\tcat, cow\nimg002\tdog, cow\n"},
        (),
        "several labels in one cell",
    ),
    "many images with several labels": (
        flat("", MANY_ROWS)
        | {
            "t.csv": rows_of("file,label", MANY_ROWS)
            + rows_of("", dict.fromkeys(list(MANY_ROWS)[1::3], "cat")).strip()
        },
        (),
        "gives several labels to 10 images",
    ),
    "a split that is not there": (
        folders("train/"),
        ("--split", "tset=test"),
        "that may be a split is called 'tset'",
    ),
    "levels of a table": (
        table_of(a="cat", b="dog", c="cat"),
        ("--class-level", "2"),
        "--class-level is of class folders",
    ),
    "columns of no table": (folders(""), ("--label-column", "zzz"), "leave --label-column"),
    "years": (folders("", classes=("2019", "2020")), (), "is no folder of classes"),
    "domains of images": (folders("", classes=("trainA", "trainB")), (), "names of splits"),
    "colour and depth": (folders("", classes=("rgb", "depth")), (), "is no folder of classes"),
    "a label that is not there": (
        table_of(a="cat", b="dog", c="cat"),
        ("--no-label", "cta"),
        "holds no such label",
    ),
    "no images to train on": (
        flat("pics/", FEW) | {"dev.csv": rows_of("file,label", FEW)},
        ("--hold-out", "0"),
        "none to train on",
    ),
}


@pytest.mark.parametrize("name", NO_WAY)
def test_what_can_be_read_in_two_ways(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, flags, sentence = NO_WAY[name]
    code, output, out = convert((files, flags, {}, ""), tmp_path, capsys)
    assert code in (1, 2), output
    assert sentence in output, output
    assert not (out / "manifest.json").exists()


def features(names: list[str]) -> dict[bytes, bytes]:
    label = {"_type": "ClassLabel", "names": names}
    return {
        b"huggingface": json.dumps(
            {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        ).encode()
    }


def test_files_that_number_the_classes_differently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        table = pa.table(
            {"image": images_of("cat", "dog"), "label": [names.index("cat"), names.index("dog")]}
        )
        (tmp_path / "mine").mkdir(exist_ok=True)
        pq.write_table(
            table.replace_schema_metadata(features(names)), tmp_path / "mine" / f"{name}.parquet"
        )
    code, output = conversion(capsys, tmp_path / "mine", tmp_path / "out")
    assert code == 1 and "a number would be two classes" in output, output


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (
            {"full/train-0.parquet": TWO, "tiny/train-0.parquet": TWO},
            "several data sets: full, tiny",
        ),
        (
            {"train.parquet": TWO, "val.parquet": {"image": TWO["image"], "labels": TWO["label"]}},
            "has no column 'label'",
        ),
        (
            {
                "train.parquet": {
                    "image": [{"bytes": None, "path": "a.png"}] * 2,
                    "label": ["a", "b"],
                }
            },
            "holds paths such as a.png",
        ),
    ],
)
def test_files_of_several_forms(
    files: dict[str, dict[str, list[object]]],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, columns in files.items():
        place = tmp_path / "mine" / name
        parquet(place.parent, columns, place.name)
    code, output = conversion(capsys, tmp_path / "mine", tmp_path / "out")
    assert code in (1, 2) and sentence in output, output


def test_groups_of_a_parquet_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {
        "image": images_of(*["a", "b"] * 10),
        "label": ["a", "b"] * 10,
        "Patient": [f"p{n // 4}" for n in range(20)],
    }
    root = parquet(tmp_path / "mine", columns)
    code, output = conversion(
        capsys, root, tmp_path / "out", "--group", "patient", "--hold-out", "0.2"
    )
    assert code == 0, output
    assert read(tmp_path / "out") == {"train": {"a": 8, "b": 8}, "val": {"a": 2, "b": 2}}
    keys = Dataset.open(str(tmp_path / "out")).split("val").index.key.to_pylist()
    assert len({int(key) // 4 for key in keys}) == 1


# Tars.


def tar_with(root: Path, members: Files, name: str = "train.tar") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(layouts.tar_of([*members.items()]))
    return root


def labelled(*labels: bytes, extension: str = "cls", place: str = "") -> Files:
    files: Files = {}
    for n, label in enumerate(labels):
        files |= {f"{place}{n}.png": painted(label.decode(), n), f"{place}{n}.{extension}": label}
    return files


TAR_FLAGS = [
    ("--table", "t.csv"),
    ("--label-column", "x"),
    ("--image-column", "x"),
    ("--split-column", "x"),
]


@pytest.mark.parametrize("flags", TAR_FLAGS)
@pytest.mark.parametrize("way", ["conversion", "index"])
def test_flags_that_tars_do_not_heed(
    flags: tuple[str, str], way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tar_with(tmp_path / "mine", labelled(b"a", b"b", b"a", b"b"))
    (tmp_path / "t.csv").write_bytes(b"file,label\n0,b\n")
    value = str(tmp_path / flags[1]) if flags[0] == "--table" else flags[1]
    where = ("index", root) if way == "index" else (root, tmp_path / "out")
    code, output = conversion(capsys, *where, flags[0], value)
    assert code == 2 and f"{flags[0]} says nothing of" in output, output


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        (
            labelled(b"a", b"b", place="train/") | labelled(b"a", b"b", place="test/"),
            "make a tar of each split",
        ),
        (
            labelled(b"a", b"b", place="x/") | labelled(b"a", b"b", place="val/"),
            "make a tar of each split",
        ),
        (
            labelled(b"a", b"b") | labelled(b"a", b"b", place="unlabeled/"),
            "make a tar of each split",
        ),
        (
            labelled(b"a", b"b") | {"7.png": painted("a", 7), "7.json": b'{"label":0'},
            "its .json is no JSON",
        ),
    ],
)
def test_tars_that_are_refused(
    members: Files, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tar_with(tmp_path / "mine", members)
    code, output = conversion(capsys, root, tmp_path / "out")
    assert code in (1, 2) and sentence in output, output


@pytest.mark.parametrize("name", ["classes.txt", "classes.json", "class_names.txt"])
def test_a_list_beside_tars_counts_for_both_ways(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tar_with(tmp_path / "mine", labelled(b"b", b"a", b"b", b"a"))
    (root / name).write_bytes(b'["b", "a"]' if name.endswith("json") else b"b\na\n")
    assert conversion(capsys, root, tmp_path / "out", "--hold-out", "0")[0] == 0
    assert conversion(capsys, "index", root)[0] == 0
    for made in (tmp_path / "out", root):
        assert [entry.id for entry in Dataset.open(str(made)).manifest.classes] == ["b", "a"]
        assert read(made) == {"train": {"a": 2, "b": 2}}
