"""The same image in two splits, or in one under two classes.

It is found whatever the source, however often the conversion was interrupted.
"""

import contextlib
import hashlib
import io
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import tar_of
from PIL import Image

from wds_train.cli import main
from wds_train.conversion import repeats
from wds_train.conversion.conversion_report import report_json
from wds_train.conversion.image_policy import ImagePolicy
from wds_train.conversion.index_in_place import index_in_place, repeats_in_place, write_dataset
from wds_train.conversion.repeats import (
    Contradictions,
    Packed,
    Pair,
    Repeats,
    Shared,
    find_repeats,
    image_digest,
    repeat_lines,
)
from wds_train.conversion.sources.labels import classes_of, count_texts
from wds_train.dataset.manifest import ClassInfo
from wds_train.storage.local import LocalStore

Pairs = list[tuple[str, str, str, str]]


def png(colour: int) -> bytes:
    """An image whose bytes are those of its colour alone."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (colour % 256, colour // 256, 99)).save(out, "PNG")
    return out.getvalue()


def folder(root: Path, files: dict[str, int]) -> Path:
    """The images of these colours at these paths, without their suffix."""
    for name, colour in files.items():
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(colour))
    return root


def different(prefix: str, first: int, count: int = 3) -> dict[str, int]:
    """Images that are nowhere else, so that every class has some."""
    return {f"{prefix}/own{n}": first + n for n in range(count)}


EVERYWHERE = {
    name: colour
    for number, prefix in enumerate(
        f"{split}/{kind}" for split in ("train", "val", "test") for kind in ("cat", "dog")
    )
    for name, colour in different(prefix, 100 * number + 1000).items()
}


def shards(*arguments: object) -> int:
    """`wds-train shards` in this process."""
    return main(["shards", *map(str, arguments), "--processes", "1"])


def found(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())["repeats"]


def pairs_of(entry: dict[str, Any]) -> Pairs:
    return [
        (pair["key"], pair["class_id"], pair["twin"], pair["twin_class_id"])
        for pair in entry["pairs"]
    ]


def summary(content: dict[str, Any]) -> dict[str, tuple[int, int, Pairs]]:
    """Return `{"val in train": (images, of them of another class, pairs)}`.

    A contradiction of train has the key `train`.
    """
    shared = {
        f"{each['split']} in {each['within']}": (
            each["images"],
            each["other_class"],
            pairs_of(each),
        )
        for each in content["shared"]
    }
    return shared | {
        each["split"]: (each["images"], 0, pairs_of(each)) for each in content["contradictions"]
    }


CASES: dict[str, tuple[dict[str, int], dict[str, tuple[int, int, Pairs]]]] = {
    "none": ({}, {}),
    "repeated within a class": (
        {"train/cat/a": 1, "train/cat/b": 1, "val/dog/c": 2, "val/dog/d": 2},
        {},
    ),
    "one of val": (
        {"train/cat/a": 1, "val/cat/b": 1},
        {"val in train": (1, 0, [("cat/b", "cat", "cat/a", "cat")])},
    ),
    "of the same name": (
        {"train/dog/a": 1, "val/dog/a": 1},
        {"val in train": (1, 0, [("dog/a", "dog", "dog/a", "dog")])},
    ),
    "one of train, two of val": (
        {"train/cat/a": 1, "val/cat/b": 1, "val/cat/c": 1},
        {
            "val in train": (
                2,
                0,
                [("cat/b", "cat", "cat/a", "cat"), ("cat/c", "cat", "cat/a", "cat")],
            )
        },
    ),
    "two of train, one of val": (
        {"train/cat/a": 1, "train/cat/z": 1, "val/cat/b": 1},
        {"val in train": (1, 0, [("cat/b", "cat", "cat/a", "cat")])},
    ),
    "in all three": (
        {"train/cat/a": 1, "val/cat/b": 1, "test/cat/c": 1},
        {
            "val in train": (1, 0, [("cat/b", "cat", "cat/a", "cat")]),
            "test in train": (1, 0, [("cat/c", "cat", "cat/a", "cat")]),
            "test in val": (1, 0, [("cat/c", "cat", "cat/b", "cat")]),
        },
    ),
    "of another class": (
        {"train/cat/a": 1, "val/dog/b": 1},
        {"val in train": (1, 1, [("dog/b", "dog", "cat/a", "cat")])},
    ),
    "a twin of its own class is named": (
        {"train/cat/a": 1, "train/dog/b": 1, "val/dog/c": 1},
        {
            "val in train": (1, 0, [("dog/c", "dog", "dog/b", "dog")]),
            "train": (1, 0, [("cat/a", "cat", "dog/b", "dog")]),
        },
    ),
    "two labels": (
        {"val/cat/a": 1, "val/dog/b": 1, "val/dog/c": 1},
        {"val": (1, 0, [("cat/a", "cat", "dog/b", "dog")])},
    ),
    "two images of two labels": (
        {"train/cat/a": 1, "train/dog/b": 1, "train/cat/c": 2, "train/dog/d": 2},
        {"train": (2, 0, [("cat/a", "cat", "dog/b", "dog"), ("cat/c", "cat", "dog/d", "dog")])},
    ),
}


@pytest.mark.parametrize("whole_index", [1_000_000, 1], ids=["one index", "an index a shard"])
@pytest.mark.parametrize("case", CASES)
def test_repeats_are_counted_and_named(case: str, whole_index: int, tmp_path: Path) -> None:
    files, expected = CASES[case]
    source = folder(tmp_path / "source", EVERYWHERE | files)
    out = tmp_path / "out"
    assert shards(source, out, "--shard-mb", "0.01", "--whole-index", whole_index) == 0
    assert summary(found(out)) == expected


def digit(kind: str, colour: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(out, kind)
    return out.getvalue()


def test_what_is_left_out_moves_no_name(tmp_path: Path) -> None:
    """The digests stand in the order of the source's rows, also of those that become no samples."""
    source = folder(
        tmp_path / "source",
        EVERYWHERE | {"train/cat/m": 1, "train/dog/m": 2, "val/cat/x": 1, "val/dog/y": 2},
    )
    for name in ("train/cat/a", "train/cat/l", "train/dog/n", "val/cat/a", "val/dog/z"):
        (source / f"{name}.png").write_bytes(b"no image")
    assert shards(source, tmp_path / "out", "--max-bad", ".9") == 0
    expected = [("cat/x", "cat", "cat/m", "cat"), ("dog/y", "dog", "dog/m", "dog")]
    assert summary(found(tmp_path / "out")) == {"val in train": (2, 0, expected)}


