"""The contact sheet: which images are on it, where, and what is written beside them."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wds_train.cli import main
from wds_train.dataset.manifest import ClassInfo
from wds_train.dataset.reader import Dataset
from wds_train.tracking import contact_sheet
from wds_train.tracking.contact_sheet import CAPTION, IMAGES, TEXT, WIDTH

Written = list[tuple[int, int, str, int]]  # left, top, text, size


def encoded(
    size: tuple[int, int], colour: tuple[int, ...], kind: str = "PNG", **options: object
) -> bytes:
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[len(colour)]
    out = io.BytesIO()
    Image.new(mode, size, colour if len(colour) > 1 else colour[0]).save(out, kind, **options)
    return out.getvalue()


def colour_of(label: int, number: int) -> tuple[int, int, int]:
    return (label * 37 % 256, number * 50 % 256, label // 7)


def made(root: Path, images: dict[str, list[bytes]]) -> Dataset:
    """A dataset of these images of each class."""
    for name, contents in images.items():
        (root / "source" / "train" / name).mkdir(parents=True)
        for number, data in enumerate(contents):
            (root / "source" / "train" / name / f"{number}.png").write_bytes(data)
    (root / "source" / "val").mkdir()
    (root / "source" / "val" / next(iter(images))).mkdir()
    (root / "source" / "val" / next(iter(images)) / "0.png").write_bytes(encoded((9, 9), (1, 2, 3)))
    assert main(["shards", str(root / "source"), str(root / "out"), "--processes", "1"]) == 0
    return Dataset.open(str(root / "out"))


def sheet_of(
    dataset: Dataset, path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Image.Image, Written]:
    """The sheet that `inspect --grid` writes, and the texts that are put on it."""
    written: Written = []
    text = contact_sheet.Sheet.text

    def noted(self: contact_sheet.Sheet, *what: Any) -> None:
        written.append(what[:4])
        text(self, *what)

    monkeypatch.setattr(contact_sheet.Sheet, "text", noted)
    assert main(["inspect", dataset.store.url, "--grid", str(path)]) == 0
    sheet = Image.open(path)
    assert sheet.format == "PNG" and sheet.width == WIDTH
    for left, top, line, size in written:
        right = left + contact_sheet._font(size).getlength(line)
        assert left >= 0 and right <= WIDTH, f"{line} leaves the page"
        assert top + size <= sheet.height
    return sheet, written


def put(written: Written, size: int) -> list[str]:
    return [line for _, _, line, of_size in written if of_size == size]


@pytest.mark.parametrize(
    ("classes", "shown"), [(2, 2), (3, 3), (4, 4), (20, 20), (21, 20), (1000, 20)]
)
def test_classes(classes: int, shown: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four images of each of twenty classes at most, the first and the last of them among them."""
    per_class = 6 if classes < 100 else 1
    images = {
        f"c{label:04d}": [encoded((8, 8), colour_of(label, number)) for number in range(per_class)]
        for label in range(classes)
    }
    dataset = made(tmp_path, images)
    sheet, written = sheet_of(dataset, tmp_path / "grid.png", monkeypatch)
    reader = dataset.split("train")
    titles = [line for line in put(written, TEXT) if not line.startswith(("layout", "labels"))]
    labels = [int(title.removeprefix("c")) for title in titles]
    assert titles == [f"c{label:04d}" for label in labels]
    counts = [f"label {label}, {per_class} image{'s' * (per_class > 1)}" for label in labels]
    assert [line for line in put(written, CAPTION) if "label" in line] == counts
    assert (
        len(labels) == shown
        and (labels[0], labels[-1]) == (0, classes - 1)
        and labels == sorted({*labels})
    )
    keys = [line for line in put(written, CAPTION) if "/" in line]
    expected = []
    for label in labels:
        rows = np.flatnonzero(reader.index.label[:] == label)[:IMAGES]
        expected += [reader.index.key_of(int(row)) for row in rows]
    assert keys == expected

    # Above each key is the image of that key, in the colour of its class.
    for left, top, line, size in written:
        if size == CAPTION and "/" in line:
            kind, _, number = line.partition("/")
            assert sheet.getpixel((left + 30, top - 40)) == colour_of(int(kind[1:]), int(number))


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((1, 1), (145, 145)),
        ((8, 8), (144, 144)),
        ((32, 32), (128, 128)),
        ((33, 33), (145, 145)),
        ((5, 145), (5, 145)),
        ((3000, 2000), (145, 97)),
        ((2, 9000), (1, 145)),
        ((9000, 60), (145, 1)),
    ],
)
def test_sizes(size: tuple[int, int], shown: tuple[int, int]) -> None:
    """The whole image is shown, tiny ones by a whole factor."""
    assert contact_sheet._scale(Image.new("RGB", size), 145).size == shown


