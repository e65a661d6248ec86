"""Tars as people have them: dots in keys, fields of other names, several labels, captions, folders.

Every image is of one colour, its class's: a label that went to another image is seen.
"""

import contextlib
import gzip
import io
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path

import layouts
import numpy as np
import pytest
import webdataset
from answers import conversion
from PIL import Image

from wds_train import SampleLoader
from wds_train.cli import main as wds_train
from wds_train.commands.inspect import _checked
from wds_train.conversion.sources.tar_keys import Keys
from wds_train.conversion.sources.tar_samples import gather
from wds_train.conversion.sources.tars import folder_files
from wds_train.dataset.reader import Dataset
from wds_train.dataset.tar import Member
from wds_train.errors import DataError

CLASSES = ("cat", "dog")
COLOURS = {"cat": (250, 0, 0), "dog": (0, 0, 250)}
Files = list[tuple[str, bytes]]
Sample = tuple[str, str]  # key, class


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_HOME", str(tmp_path / "home"))


def picture(name: str, kind: str = "JPEG") -> bytes:
    """An image in the colour of the class `name`."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), COLOURS[name]).save(out, kind)
    return out.getvalue()


def put(root: Path, tars: dict[str, Files]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, files in tars.items():
        data = layouts.tar_of(files)
        (root / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    return root


def pairs(samples: Iterable[Sample], image: str = "jpg", label: str = "cls") -> Files:
    """Two members of each sample: `KEY.jpg` and `KEY.cls`, say, with the class's name."""
    files: Files = []
    for key, name in samples:
        value = json.dumps({"label": name}) if label.endswith("json") else name
        files += [(f"{key}.{image}", picture(name)), (f"{key}.{label}", value.encode())]
    return files


def numbered(form: str, count: int = 3) -> list[Sample]:
    """Samples of both classes, whose keys are `form` with the class's name and a number in it."""
    return [(form.format(name=name, n=n), name) for name in CLASSES for n in range(count)]


def seen(out: Path, split: str = "train") -> dict[str, str]:
    """The class of each key of the split. It is that of the image's colour."""
    made = Dataset.open(str(out))
    reader = made.split(split)
    found = {}
    for row in range(len(reader)):
        name = made.manifest.classes[reader.index.label[row]].id
        pixels = np.asarray(Image.open(io.BytesIO(reader.image(row))).convert("RGB"))
        assert np.abs(pixels.mean((0, 1)) - COLOURS[name]).max() < 10, (
            f"{reader.index.key_of(row)} is no {name}"
        )
        found[reader.index.key_of(row)] = name
    return found


def stock(*tars: Path) -> int:
    """Return the number of samples that webdataset itself makes of the tars."""
    return sum(1 for path in tars for _ in webdataset.WebDataset(str(path), shardshuffle=False))


LABELLED = numbered("{name}.{n}")
DOTTED: dict[str, tuple[list[Sample], Files]] = {
    "a class and a number": (numbered("{name}.{n}", 20), pairs(numbered("{name}.{n}", 20))),
    "blanks": (numbered("IMG 2.5x 00{n} {name}"), pairs(numbered("IMG 2.5x 00{n} {name}"))),
    "numbers": (
        [("3.14", "cat"), ("3.15", "dog"), ("2.7", "cat")],
        pairs([("3.14", "cat"), ("3.15", "dog"), ("2.7", "cat")]),
    ),
    "times": (
        numbered("{name} 2024-01-05 10.30.4{n}"),
        pairs(numbered("{name} 2024-01-05 10.30.4{n}")),
    ),
    "sentences": (
        numbered("Wait... what, {name} {n}"),
        pairs(numbered("Wait... what, {name} {n}")),
    ),
    "letters": (numbered("{name}.old{n}"), pairs(numbered("{name}.old{n}"))),
    "folders": (numbered("v1.2/{name}/a.{n}"), pairs(numbered("v1.2/{name}/a.{n}"))),
    "image in the name": (
        numbered("all/image.{n}.{name}"),
        pairs(numbered("all/image.{n}.{name}")),
    ),
    "large letters": (LABELLED, pairs(LABELLED, "JPG", "CLS")),
    "JSON": (LABELLED, pairs(LABELLED, label="json")),
    "JSON named for the file": (LABELLED, pairs(LABELLED, label="jpg.json")),
    "image.jpg, label.cls": (LABELLED, pairs(LABELLED, "image.jpg", "label.cls")),
    "masks": (LABELLED, [*pairs(LABELLED), ("dog.2.seg.png", picture("cat", "PNG"))]),
    "fields of other names": (
        LABELLED,
        sorted(
            pairs(LABELLED)
            + [
                (f"{key}.{field}", picture("cat", "PNG"))
                for key, _ in LABELLED
                for field in ("Edges.png", "dots.npy")
            ]
        ),
    ),
    "in turns": (
        [(f"{name}.{n}", name) for n in range(3) for name in CLASSES],
        pairs((f"{name}.{n}", name) for n in range(3) for name in CLASSES),
    ),
    "one without a number": (
        [("cat", "cat"), ("cat.1", "dog"), ("cat.2", "cat")],
        pairs([("cat", "cat"), ("cat.1", "dog"), ("cat.2", "cat")]),
    ),
    "some without dots": ([*LABELLED, ("x", "cat")], pairs([*LABELLED, ("x", "cat")])),
}