def test_what_is_encoded_anew_is_compared_as_it_is_packed(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", EVERYWHERE)
    (source / "train/cat/a.bmp").write_bytes(digit("BMP", 200))
    (source / "val/cat/b.tif").write_bytes(digit("TIFF", 200))
    (source / "val/cat/c.png").write_bytes(digit("PNG", 200))  # the same pixels, in other bytes
    assert shards(source, tmp_path / "out", "--reencode") == 0
    assert summary(found(tmp_path / "out")) == {
        "val in train": (1, 0, [("cat/b", "cat", "cat/a", "cat")])
    }


@pytest.mark.parametrize(
    "spool_gb", ["1", "0.000003"], ids=["in the spool", "larger than the spool"]
)
def test_streams(tmp_path: Path, spool_gb: str) -> None:
    (tmp_path / "source").mkdir()
    for split, start in (("train", 0), ("validation", 10)):
        images = [
            {"bytes": png(colour), "path": f"{colour}.png"} for colour in range(start, start + 12)
        ]
        table = pa.table({"image": images, "label": [n % 3 for n in range(start, start + 12)]})
        pq.write_table(table, tmp_path / "source" / f"{split}-00000-of-00001.parquet")
    out, spool = (
        tmp_path / "out",
        ("--spool", tmp_path / "spool", "--spool-gb", spool_gb, "--shard-mb", "0.005"),
    )
    assert shards(tmp_path / "source", out, *spool) == 0
    (entry,) = found(out)["shared"]
    assert (entry["split"], entry["within"], entry["images"], entry["other_class"]) == (
        "val",
        "train",
        2,
        0,
    )


def test_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without val, equal images may lie on both sides: the remedy is another choice of val."""
    files = {f"{kind}/{n}": 500 + n // 2 for n in range(40) for kind in ("cat",)} | different(
        "dog", 10, 20
    )
    assert shards(folder(tmp_path / "source", files), tmp_path / "out") == 0
    (entry,) = found(tmp_path / "out")["shared"]
    assert entry["images"] == len(entry["pairs"]) > 0
    for key, _, twin, _ in pairs_of(entry):
        assert files[key] == files[twin] and key != twin
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "byte for byte" in each]
    assert line.endswith("; --group keeps what belongs together on one side")


# Interruptions.


def test_killed_and_resumed_it_is_the_same_count(tmp_path: Path) -> None:
    files = EVERYWHERE | {
        f"{split}/cat/{n}": n for split in ("train", "val") for n in range(0, 300, len(split))
    }
    source = folder(tmp_path / "source", files)
    options = [source, "--shard-mb", "0.02"]
    assert shards(source, tmp_path / "whole", "--shard-mb", "0.02", "--whole-index", "90") == 0
    for kills in (1, 3):
        out, records = tmp_path / f"killed{kills}", 0
        command = [
            sys.executable,
            "-m",
            "shards.make_shards",
            *map(str, [options[0], out, *options[1:]]),
        ]
        for _ in range(kills):
            process = subprocess.Popen(
                [*command, "--whole-index", "90", "--processes", "1"], stderr=subprocess.DEVNULL
            )
            while process.poll() is None and len([*out.glob(".wip/*/*")]) <= records:
                time.sleep(0.002)
            process.kill()
            process.wait()
            records = len([*out.glob(".wip/*/*")])
        assert records and not (out / "manifest.json").exists(), "it was not killed in the middle"
        assert shards(source, out, "--shard-mb", "0.02", "--whole-index", "90") == 0
        assert (out / "report.json").read_bytes() == (
            tmp_path / "whole" / "report.json"
        ).read_bytes()
    assert summary(found(out)).keys() == {"val in train"}
    assert found(out)["shared"][0]["images"] == 20  # 0, 15, ..., 285


def test_a_record_of_before_is_made_again(tmp_path: Path) -> None:
    """A shard that was recorded without digests is made again, to the same bytes."""
    source = folder(tmp_path / "source", EVERYWHERE | {"train/cat/a": 1, "val/cat/b": 1})
    assert shards(source, tmp_path / "whole", "--shard-mb", "0.01") == 0
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(
            "wds_train.conversion.convert.Conversion.finish",
            lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        shards(source, out, "--shard-mb", "0.01")
    records = [*out.glob(".wip/*/*.parquet")]
    assert len(records) > 3
    for path in records:
        table = pq.read_table(path)
        facts = json.loads(table.schema.metadata[b"wds-train"])
        del facts["digests"]
        pq.write_table(table.replace_schema_metadata({"wds-train": json.dumps(facts)}), path)
    assert shards(source, out, "--shard-mb", "0.01") == 0
    for path in (tmp_path / "whole").rglob("*"):
        assert (
            path.is_dir()
            or path.read_bytes() == (out / path.relative_to(tmp_path / "whole")).read_bytes()
        )


# Tars that stay where they are.


def tars(root: Path, splits: dict[str, list[tuple[str, int, str]]]) -> Path:
    """A tar a split of (key, colour, label)."""
    root.mkdir()
    for split, samples in splits.items():
        members = []
        for key, colour, label in samples:
            members += [(f"{key}.png", png(colour)), (f"{key}.cls", label.encode())]
        (root / f"{split}-000000.tar").write_bytes(tar_of(members))
    return root


IN_PLACE: dict[
    str, tuple[dict[str, list[tuple[str, int, str]]], dict[str, tuple[int, int, Pairs]]]
] = {
    "none": (
        {"train": [("a", 1, "cat"), ("b", 2, "dog")], "val": [("c", 3, "cat"), ("d", 4, "dog")]},
        {},
    ),
    "val in train": (
        {"train": [("a", 1, "cat"), ("b", 2, "dog")], "val": [("c", 2, "dog"), ("d", 1, "dog")]},
        {"val in train": (2, 1, [("c", "dog", "b", "dog"), ("d", "dog", "a", "cat")])},
    ),
    "two labels": (
        {"train": [("a", 1, "cat"), ("b", 1, "dog"), ("c", 1, "dog")], "val": [("d", 4, "dog")]},
        {"train": (1, 0, [("a", "cat", "b", "dog")])},
    ),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_in_place(case: str, tmp_path: Path) -> None:
    content, expected = IN_PLACE[case]
    store = LocalStore(tars(tmp_path / "tars", content))
    splits, notes = index_in_place(store, ImagePolicy())
    classes = classes_of(
        count_texts(row["label"] for each in splits.values() for row in each.rows), "here"
    )
    for row in (row for each in splits.values() for row in each.rows):
        row["label"] = classes.numbers[row["label"]]
    twice = repeats_in_place(splits, classes.infos)
    report = report_json(notes, 0, {"repeats": asdict(twice)})
    write_dataset(store, splits, classes.infos, {}, report, overwrite=False)
    assert summary(found(tmp_path / "tars")) == expected


# What a person reads.


def lines_of(*entries: Shared | Contradictions, held_out: bool = False) -> list[str]:
    shared = tuple(each for each in entries if isinstance(each, Shared))
    return repeat_lines(
        Repeats(shared, tuple(e for e in entries if isinstance(e, Contradictions))),
        held_out=held_out,
    )


MANY = tuple(Pair(f"cat/{n}", "cat", f"cat/{n + 100}", "cat") for n in range(5))
OTHER = Pair("a", "cat", "b", "dog")
LINES = [
    (
        Shared("val", "train", 1, 0, MANY[:1]),
        False,
        "1 image of val is in train, too, byte for byte: cat/0 = cat/100; "
        "take them out of one of the two",
    ),
    (
        Shared("val", "train", 12, 0, MANY),
        True,
        "12 images of val are in train, too, byte for byte: "
        "cat/0 = cat/100, cat/1 = cat/101, cat/2 = cat/102, ...; "
        "--group keeps what belongs together on one side",
    ),
    (
        Shared("test", "val", 1200, 1100, (OTHER,)),
        False,
        "1,200 images of test are in val, too, byte for byte, 1,100 of them under another class: "
        "a (cat) = b (dog), ...; "
        "take them out of one of the two",
    ),
    (
        Shared("val", "train", 1, 1, (OTHER,)),
        False,
        "1 image of val is in train, too, byte for byte, under another class: a (cat) = b (dog); "
        "take them out of one of the two",
    ),
    (
        Shared("test", "train", 3, 0, MANY[:3]),
        True,
        "3 images of test are in train, too, byte for byte: "
        "cat/0 = cat/100, cat/1 = cat/101, cat/2 = cat/102; "
        "take them out of one of the two",
    ),
    (
        Contradictions("train", 1, (OTHER,)),
        True,
        "1 image of train is there under more than one class: a (cat) = b (dog); "
        "keep each under one",
    ),
]


@pytest.mark.parametrize(("entry", "held_out", "line"), LINES)
def test_the_lines(entry: Shared | Contradictions, held_out: bool, line: str) -> None:
    assert lines_of(entry, held_out=held_out) == [line]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    source = folder(tmp_path / "source", EVERYWHERE | {"train/cat/a": 1, "val/cat/b": 1})
    assert shards(source, tmp_path / "out") == 0
    return tmp_path / "out"


def replace_report(out: Path, content: Any) -> None:
    """Another report beside the shards, named by the manifest."""
    (out / "report.json").write_text(content if isinstance(content, str) else json.dumps(content))
    manifest = json.loads((out / "manifest.json").read_text())
    data = (out / "report.json").read_bytes()
    manifest["report"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (out / "manifest.json").write_text(json.dumps(manifest))


def inspected(out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any], str]:
    """Return the output of `inspect`: text, JSON, and stderr."""
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert main(["inspect", str(out), "--json"]) == 0
    answer = capsys.readouterr()
    return text, json.loads(answer.out), answer.err


def test_inspect_says_it(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, facts, err = inspected(dataset, capsys)
    line = (
        "1 image of val is in train, too, byte for byte: cat/b = cat/a; "
        "take them out of one of the two"
    )
    assert text.splitlines()[-1] == line
    assert facts["repeats"] == found(dataset)
    assert summary(facts["repeats"]) == {"val in train": (1, 0, [("cat/b", "cat", "cat/a", "cat")])}
    assert not err


def test_inspect_says_what_was_understood(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((dataset / "report.json").read_text())
    understood = {
        "layout": "images in class folders",
        "labels": "the folders' names",
        "splits": {"train": 7},
    }
    replace_report(dataset, report | {"understood": understood})
    text, facts, _ = inspected(dataset, capsys)
    assert re.search(r"\nlayout +images in class folders\nlabels +the folders' names\n", text)
    assert facts["understood"] == understood


ODD = {
    "of before": ({"reencoded": 0, "samples": []}, ""),
    "no JSON": ("{", "cannot be read"),
    "a list": ([], "the report is [], not an object"),
    "no repeats": ({"repeats": 3}, "repeats is 3, not an object"),
    "an odd count": (
        {
            "repeats": {
                "shared": [],
                "contradictions": [{"split": "val", "images": "many", "pairs": []}],
            }
        },
        "repeats.contradictions[0].images is 'many', not a whole number",
    ),
    "odd words": ({"understood": {"layout": 7}}, "understood.layout is 7, not a text"),
    "too deep": ("[" * 100_000, "cannot be read"),
}


@pytest.mark.parametrize("case", ODD)
def test_inspect_needs_no_report(
    dataset: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, told = ODD[case]
    replace_report(dataset, content)
    text, facts, err = inspected(dataset, capsys)
    assert facts["repeats"] is None and facts["understood"] is None
    assert "byte for byte" not in text and "samples" in text
    assert told in err and (told == "") == (err == "")


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_inspect_of_a_damaged_report(
    dataset: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage == "gone":
        (dataset / "report.json").unlink()
    else:
        (dataset / "report.json").write_text("{}")
    _, facts, err = inspected(dataset, capsys)
    assert facts["repeats"] is None
    assert f"{dataset}/report.json cannot be read, so what the conversion saw is not known: " in err


# The comparison itself.

CLASSES = tuple(ClassInfo(str(n), str(n)) for n in range(3))


def brute_force(images: dict[str, list[tuple[int, int]]]) -> dict[str, tuple[int, int, Pairs]]:
    """`summary` of images given as (digest, label), by comparing each with each."""
    expected: dict[str, tuple[int, int, Pairs]] = {}

    def named(split: str, row: int) -> tuple[str, str]:
        return f"{split}{row}", str(images[split][row][1])

    for split, within in (("val", "train"), ("test", "train"), ("test", "val")):
        count, other, pairs = 0, 0, []
        for row, (digest, label) in enumerate(images[split]):
            twins = [n for n, twin in enumerate(images[within]) if twin[0] == digest != 0]
            of_class = [n for n in twins if images[within][n][1] == label]
            if twins:
                count, other = count + 1, other + (not of_class)
                best = (
                    of_class[0] if of_class else min(twins, key=lambda n: (images[within][n][1], n))
                )
                pairs.append((*named(split, row), *named(within, best)))
        if count:
            expected[f"{split} in {within}"] = (count, other, pairs)
    for split, samples in images.items():
        first: dict[int, dict[int, int]] = defaultdict(dict)
        for row, (digest, label) in enumerate(samples):
            if digest:
                first[digest].setdefault(label, row)
        torn = [rows for rows in first.values() if len(rows) > 1]
        lowest = [
            (rows[min(rows)], row)
            for rows in torn
            for label, row in rows.items()
            if label != min(rows)
        ]
        if torn:
            expected[split] = (
                len(torn),
                0,
                [(*named(split, a), *named(split, b)) for a, b in sorted(lowest)],
            )
    return expected


@pytest.mark.parametrize(
    "at_once", [1 << 22, 60, 7], ids=["in one pass", "in a few passes", "in many"]
)
@pytest.mark.parametrize("seed", range(12))
def test_as_brute_force(seed: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "AT_ONCE", at_once)
    draw = np.random.default_rng(seed)
    images, tables, packed = {}, {}, []
    for split in ("train", "val", "test"):
        size = int(draw.integers(0, 80))
        digests = draw.integers(0, [3, 40, 400][seed % 3], size).astype(np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        labels = draw.integers(0, len(CLASSES), size).astype(np.int32)
        images[split] = [*zip(digests.tolist(), labels.tolist(), strict=True)]
        keys = pa.array([f"{split}{row}" for row in range(size)], pa.string())
        tables[split] = pa.table({"key": keys, "label": pa.array(labels)})
        rows = draw.permutation(size)
        for start, stop in pairwise([0, *sorted(draw.integers(0, size + 1, 3).tolist()), size]):
            packed.append(Packed(split, rows[start:stop], digests[rows[start:stop]]))
    twice = find_repeats(tables, packed, CLASSES)
    assert summary(json.loads(json.dumps(asdict(twice)))) == brute_force(images)


def test_at_most_a_thousand_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "AT_ONCE", 500)
    keys, labels = [f"{n:04d}" for n in range(1500)], np.zeros(1500, np.int32)
    tables = dict.fromkeys(("train", "val"), pa.table({"key": keys, "label": labels}))
    digests = np.arange(1, 1501, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    packed = [Packed(split, np.arange(1500), digests) for split in tables]
    (entry,) = find_repeats(tables, packed, CLASSES).shared
    assert entry.images == 1500
    assert [pair.key for pair in entry.pairs] == keys[:1000] == [pair.twin for pair in entry.pairs]


@pytest.mark.parametrize("other", [b"", b"a", b"b" * 10, b"a" * 9 + b"b", b"ba" * 5])
def test_the_digest_tells_images_apart(other: bytes) -> None:
    assert 0 < image_digest(other) < 1 << 64
    assert image_digest(other) != image_digest(b"a" * 10)