LONG = "photographs of the common European " + "very " * 60
NAMES = {
    "plain": ["cat", "dog"],
    "long, different at the end": [f"{LONG}hedgehog", f"{LONG}squirrel"],
    "of one long word": ["a" * 250, "b" * 250],
    "of other alphabets": ["кошка", "Ähre", "γάτα", "猫"],
    "with odd characters": ["a $b 'c'", "100 % [x]"],
}


@pytest.mark.parametrize("case", NAMES)
def test_names(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is too long loses its middle, so that those that begin alike are told apart."""
    names = sorted(name[:200] if len(name.encode()) > 250 else name for name in NAMES[case])
    if "end" in case:
        names = sorted(f"{LONG[:200]}{name.rsplit(' ')[-1]}" for name in NAMES[case])
    images = {name: [encoded((8, 8), colour_of(n, 1))] for n, name in enumerate(names)}
    _, written = sheet_of(made(tmp_path, images), tmp_path / "grid.png", monkeypatch)
    titles = [line for line in put(written, TEXT) if not line.startswith(("layout", "labels"))]
    assert len({*titles}) == len(names)
    for name, title in zip(names, titles, strict=True):
        start, mark, end = title.partition("…")
        assert name == title if not mark else name.startswith(start) and name.endswith(end)
        assert not mark or len(start) > 5 < len(end)


@pytest.mark.parametrize(
    ("key", "lines", "whole"),
    [
        ("a/1", 1, True),
        ("cat/IMG_0003_a_rather_long_name_3", 2, True),
        ("cat/IMG_0003_a_rather_long_name_that_goes_on_and_on_3", 2, False),
        ("x" * 400 + "/the_end_of_the_name_1", 2, False),
    ],
)
def test_keys(key: str, lines: int, whole: bool) -> None:
    """A key has two lines; of a longer one the end is shown."""
    shown = contact_sheet._caption(key, 145)
    assert len(shown) == lines and all(
        contact_sheet._font(CAPTION).getlength(line) <= 145 for line in shown
    )
    mark, end = ("", "".join(shown)) if whole else ("…", "".join(shown)[1:])
    assert "".join(shown) == mark + end and key.endswith(end)
    assert (end == key) == whole and len(end) >= min(len(key), 30)


def test_what_was_understood_heads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = made(tmp_path, {"a": [encoded((8, 8), (1, 2, 3))], "b": [encoded((8, 8), (4, 2, 3))]})
    _, written = sheet_of(dataset, tmp_path / "grid.png", monkeypatch)
    assert written[0][2] == "out, train: 2 classes, up to 4 images of each"
    assert written[1][2] == "layout: class folders in train/, val/"
    monkeypatch.setattr(
        "wds_train.commands.inspect._report", lambda dataset: {}
    )  # of a dataset of before
    _, written = sheet_of(dataset, tmp_path / "grid.png", monkeypatch)
    assert written[1][2] == "source: imagefolder source"
    understood = {
        "understood": {"layout": "images in class folders", "labels": "the folders' names"}
    }
    monkeypatch.setattr("wds_train.commands.inspect._report", lambda dataset: understood)
    _, written = sheet_of(dataset, tmp_path / "grid.png", monkeypatch)
    assert [line for _, _, line, _ in written[1:3]] == [
        "layout: images in class folders",
        "labels: the folders' names",
    ]


def test_what_cannot_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class without images says so, and an image that cannot be read is crossed out."""
    images = {name: [encoded((40, 40), colour_of(n, 9))] for n, name in enumerate("abc")}
    dataset = made(tmp_path, images)
    reader = dataset.split("train")
    row = int(np.flatnonzero(reader.index.label == 1)[0])
    tar = tmp_path / "out" / reader.shard_of(row)
    data = bytearray(tar.read_bytes())
    start, length = int(reader.index.data_offset[row]), int(reader.index.data_length[row])
    data[start : start + length] = bytes(length)
    tar.write_bytes(data)
    manifest = replace(dataset.manifest, classes=(*dataset.manifest.classes, ClassInfo("d", "d")))
    (tmp_path / "out" / "manifest.json").write_bytes(manifest.to_json())
    sheet, written = sheet_of(
        Dataset.open(str(tmp_path / "out")), tmp_path / "grid.png", monkeypatch
    )
    remarks = ["label 0, 1 image", "label 1, 1 image", "label 2, 1 image", "label 3, no images"]
    assert [line for line in put(written, CAPTION) if "label" in line] == remarks
    (left, top) = next((left, top) for left, top, line, _ in written if line == "b/0")
    assert sheet.getpixel((left + 72, top - 75)) == (255, 0, 0)
    (left, top) = next((left, top) for left, top, line, _ in written if line == "a/0")
    assert sheet.getpixel((left + 72, top - 75)) == colour_of(0, 9)