@pytest.mark.parametrize("kind", DOTTED)
def test_keys_with_dots(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, files = DOTTED[kind]
    root = put(tmp_path / "mine", {"a.tar": files})
    by_stock = f"would see {stock(root / 'a.tar'):,} in these {len(samples)}"
    code, output = conversion(capsys, f"wds:{root}", tmp_path / "out", "--hold-out", "0")
    assert code == 0, output
    assert sorted(seen(tmp_path / "out").values()) == sorted(name for _, name in samples)
    assert "its names have dots" in output and by_stock in output
    assert output.count(by_stock) == 2, "once before the work, once after it"
    # Where they lie, under their own keys, with the same fields for whoever reads them.
    code, output = conversion(capsys, "index", root)
    assert code == 0 and by_stock in output, output
    assert seen(root) == dict(samples)
    assert wds_train(["verify", str(root)]) == 0
    wanted: dict[str, dict[str, bytes]] = {}
    for name, data in files:
        key = max((key for key, _ in samples if name.startswith(f"{key}.")), key=len)
        wanted.setdefault(key, {})[name.removeprefix(f"{key}.").lower()] = data
    (loaded,) = SampleLoader(str(root), len(samples), epochs=1, workers=0)
    assert dict(zip(loaded.keys, loaded.fields, strict=True)) == wanted


FOUR = [(f"{n}", CLASSES[n % 2]) for n in range(4)]
MASKS = [(f"{key}.seg.png", picture("cat", "PNG")) for key, _ in FOUR]
# name: the members, and those of sample 0 by their fields. Dots that webdataset's fields have are
# no part of a key.
FIELDS: dict[str, tuple[Files, dict[str, str]]] = {
    "image.jpg, label.cls": (
        pairs(FOUR, "image.jpg", "label.cls"),
        {"image.jpg": "0.image.jpg", "label.cls": "0.label.cls"},
    ),
    "folders": (
        [(name.replace(".", "/"), data) for name, data in pairs(FOUR, "image_jpg", "label_cls")],
        {"jpg": "0/image.jpg", "cls": "0/label.cls"},
    ),
    "masks": (
        sorted(pairs(FOUR) + MASKS),
        {"cls": "0.cls", "jpg": "0.jpg", "seg.png": "0.seg.png"},
    ),
    "masks first, of another name": (
        sorted(pairs(FOUR) + [(f"{key}.a_mask_of.png", picture("cat", "PNG")) for key, _ in FOUR]),
        {"a_mask_of.png": "0.a_mask_of.png", "cls": "0.cls", "jpg": "0.jpg"},
    ),
    "one numbered image": (pairs(FOUR, "0.jpg"), {"0.jpg": "0.0.jpg", "cls": "0.cls"}),
    "one image, on the left": (pairs(FOUR, "left.jpg"), {"left.jpg": "0.left.jpg", "cls": "0.cls"}),
    "a second label, with a name": (
        sorted(pairs(FOUR) + [(f"{key}.coarse.cls", b"animal") for key, _ in FOUR]),
        {"cls": "0.cls", "coarse.cls": "0.coarse.cls", "jpg": "0.jpg"},
    ),
    "labels named for the file": (
        pairs(FOUR, label="jpg.cls"),
        {"jpg": "0.jpg", "jpg.cls": "0.jpg.cls"},
    ),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_fields_with_dots(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, fields = FIELDS[kind]
    files = [(name.replace("_jpg", ".jpg").replace("_cls", ".cls"), data) for name, data in files]
    root = put(tmp_path / "mine", {"a.tar": files})
    code, output = conversion(capsys, f"wds:{root}", tmp_path / "out", "--hold-out", "0")
    assert code == 0 and "its names have dots" not in output, output
    assert sorted(seen(tmp_path / "out").values()) == ["cat", "cat", "dog", "dog"]
    code, output = conversion(capsys, "index", root)
    assert code == 0 and "its names have dots" not in output, output
    assert seen(root) == dict(FOUR)
    (loaded,) = SampleLoader(str(root), 4, epochs=1, workers=0)
    found = loaded.fields[loaded.keys.index("0")]
    assert found == {field: dict(files)[name] for field, name in fields.items()}


def two(name: str, kind: str) -> Files:
    return [(f"{key}.{name}", picture(label, kind)) for key, label in FOUR]


REFUSED: dict[str, tuple[Files, tuple[str, ...]]] = {
    "left and right": (
        sorted(
            two("left.jpg", "JPEG")
            + two("right.jpg", "JPEG")
            + [(f"{k}.cls", c.encode()) for k, c in FOUR]
        ),
        ("0.left.jpg", "0.right.jpg", "it holds 2 images"),
    ),
    "frames": (
        sorted(
            two("0.jpg", "JPEG")
            + two("1.jpg", "JPEG")
            + [(f"{k}.cls", c.encode()) for k, c in FOUR]
        ),
        ("0.0.jpg", "0.1.jpg", "it holds 2 images"),
    ),
    "two formats": (
        sorted(pairs(FOUR) + two("png", "PNG")),
        ("0.jpg", "0.png", "it holds 2 images"),
    ),
    "fine and coarse": (
        sorted(
            two("jpg", "JPEG")
            + [(f"{k}.{c}.cls", c.encode()) for k, _ in FOUR for c in ("coarse", "fine")]
        ),
        ("coarse in 0.coarse.cls", "fine in 0.fine.cls", "it holds several labels"),
    ),
    "with and without a mask": (
        sorted(
            pairs(FOUR) + pairs([(f"{key}.mask", CLASSES[name == "cat"]) for key, name in FOUR])
        ),
        ("cat in 0.cls", "dog in 0.mask.cls", "it holds several labels"),
    ),
    "one label for many": (
        sorted(
            [(f"{c}.{n}.jpg", picture(c)) for c in CLASSES for n in range(3)]
            + [(f"{c}.cls", c.encode()) for c in CLASSES]
        ),
        ("cat.0.jpg", "cat.1.jpg", "it holds 3 images"),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_fits_neither_way_is_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, told = REFUSED[kind]
    root = put(tmp_path / "mine", {"a.tar": files})
    for arguments in ((f"wds:{root}", tmp_path / "out", "--hold-out", "0"), ("index", root)):
        code, output = conversion(capsys, *arguments)
        assert code == 1 and "can be used" in output, output
        assert all(part in output for part in told), output
        assert "Traceback" not in output
    assert not (tmp_path / "out").exists() and [*root.iterdir()] == [root / "a.tar"]
    assert conversion(capsys, "index", root, "--any")[0] == 0  # as the message says


def test_two_members_with_one_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        member
        for n, (key, name) in enumerate(FOUR)
        for member in [
            (f"{key}.jpg", picture(name)),
            (f"{key}.a.cls", name.encode()),
            (f"{key}.b.cls", name.encode()),
        ]
    ]
    root = put(tmp_path / "mine", {"a.tar": files})
    assert conversion(capsys, f"wds:{root}", tmp_path / "out", "--hold-out", "0")[0] == 0
    assert sorted(seen(tmp_path / "out").values()) == ["cat", "cat", "dog", "dog"]


def test_tars_of_a_source_are_read_one_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dotted, plain = pairs(LABELLED), pairs([("x", "cat"), ("y", "dog")])
    masks = sorted(pairs(FOUR) + [(f"{key}.outline.png", picture("cat", "PNG")) for key, _ in FOUR])
    mixed = put(tmp_path / "mixed", {"a.tar": plain, "b.tar": dotted, "c.tar": masks})
    for arguments in ((f"wds:{mixed}", tmp_path / "out"), ("index", mixed)):
        code, output = conversion(capsys, *arguments)
        assert (
            code == 1
            and "b.tar" in output
            and "c.tar" in output
            and "make a dataset of each" in output
        ), output
    # What has no dots, or a sample of each key alone, may lie beside either.
    fits = put(
        tmp_path / "fits",
        {"a.tar": plain, "b.tar": dotted, "c.tar": pairs([("cat.9", "cat"), ("dog.9", "dog")])},
    )
    told = f"would see {2 + stock(fits / 'c.tar')} in these {len(LABELLED) + 2}"
    for out, arguments in (
        (tmp_path / "out", (f"wds:{fits}", tmp_path / "out", "--hold-out", "0")),
        (fits, ("index", fits)),
    ):
        code, output = conversion(capsys, *arguments)
        assert code == 0 and told in output, output
        assert sorted(seen(out).values()) == ["cat"] * 5 + ["dog"] * 5
    assert {"cat.9", "dog.9", "x"} < {*seen(fits)}


def test_dots_in_compressed_tars_and_members_that_lie_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = pairs(LABELLED)
    apart = files[::2] + files[1::2]
    for name, members in (("a.tar.gz", files), ("b.tgz", apart), ("c.tar", apart)):
        root = put(tmp_path / name.replace(".", "-"), {name: members})
        code, output = conversion(capsys, root, tmp_path / f"out-{name}", "--hold-out", "0")
        assert code == 0 and "its names have dots" in output, output
        assert sorted(seen(tmp_path / f"out-{name}").values()) == ["cat"] * 3 + ["dog"] * 3
    code, output = conversion(capsys, "index", tmp_path / "c-tar")
    assert code == 1 and "the members of 'cat.0' do not lie side by side" in output


def test_an_image_without_its_label_among_dots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [member for member in pairs(LABELLED) if member[0] != "cat.1.cls"]
    root = put(tmp_path / "mine", {"a.tar": files})
    for out, arguments in (
        (tmp_path / "out", (f"wds:{root}", tmp_path / "out", "--hold-out", "0")),
        (root, ("index", root)),
    ):
        code, output = conversion(capsys, *arguments)
        assert code == 1 and "a.tar: cat.1: no .cls or .json member with a label" in output, output
        code, output = conversion(capsys, *arguments, "--max-bad", "0.2")
        assert code == 0, output
        assert sorted(seen(out).values()) == ["cat"] * 2 + ["dog"] * 3


@pytest.mark.parametrize("odd", ["0.1", "0.5x b", "0.2024-01-05"])
def test_an_image_without_a_label_is_no_field_of_another(
    odd: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(
        tmp_path / "mine",
        {"a.tar": [*pairs(FOUR)[:2], (f"{odd}.jpg", picture("dog")), *pairs(FOUR)[2:]]},
    )
    for arguments in ((f"wds:{root}", tmp_path / "out"), ("index", root)):
        code, output = conversion(capsys, *arguments)
        assert code == 1 and f"a.tar: {odd}: no .cls or .json member with a label" in output, output


# Samples that hold anything.


def spoken(samples: Iterable[str], *kinds: str) -> Files:
    return [(f"{key}.{kind}", f"{key} {kind}".encode()) for key in samples for kind in kinds]


ANYTHING: dict[str, tuple[Files, dict[str, list[str]], str]] = {
    "sounds and texts": (
        spoken(["a.0", "a.1", "b.0"], "flac", "txt"),
        {key: ["flac", "txt"] for key in ("a.0", "a.1", "b.0")},
        "would see 2 in these 3",
    ),
    "sounds with blanks": (
        spoken(["a 1.5 live", "a 1.7 live"], "flac"),
        {"a 1.5 live": ["flac"], "a 1.7 live": ["flac"]},
        "would see 1 in these 2",
    ),
    "texts of some": (
        spoken([f"a.{n}" for n in range(3)], "flac", "json")
        + spoken(["a.3"], "flac", "json", "txt"),
        {f"a.{n}": ["flac", "json"] + ["txt"] * (n == 3) for n in range(4)},
        "would see 1 in these 4",
    ),
    "frames": (
        spoken(["a"], "0.npy", "1.npy", "json") + spoken(["b"], "0.npy", "json"),
        {"a": ["0.npy", "1.npy", "json"], "b": ["0.npy", "json"]},
        "as in stock webdataset, which makes 2 samples; "
        "were the dots part of the names, it would be 5",
    ),
    "fields": (
        spoken(["a", "b"], "left.npy", "right.npy", "text.json.gz"),
        {key: ["left.npy", "right.npy", "text.json.gz"] for key in "ab"},
        "",
    ),
}


@pytest.mark.parametrize("kind", ANYTHING)
def test_dots_in_samples_that_hold_anything(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, fields, told = ANYTHING[kind]
    root = put(tmp_path / "mine", {"a.tar": files})
    code, output = conversion(capsys, "index", root, "--any")
    assert code == 0 and told in output, output
    assert ("its names have dots" in output) == bool(told)
    (loaded,) = SampleLoader(str(root), len(fields), epochs=1, workers=0)
    found = dict(zip(loaded.keys, loaded.fields, strict=True))
    assert found == {
        key: {kind: f"{key} {kind}".encode() for kind in kinds} for key, kinds in fields.items()
    }
    assert wds_train(["verify", str(root)]) == 0


# Labels.


@pytest.mark.parametrize(
    ("extension", "text", "value"),
    [
        ("json", '{"label": 3.0}', 3.0),
        ("json", '{"class": 3.5}', 3.5),
        ("json", '{"label": null}', None),
        ("json", '{"label": -1, "cls": 4}', -1),
        ("json", '{"category": ""}', ""),
        ("json", '{"label": ["dog"]}', "dog"),
        ("cls", "3.0", 3.0),
        ("cls", "-1.0", -1.0),
        ("cls", "[7]", 7),
        ("cls", "1e5", b"1e5"),
        ("cls", "NaN", b"NaN"),
        ("cls", "007", b"007"),
        ("label.txt", '"dog"', "dog"),
    ],
)
def test_labels_are_handed_on_as_they_are(
    extension: str, text: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sources agree on what is a number, and what is no label."""
    handed: list[object] = []
    monkeypatch.setattr(
        "wds_train.conversion.sources.tar_samples.label_text",
        lambda value: handed.append(value) or "one",
    )
    (sample,) = gather(Member(f"0.{name}", "file", 0, 0, 9) for name in ("jpg", extension))
    assert (sample.label(lambda *_: text.encode()), handed) == ("one", [value])
    assert type(handed[0]) is type(value)


def test_a_json_without_a_label_beside_another_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        each
        for key, name in FOUR
        for each in (
            (f"{key}.jpg", picture(name)),
            (f"{key}.json", b'{"width": 8}'),
            (f"{key}.class", name.encode()),
        )
    ]
    root = put(tmp_path / "mine", {"a.tar": files})
    for out, arguments in (
        (tmp_path / "out", (f"wds:{root}", tmp_path / "out", "--hold-out", "0")),
        (root, ("index", root)),
    ):
        assert conversion(capsys, *arguments)[0] == 0
        assert sorted(seen(out).values()) == ["cat", "cat", "dog", "dog"]


WRITTEN = {
    "with a fraction": ("cls", ("3.0", "4.0"), ["3", "4"]),
    "JSON with a fraction": ("json", ('{"label": 3.0}', '{"label": 4}'), ["3", "4"]),
    "an object in .cls": ("cls", ('{"label": "cat"}', '{"label": "dog"}'), ["cat", "dog"]),
    "a list of one": ("cls", ('["cat"]', '[\n "dog"]'), ["cat", "dog"]),
    "blanks": ("cls", (" cat\n", "dog"), ["cat", "dog"]),
    "decomposed letters": ("cls", ("cafe\u0301", "dog"), ["caf\u00e9", "dog"]),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_labels_as_they_are_written(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extension, texts, classes = WRITTEN[kind]
    files = [
        each
        for n, text in enumerate(texts)
        for each in ((f"{n}.jpg", picture(CLASSES[n])), (f"{n}.{extension}", text.encode()))
    ]
    root = put(tmp_path / "mine", {"a.tar": files})
    assert conversion(capsys, f"wds:{root}", tmp_path / "out", "--hold-out", "0")[0] == 0
    assert conversion(capsys, "index", root)[0] == 0
    for out in (tmp_path / "out", root):
        made = Dataset.open(str(out))
        assert [entry.id for entry in made.manifest.classes] == classes
        assert sorted(made.split("train").index.label.tolist()) == [0, 1]
        assert wds_train(["verify", str(out)]) == 0
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["source"] == "webdataset, indexed in place"


TWO_LABELS = {
    "numbers": (("cls", "3"), ("json", '{"label": 5}'), "0 is 3, and 5 by its .json"),
    "a name": (("cls", "3"), ("class", "cat"), "0 is 3, and cat by its .class"),
    "JSON first": (("label", "5"), ("json", '{"class": "cat"}'), "0 is cat, and 5 by its .label"),
    "the same": (("cls", "3"), ("json", '{"label": 3}'), ""),
    "none": (("cls", "3"), ("json", '{"width": 3}'), ""),
}


@pytest.mark.parametrize("kind", TWO_LABELS)
def test_which_of_two_labels_is_used_is_said(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *labels, told = TWO_LABELS[kind]
    files = [("0.jpg", picture("cat")), *((f"0.{name}", text.encode()) for name, text in labels)]
    files += [
        ("1.jpg", picture("dog")),
        *((f"1.{name}", b"7") for name, _ in labels if name != "json"),
    ]
    root = put(
        tmp_path / "mine",
        {"a.tar": [*files, *([("1.json", b'{"label": 7}')] if kind == "JSON first" else [])]},
    )
    for arguments in ((f"wds:{root}", tmp_path / "out", "--hold-out", "0"), ("index", root)):
        code, output = conversion(capsys, *arguments)
        assert (
            code == 0 and ("samples have two labels" in output) == bool(told) and told in output
        ), output


@pytest.mark.parametrize("extension", ["bmp", "tif", "gif"])
def test_images_of_other_formats_are_named(
    extension: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = {"tif": "TIFF"}.get(extension, extension.upper())
    files = [
        (name, picture("cat", kind) if name.endswith(extension) else data)
        for name, data in pairs(FOUR, extension)
    ]
    root = put(tmp_path / "mine", {"a.tar": files})
    code, output = conversion(capsys, f"wds:{root}", tmp_path / "out")
    assert (
        code == 1 and f"not an image that shards hold (.{extension}); --reencode takes it" in output
    ), output
    assert (
        conversion(capsys, f"wds:{root}", tmp_path / "out", "--reencode", "--hold-out", "0")[0] == 0
    )
    assert Dataset.open(str(tmp_path / "out")).manifest.split("train").samples == 4


def test_test_images_without_labels_are_no_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = pairs(FOUR)
    root = put(tmp_path / "mine", {"train-0.tar": files, "test-0.tar": files[::2]})
    for out, arguments in (
        (tmp_path / "out", (f"wds:{root}", tmp_path / "out", "--hold-out", "0")),
        (root, ("index", root)),
    ):
        code, output = conversion(capsys, *arguments)
        assert code == 0 and "a test image without a label" in output, output
        assert [*Dataset.open(str(out)).manifest.splits] == ["train"]
        assert sorted(seen(out).values()) == ["cat", "cat", "dog", "dog"]


def test_what_a_mac_leaves_is_no_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It lies between the members of a sample, and so in the bytes that are read of it."""
    files = [each for name, data in pairs(FOUR) for each in ((f"._{name}", b"x"), (name, data))]
    root = put(tmp_path / "mine", {"a.tar": files})
    assert conversion(capsys, "index", root)[0] == 0
    assert wds_train(["verify", str(root)]) == 0
    (loaded,) = SampleLoader(str(root), 4, epochs=1, workers=0)
    assert [sorted(fields) for fields in loaded.fields] == [["cls", "jpg"]] * 4


SEVERAL = {
    "cls": b'["cat", "dog"]',
    "json": b'{"label": [0, 1, 0]}',
    "label.cls": b"[0, 1]",
    "label": b'["dog", "cat", "cow"]',
}


@pytest.mark.parametrize("extension", SEVERAL)
def test_several_labels_refuse_the_tar(
    extension: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = extension.rpartition(".")[2]
    files = [
        *pairs(FOUR, label=kind),
        ("9.jpg", picture("dog")),
        (f"9.{extension}", SEVERAL[extension]),
    ]
    root = put(tmp_path / "mine", {"a.tar": files})
    for arguments in ((f"wds:{root}", tmp_path / "out"), ("index", root)):
        code, output = conversion(capsys, *arguments, "--max-bad", "0.5")
        assert code == 1 and "9: its label is [" in output and "which are several" in output, output
        assert "left out" not in output and "a.tar" in output
    assert not (root / "manifest.json").exists()


# Captions.

URLS = [f"https://example.com/{n}.jpg" for n in range(4)]


def crawled(root: Path) -> Path:
    """As img2dataset writes them: a .jpg, its caption and its facts, and a table for each tar."""
    files = []
    for n, (_, name) in enumerate(FOUR):
        known = {
            "url": URLS[n],
            "caption": f"a photo of my {name}",
            "key": f"{n:09d}",
            "status": "success",
            "width": 8,
        }
        files += [(f"{n:09d}.jpg", picture(name)), (f"{n:09d}.json", json.dumps(known).encode())]
        files += [(f"{n:09d}.txt", known["caption"].encode())]
    put(root, {"00000.tar": files})
    (root / "00000_stats.json").write_text('{"count": 4}')
    return root


def captioned(texts: list[str]) -> Files:
    return [
        each
        for n, text in enumerate(texts)
        for each in ((f"{n}.jpg", picture(CLASSES[n % 2])), (f"{n}.txt", text.encode()))
    ]


def test_captions_of_a_crawl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = crawled(tmp_path / "mine")
    for arguments in ((f"wds:{root}", tmp_path / "out"), ("index", root)):
        code, output = conversion(capsys, *arguments)
        assert code == 1 and "none of 4 samples has a label" in output, output
        assert (
            "the .json members have the fields url, caption, key, status, width, "
            "and none of label, cls" in output
        )
        assert "the .txt beside an image is its caption" in output and "KEY.cls" in output
        assert f"wds-train shards index {root} --any" in output
    assert conversion(capsys, "index", root, "--any")[0] == 0
    (loaded,) = SampleLoader(str(root), 4, epochs=1, workers=0)
    assert {fields["txt"] for fields in loaded.fields} == {
        b"a photo of my cat",
        b"a photo of my dog",
    }


CAPTIONS = {
    "few": (
        captioned([f"a {name} on the {n}th mat" for n, (_, name) in enumerate(FOUR)]),
        "these are captions",
    ),
    "many": (captioned([f"photo {n}" for n in range(24)]), "these are no classes"),
    "boxes": (captioned([f"0 0.5 0.5 0.{n} 0.2\n" for n in range(6)]), "these are captions"),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_a_caption_is_no_class(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, told = CAPTIONS[kind]
    root = put(tmp_path / "mine", {"a.tar": files})
    code, output = conversion(capsys, f"wds:{root}", tmp_path / "out")
    assert code == 1 and told in output, output


def test_a_text_is_a_label_in_all_tars_or_in_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, labels = (
        captioned(["cat", "dog", "cat", "dog"]),
        [(f"l{name}", data) for name, data in pairs(FOUR)],
    )
    root = put(tmp_path / "texts first", {"a.tar": texts, "b.tar": labels})
    code, output = conversion(capsys, f"wds:{root}", tmp_path / "out")
    assert (
        code == 1
        and "a.tar has labels in .txt members alone" in output
        and "b.tar in others" in output
    ), output
    root = put(tmp_path / "labels first", {"a.tar": labels, "b.tar": texts})
    code, output = conversion(capsys, f"wds:{root}", tmp_path / "out")
    assert code == 1 and "b.tar: 0: no .cls or .json member with a label" in output, output
    beside = put(
        tmp_path / "beside",
        {"a.tar": [*texts, ("dataset.json", b'{"label": "x"}'), ("notes.cls", b"x")]},
    )
    assert (
        conversion(
            capsys, f"wds:{beside}", tmp_path / "out", "--hold-out", "0", "--max-bad", "0.5"
        )[0]
        == 0
    )
    assert sorted(seen(tmp_path / "out").values()) == ["cat", "cat", "dog", "dog"]


# Folders of classes in a tar.

FOLDERS: dict[str, tuple[dict[str, list[str]], dict[str, list[str]]]] = {
    "classes": (
        {"a.tar": ["cat/1.jpg", "cat/2.x.jpg", "dog/1.jpg"]},
        {"train": ["cat", "cat", "dog"]},
    ),
    "compressed": (
        {"a.tar.gz": ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg"]},
        {"train": ["cat", "cat", "dog"]},
    ),
    "splits": (
        {"a.tar": ["train/cat/1.jpg", "train/dog/1.png", "val/cat/1.jpg", "val/dog/1.jpg"]},
        {"train": ["cat", "dog"], "val": ["cat", "dog"]},
    ),
    "wrapped, with a page": (
        {"a.tar": ["./mine/cat/1.JPEG", "./mine/dog/1.jpg", "./mine/README.txt"]},
        {"train": ["cat", "dog"]},
    ),
    "two parts": (
        {"part-1.tar": ["cat/1.jpg", "dog/1.jpg"], "part-2.tar": ["cat/2.jpg", "dog/2.jpg"]},
        {"train": ["cat", "cat", "dog", "dog"]},
    ),
    "a tar for each split": (
        {"train.tar": ["cat/1.jpg", "dog/1.jpg"], "test.tgz": ["cat/1.jpg", "dog/2.jpg"]},
        {"train": ["cat", "dog"], "test": ["cat", "dog"]},
    ),
    "a tar for each split, doubled": (
        {
            "train.tar": ["train/cat/1.jpg", "train/dog/1.jpg"],
            "val.tar": ["./val/cat/1.jpg", "./val/dog/2.jpg"],
        },
        {"train": ["cat", "dog"], "val": ["cat", "dog"]},
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_classes(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are read as folders on a disk are."""
    tars, splits = FOLDERS[kind]
    files = {
        tar: [
            (name, picture("cat" if "cat" in name else "dog", "PNG" if ".png" in name else "JPEG"))
            for name in names
        ]
        for tar, names in tars.items()
    }
    root = put(tmp_path / "mine", files)
    code, output = conversion(capsys, root, tmp_path / "out", "--hold-out", "0")
    assert code == 0, output
    assert {*Dataset.open(str(tmp_path / "out")).manifest.splits} == {*splits}
    for split, names in splits.items():
        assert sorted(seen(tmp_path / "out", split).values()) == names
    (only, *_) = tars
    if len(tars) == 1:
        assert conversion(capsys, root / only, tmp_path / "again", "--hold-out", "0")[0] == 0
        assert (
            Dataset.open(str(tmp_path / "again")).fingerprint
            == Dataset.open(str(tmp_path / "out")).fingerprint
        )
    before, after = (tmp_path / "out" / "manifest.json").read_bytes(), root / only
    os.utime(after, (1, 1))  # another tar, as far as can be told
    code, output = conversion(capsys, root, tmp_path / "out", "--hold-out", "0")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert code == 2 and "complete already" not in output, output


NO_FOLDERS: dict[str, Files] = {
    "labels": [("cat/1.jpg", b"x"), ("cat/1.cls", b"0")],
    "JSON first": [("cat/1.json", b"x"), ("cat/1.jpg", b"0")],
    "texts": [("cat/1.png", b"x"), ("cat/1.txt", b"0")],
    "no folders": [("1.jpg", b"x"), ("2.jpg", b"x")],
    "samples as folders": [("1/image.jpg", b"x"), ("1/label.cls", b"0")],
    "no images": [("cat/1.flac", b"x")],
}


@pytest.mark.parametrize("kind", NO_FOLDERS)
def test_no_folders_of_classes(kind: str, tmp_path: Path) -> None:
    tar = put(tmp_path / "mine", {"a.tar": NO_FOLDERS[kind]}) / "a.tar"
    assert folder_files({tar: tar}) == ({}, [])


@pytest.mark.parametrize("table", ["labels.csv", "mine/metadata.TSV", "train/metadata.jsonl"])
def test_a_table_beside_folders_in_a_tar(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        ("part_a/1.jpg", picture("cat")),
        ("part_b/1.jpg", picture("dog")),
        (table, b"file,label\n"),
    ]
    root = put(tmp_path / "mine", {"a.tar": files})
    code, output = conversion(capsys, root, tmp_path / "out")
    assert code == 1 and f"say their splits, {table}, which is not read inside a tar" in output, (
        output
    )


@pytest.mark.parametrize(
    ("tars", "told"),
    [
        (
            {"a.tar": ["1.jpg", "2.jpg"]},
            "none of 2 samples has a label: there is no .cls or .json member with one; write",
        ),
        (
            {"a.tar": ["cat/1.jpg", "dog/1.jpg"]},
            "if the folders cat, dog are the classes, unpack the tars",
        ),
        (
            {"cat.tar": ["1.jpg"], "dog.tar": ["1.jpg"]},
            "if each tar is a class, unpack each into a folder of its name",
        ),
    ],
)
def test_images_alone_are_not_indexed(
    tars: dict[str, list[str]], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(
        tmp_path / "mine",
        {tar: [(name, picture("cat")) for name in names] for tar, names in tars.items()},
    )
    code, output = conversion(capsys, "index", root)
    assert code == 1 and told in output, output


def test_no_image_gets_the_label_of_another(tmp_path: Path) -> None:
    """Whatever the names are: a sample has the label of its own name, or is refused."""
    words = ["cat", "dog", "0", "12", "5x 001", "b ", "v1", "old", "IMG", "(1)", "...", "mask"]
    for seed in range(2_000):
        draw = random.Random(seed)
        image, label = draw.choice(
            [("jpg", "cls"), ("JPG", "json"), ("image.jpg", "label.cls"), ("png", "png.json")]
        )
        stems = {
            ".".join(draw.choices(words, k=draw.randint(1, 3))).lstrip(".")
            for _ in range(draw.randint(2, 6))
        }
        names = [
            f"{draw.choice(['', 'a.b/'])}{stem}"
            for stem in draw.sample(sorted(stems), len(stems))
            if stem
        ]
        members = [
            Member(f"{name}.{kind}", "file", 0, n, 9)
            for n, name in enumerate(names)
            for kind in (image, label)
        ]
        found = 0
        for sample in gather(members, Keys().choose("a.tar", members)):
            with contextlib.suppress(DataError):
                text = sample.label(lambda offset, _: b'{"label": %d}' % offset)
                assert sample.image() and sample.image().data_offset == int(text), (seed, names)
                found += 1
        if not any("IMG" in name or "mask" in name for name in names):
            assert found == len(names), (seed, names)


# What lies beside the tars that are read.


@pytest.mark.parametrize("name", ["val.TAR", "val.Tar", "val.TAR.GZ", "val.Tgz"])
def test_tars_in_any_case_are_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "mine", {"train.tar": pairs(FOUR), "val.tar": pairs(FOUR[:2])})
    data = (root / "val.tar").read_bytes()
    (root / "val.tar").unlink()
    packed = name.lower().endswith("gz")
    (root / name).write_bytes(gzip.compress(data) if packed else data)
    assert conversion(capsys, root, tmp_path / "out")[0] == 0
    assert sorted(seen(tmp_path / "out", "val").values()) == ["cat", "dog"]
    code, output = conversion(capsys, "index", root)
    if packed:
        assert code == 1 and f"holds {name}, compressed, which cannot be indexed" in output, output
    else:
        assert code == 0 and sorted(seen(root, "val").values()) == ["cat", "dog"], output
        assert wds_train(["verify", str(root)]) == 0


UNREAD = [
    "val.tar.xz",
    "val.TAR.BZ2",
    "val.tar.zst",
    "val.tbz2",
    "val.zip",
    "val.7z",
    "val.tar.gz.aa",
    "val.tar.001",
]


@pytest.mark.parametrize("name", UNREAD)
def test_archives_that_are_not_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "mine", {"train.tar": pairs(FOUR)})
    alone = tmp_path / "alone"
    for folder in (root / "more", alone):
        folder.mkdir()
        (folder / name).write_bytes(b"x")
    for arguments, place in (
        ((root, tmp_path / "out"), f"more/{name}"),
        (("index", root), f"more/{name}"),
        ((alone, tmp_path / "out"), name),
        ((alone / name, tmp_path / "out"), name),
        (("index", alone), name),
    ):
        code, output = conversion(capsys, *arguments)
        assert (
            code == 1 and f" holds {place}, which cannot be read as it is; unpack each" in output
        ), output


LISTS: dict[str, str] = {
    "train.txt": "cat/1\ncat/2\n",
    "test.txt": "",
    "splits.json": '{"train": ["cat/1.jpg"], "test": ["cat/2.jpg"]}',
    "train.lst": "1\t0\tcat/1.jpg\n",
    "labels.csv": "file,label\n1.jpg,cat\n",
    "index.txt": "1 cat/1.jpg\n2 dog/2.jpg\n",
    "meta.json": '[{"file": "my 2.jpg", "set": "val"}]',
}
NO_LISTS = {
    "README.txt": "Photos of 1 cat and 2 dogs, v1.2\n",
    "LICENSE.txt": "1. CC BY\n",
    "info.json": '{"n": 4}',
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", [*LISTS, *NO_LISTS])
def test_lists_of_class_folders(
    name: str, inside: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{name}/{n}.jpg" for name in CLASSES for n in ("1", "my 2")]
    files = [(each, picture(each[:3])) for each in names]
    text = {**LISTS, **NO_LISTS}[name].encode()
    root = put(
        tmp_path / "mine", {"data.tar": [*files, (f"meta/{name}", text)] if inside else files}
    )
    if not inside:
        (root / name).write_bytes(text)
    code, output = conversion(capsys, root, tmp_path / "out")
    where = "inside a tar" if inside else "beside a tar of class folders"
    if name in LISTS:
        assert code == 1 and f"{name}, which is not read {where}; unpack the tar" in output, output
    else:
        assert code == 0, output


# What a label may not be.


def labelled(*texts: str, extension: str = "cls") -> Files:
    """A sample with each label, in the colours of both classes by turns."""
    return [
        each
        for n, text in enumerate(texts)
        for each in ((f"{n}.jpg", picture(CLASSES[n % 2])), (f"{n}.{extension}", text.encode()))
    ]


BAD_LABELS = {
    "cut JSON": (
        labelled('{"label": "cat"}', '{"label": "do', '"dog"', extension="json"),
        "1: its .json is no JSON",
    ),
    "a word in .json": (
        labelled('{"label": "cat"}', "dog", '"dog"', extension="json"),
        "1: its .json is no JSON",
    ),
    "cut JSON in .cls": (
        labelled('{"label": "cat"}', '{"label": "do', "dog"),
        "1: its .cls is no JSON",
    ),
    "two numbers": (labelled("1", "0 1"), "its label is '0 1', which are several"),
    "numbers with commas": (labelled("cat", "3, 5,7"), "its label is '3, 5,7', which are several"),
    "one of each class": (
        labelled("1.0 0.0", "0.0 1.0"),
        "its label is '1.0 0.0', which are several",
    ),
    "numbers in a JSON text": (
        labelled('{"label": "0 1"}', extension="json"),
        "its label is '0 1', which are several",
    ),
    "an exponent": (
        labelled("1e5", "2"),
        "holds the label 1e5, which is no whole number of up to 19 digits",
    ),
    "31 digits": (labelled("1" * 31, "2"), f"holds the label {'1' * 31}, which is no whole number"),
    "exponents beside none": (
        labelled("1e5", "-", "2E-5"),
        "holds the label 1e5, which is no whole number",
    ),
    "one name": (labelled("cat", "cat"), "know one label, 'cat': there is nothing to tell apart"),
    "one number": (labelled("7", "7"), "know one label, '7': there is nothing to tell apart"),
    "one name and none": (
        labelled("cat", ""),
        "know one label, 'cat': there is nothing to tell apart",
    ),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_labels_that_are_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, told = BAD_LABELS[kind]
    root = put(tmp_path / "mine", {"a.tar": files})
    for arguments in ((f"wds:{root}", tmp_path / "out", "--hold-out", "0"), ("index", root)):
        code, output = conversion(capsys, *arguments)
        assert code in (1, 2) and told in output, output
        assert "--label-column" not in output and not (root / "manifest.json").exists()


@pytest.mark.parametrize(
    ("extension", "none"), [("cls", ""), ("cls", " \n"), ("json", '{"label": ""}'), ("label", "")]
)
def test_an_empty_label_is_none(
    extension: str, none: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f'{{"label": "{name}"}}' if extension == "json" else name for name in CLASSES]
    root = put(tmp_path / "mine", {"a.tar": labelled(*texts, none, extension=extension)})
    for out, arguments in (
        (tmp_path / "out", (f"wds:{root}", tmp_path / "out", "--hold-out", "0")),
        (root, ("index", root)),
    ):
        code, output = conversion(capsys, *arguments)
        assert code == 0 and "1 without a label (empty) are left out" in output, output
        assert sorted(seen(out).values()) == ["cat", "dog"]


@pytest.mark.parametrize("other", ["fine.cls", "coarse.cls", "x.y.cls"])
def test_a_second_label_of_another_name_is_said(
    other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        each
        for key, name in FOUR
        for each in (*pairs([(key, name)]), (f"{key}.{other}", b"a kind of " + name.encode()))
    ]
    root = put(tmp_path / "mine", {"a.tar": files})
    for arguments in ((f"wds:{root}", tmp_path / "out", "--hold-out", "0"), ("index", root)):
        code, output = conversion(capsys, *arguments)
        told = (
            f"samples have two labels: 0 is cat, and a kind of cat by its .{other}, "
            "which is not read"
        )
        assert code == 0 and told in output, output


@pytest.mark.parametrize("form", ["a.{n}", "{name}.{n}", "IMG 2.5x {n}{name}"])
def test_two_images_of_a_key_with_dots_are_named(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        each
        for n, name in enumerate(CLASSES)
        for key in [form.format(n=n, name=name)]
        for each in (*pairs([(key, name)]), (f"{key}.png", picture(name, "PNG")))
    ]
    key = form.format(n=0, name="cat")
    root = put(tmp_path / "mine", {"a.tar": files})
    for arguments in ((f"wds:{root}", tmp_path / "out", "--hold-out", "0"), ("index", root)):
        code, output = conversion(capsys, *arguments)
        told = f"it holds 2 images, which share the key {key}: {key}.jpg, {key}.png; rename"
        assert code == 1 and told in output, output


# Flags, and lists of classes.


@pytest.mark.parametrize(
    "flag",
    ["--table FILE", "--label-column x", "--image-column x", "--split-column x", "--class-level 1"],
)
def test_flags_that_tars_do_not_heed(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text("file,label\n")
    name, value = flag.replace("FILE", str(tmp_path / "t.csv")).split()
    root = put(tmp_path / "mine", {"a.tar": pairs(FOUR)})
    for arguments in ((root, tmp_path / "out"), ("index", root)):
        code, output = conversion(capsys, *arguments, name, value)
        assert code == 2 and name in output and "leave it out" in output, output


@pytest.mark.parametrize(
    "flag", ["--source wds", "--hold-out 0.2", "--group x", "--resize-shorter 256", "--reencode"]
)
def test_flags_that_an_index_does_not_heed(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "mine", {"a.tar": pairs(FOUR)})
    code, output = conversion(capsys, "index", root, *flag.split())
    assert code == 2 and f"{flag.split(maxsplit=1)[0]} says nothing of tars" in output, output


@pytest.mark.parametrize("name", ["classes.txt", "labels.txt", "classes.json"])
def test_a_list_of_classes_beside_tars(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "mine", {"a.tar": labelled("0", "1")})
    text = '["dog", "cat", "cow"]' if name.endswith("json") else "dog\ncat\ncow\n"
    (root / name).write_text(text)
    for out, arguments in (
        (tmp_path / "out", (f"wds:{root}", tmp_path / "out", "--hold-out", "0")),
        (root, ("index", root)),
    ):
        code, output = conversion(capsys, *arguments)
        assert code == 0 and f"the classes are those of {name}" in output, output
        assert [entry.id for entry in Dataset.open(str(out)).manifest.classes] == [
            "dog",
            "cat",
            "cow",
        ]


def test_samples_of_anything_can_be_inspected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "mine", {"a.tar": pairs(FOUR)})
    assert conversion(capsys, "index", root, "--any")[0] == 0
    for nulls in ({}, {"repeats": None}, {"repeats": None, "understood": None}):
        report = json.loads((root / "report.json").read_text()) | nulls
        assert {*_checked(report)} == {"understood"} - {
            name for name in nulls if name == "understood"
        }
    assert wds_train(["inspect", str(root)]) == 0
    assert "cannot be read" not in "".join(capsys.readouterr())


# Splits that members say.


def said(*splits: str, field: str = "split") -> Files:
    """Samples whose .json says a split, too."""
    return [
        each
        for n, split in enumerate(splits)
        for each in (
            (f"{n}.jpg", picture(CLASSES[n % 2])),
            (f"{n}.json", json.dumps({"label": CLASSES[n % 2], field: split}).encode()),
        )
    ]


INNER_SPLITS: dict[str, tuple[str, Files, str]] = {
    "folders": (
        "a.tar",
        pairs([("train/1", "cat"), ("train/2", "dog"), ("test/1", "cat")]),
        "folders test, train",
    ),
    "folders, wrapped": (
        "a.tar",
        pairs([("x/training/1", "cat"), ("x/valid/1", "dog")]),
        "folders training, valid",
    ),
    "another than the tar's": (
        "val.tar",
        pairs([("train/1", "cat"), ("train/2", "dog")]),
        "folders train",
    ),
    "JSON": (
        "a.tar",
        said("train", "train", "test"),
        "2: its .json says split 'test', and its tar is read as train",
    ),
    "JSON, another word": (
        "a.tar",
        said("Training", "PublicTest", field="Usage"),
        "1: its .json says Usage 'PublicTest'",
    ),
    "JSON in a tar of train": ("train-0.tar", said("val", "val"), "0: its .json says split 'val'"),
}


@pytest.mark.parametrize("kind", INNER_SPLITS)
def test_splits_inside_a_tar(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, files, told = INNER_SPLITS[kind]
    tars = {name: files} if name != "val.tar" else {"train.tar": pairs(FOUR), name: files}
    root = put(tmp_path / "mine", tars)
    for arguments in ((f"wds:{root}", tmp_path / "out"), ("index", root)):
        code, output = conversion(capsys, *arguments)
        assert code in (1, 2) and told in output and "make a tar of each split" in output, output


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (said("train", "train"), ""),
        (said("fold1", "fold2"), "the field split of the .json members, 'fold1' in 0, is not read"),
        (pairs([("train/1", "cat"), ("train/2", "dog")]), ""),
    ],
)
def test_splits_inside_a_tar_that_fit(
    files: Files, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "mine", {"a.tar": files})
    for out, arguments in (
        (tmp_path / "out", (f"wds:{root}", tmp_path / "out", "--hold-out", "0")),
        (root, ("index", root)),
    ):
        code, output = conversion(capsys, *arguments)
        assert code == 0 and told in output, output
        assert sorted(seen(out).values()) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("tars", "counts"),
    [
        ({"a.tar": pairs(FOUR)}, {"train": {"cat": 2, "dog": 2}}),
        (
            {"train.tar": pairs(FOUR[:3]), "val.tar": pairs(FOUR)},
            {"train": {"cat": 2, "dog": 1}, "val": {"cat": 2, "dog": 2}},
        ),
        ({"a.tar": [*pairs(LABELLED), ("README.md", b"x")]}, {"train": {"cat": 3, "dog": 3}}),
    ],
)
def test_what_an_index_understood(
    tars: dict[str, Files],
    counts: dict[str, dict[str, int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = put(tmp_path / "mine", tars)
    code, dry = conversion(capsys, "index", root, "--dry-run")
    assert code == 0 and not (root / "manifest.json").exists()
    lines = [
        "  layout    WebDataset tars, indexed in place",
        "  labels    the members .cls, .json and their like",
    ]
    lines += [
        f"  counts    {split}: " + ", ".join(f"{name} {count}" for name, count in of_split.items())
        for split, of_split in counts.items()
    ]
    assert "\n".join(lines) in dry, dry
    code, output = conversion(capsys, "index", root)
    assert code == 0 and "\n".join(lines) in output, output
    told = json.loads((root / "report.json").read_text())["understood"]
    assert told["classes"] == counts
    assert told["splits"] == {split: sum(of_split.values()) for split, of_split in counts.items()}
    assert told["doubtful"] == [] and len(told["ignored"]) == ("README.md" in str(tars))
