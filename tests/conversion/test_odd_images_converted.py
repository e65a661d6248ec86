"""Odd images on their whole way, from a folder through shards to the loader.

Each image's colour says its class.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import odd_images as odd
import pytest
from PIL import Image

from wds_train import TrainLoader
from wds_train.cli import main
from wds_train.dataset.reader import Dataset
from wds_train.images.decode import decode_whole

SHAPE = (odd.HEIGHT, odd.WIDTH)
LIGHT = (40, 90, 140, 190)  # of the images of four classes


def colour_of(light: int) -> np.ndarray:
    return np.full((*SHAPE, 3), light, np.uint8)


def in_bits(light: int, bits: int, channels: int = 1) -> np.ndarray:
    return np.full((*SHAPE, channels), round(light * ((1 << bits) - 1) / 255), np.uint16)


def with_alpha(light: int) -> np.ndarray:
    """A square of that light; around it a hidden one, which is that of another class."""
    pixels = np.full((*SHAPE, 2), (255 - light, 0), np.uint8)
    pixels[4:-4, 8:-8] = (light, 255)
    return pixels


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


# What lies in the folder, how the class's light is found in it, and the flags that it needs.
KINDS = {
    "12 bits that a PNG says": (
        lambda n: odd.png(in_bits(n, 12), odd.chunk(b"sBIT", b"\x0c")),
        ".png",
        (),
    ),
    "12 bits that a PNG says, colours": (
        lambda n: odd.png(in_bits(n, 12, 3), odd.chunk(b"sBIT", b"\x0c\x0c\x0c")),
        ".png",
        (),
    ),
    "16 bits": (lambda n: odd.png(in_bits(n, 16)), ".png", ()),
    "12 bits that a TIFF says": (
        lambda n: odd.tiff(in_bits(n, 12), {281: 4095}),
        ".tif",
        ("--reencode",),
    ),
    "F of 0 to 1": (
        lambda n: odd.tiff(np.full((*SHAPE, 1), n / 255, np.float32), {341: 1.0}),
        ".tiff",
        ("--reencode",),
    ),
    "I up to a million": (
        lambda n: odd.tiff(np.full((*SHAPE, 1), n * 10**6 // 255, np.int32), {341: 10**6}),
        ".tif",
        ("--reencode",),
    ),
    "transparency": (lambda n: odd.png(with_alpha(n)), ".png", ()),
    "transparency, called .jpg": (lambda n: odd.png(with_alpha(n)), ".jpg", ()),
    "transparency of WebP": (
        lambda n: saved(
            Image.fromarray(with_alpha(n)).convert("RGBA"), "WEBP", lossless=True, exact=True
        ),
        ".webp",
        (),
    ),
    "transparency made smaller": (
        lambda n: odd.png(with_alpha(n)),
        ".png",
        ("--resize-shorter", "12"),
    ),
    "lossless grey": (lambda n: odd.jpeg((n,), 0xC3), ".jpg", ()),
    "odd sampling": (lambda n: odd.jpeg((n, 128, 128), sampling=(0x14, 0x11, 0x11)), ".jpg", ()),
    "progressive four colours": (lambda n: odd.jpeg((n, n, n, 255), 0xC2), ".jpg", ()),
    "2 MB of text": (
        lambda n: odd.png(colour_of(n), odd.text_chunk("zTXt", b"a", b"text " * 400_000)),
        ".png",
        (),
    ),
    "2 MB of profile": (lambda n: odd.png(colour_of(n), odd.colour_profile(2 << 20)), ".png", ()),
}


def tree(root: Path, make, suffix: str, each: int = 4) -> Path:
    """Four classes, each of the images that `make` makes of its light."""
    for label, light in enumerate(LIGHT):
        folder = root / f"light-{label}"
        folder.mkdir(parents=True)
        for number in range(each):
            (folder / f"{number}{suffix}").write_bytes(make(light))
    return root


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("name", KINDS)
def test_what_is_converted_is_what_is_trained_on(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, suffix, flags = KINDS[name]
    root, out = tree(tmp_path / "mine", make, suffix), str(tmp_path / "out")
    assert main(["shards", str(root), out, "--hold-out", "0", *flags]) == 0
    assert main(["verify", out]) == 0
    seen = []
    for batch in TrainLoader(out, 4, epochs=1, size=16, scale=(0.9, 1.0), workers=0, max_bad=0):
        centres = batch.images[:, 8, 8].numpy().astype(int)
        right = np.array(LIGHT)[batch.labels.numpy()][:, None]
        assert np.abs(centres - right).max() <= 2
        seen += batch.labels.tolist()
    assert sorted(seen) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    if "transparency" in name:
        reader = Dataset.open(out).split("train")
        for number in range(len(reader)):
            assert decode_whole(reader.image(number))[0, 0].min() >= 253


def notes(out: str) -> list[tuple[str, str]]:
    report = json.loads((Path(out) / "report.json").read_text())
    return [(row["what"], row["cause"]) for row in report["samples"]]


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("12 bits that a PNG says", "mode I;16, 0 to 4095 (sBIT) stretched to 8 bits"),
        ("12 bits that a TIFF says", "0 to 4095 (MaxSampleValue) stretched to 8 bits"),
        ("F of 0 to 1", "0 to 1 (SMaxSampleValue) stretched to 8 bits"),
        ("transparency", "mode LA, transparent pixels, laid on white"),
        ("transparency of WebP", "mode RGBA, transparent pixels, laid on white"),
    ],
)
def test_what_was_done_is_noted_and_counted(
    name: str, cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, suffix, flags = KINDS[name]
    root, out = tree(tmp_path / "mine", make, suffix), str(tmp_path / "out")
    assert main(["shards", str(root), out, "--hold-out", "0", *flags]) == 0
    assert notes(out) == [("altered", cause)] * 16
    assert json.loads((Path(out) / "report.json").read_text())["reencoded"] == 16
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if cause in line]
    assert line.startswith("altered   train") and " and 15 more: " in line


def test_what_is_kept_is_noted_beside_what_is_altered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = (
        tree(tmp_path / "mine", lambda n: odd.png(in_bits(n, 16)), ".png"),
        str(tmp_path / "out"),
    )
    (root / "light-0" / "see-through.png").write_bytes(odd.png(with_alpha(40)))
    assert main(["shards", str(root), out, "--hold-out", "0"]) == 0
    kept = ("kept", "mode I;16, 16 bits a sample, the upper 8 kept")
    assert notes(out) == [("altered", "mode LA, transparent pixels, laid on white"), *[kept] * 16]
    output = capsys.readouterr().out
    assert " and 15 more: mode I;16, 16 bits a sample, the upper 8 kept" in output


REFUSED = {
    "PNG": (lambda n: odd.png(in_bits(n, 12)), ".png", ()),
    "PNG, colours": (lambda n: odd.png(in_bits(n, 12, 3)), ".png", ()),
    "PNG made smaller": (lambda n: odd.png(in_bits(n, 12)), ".png", ("--resize-shorter", "12")),
    "TIFF": (lambda n: odd.tiff(in_bits(n, 12)), ".tif", ("--reencode",)),
    "TIFF F": (
        lambda n: odd.tiff(np.full((*SHAPE, 1), n / 255, np.float32)),
        ".tif",
        ("--reencode",),
    ),
    "TIFF I": (lambda n: odd.tiff(np.full((*SHAPE, 1), n, np.int32)), ".tif", ("--reencode",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_without_a_range_stop_a_conversion(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, suffix, flags = REFUSED[name]
    root, out = tree(tmp_path / "mine", make, suffix), str(tmp_path / "out")
    assert main(["shards", str(root), out, "--hold-out", "0", *flags]) == 1
    output = capsys.readouterr()
    assert "does not say which number is white; convert it to 8 bits" in output.out + output.err
    assert not (Path(out) / "manifest.json").exists()
    # One among good ones is named, and can be left out.
    for path in root.glob("*/[12].*"):
        path.unlink()
        path.with_suffix(".jpg").write_bytes(odd.jpeg((100,)))
    other = str(tmp_path / "other")
    assert main(["shards", str(root), other, "--hold-out", "0", "--max-bad", "0.5", *flags]) == 0
    assert [what for what, _ in notes(other)] == ["left out"] * 8


def test_tars_that_stay_cannot_be_encoded_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loader would leave transparency away; tars that are indexed must be read as they are."""
    good = tree(tmp_path / "good", lambda n: odd.png(colour_of(n)), ".png")
    out = tmp_path / "tars"
    assert main(["shards", str(good), str(out), "--hold-out", "0"]) == 0
    tar = tmp_path / "plain" / "train-0.tar"
    tar.parent.mkdir()
    tar.write_bytes((out / "train" / "shard-000000.tar").read_bytes())
    assert main(["shards", "index", str(tar.parent)]) == 0
    see_through, bits = (
        odd.png(with_alpha(40)),
        odd.png(in_bits(40, 12), odd.chunk(b"sBIT", b"\x0c")),
    )
    with tarfile.open(tar, "a") as file:
        for name, data in (
            ("a.png", see_through),
            ("a.cls", b"0"),
            ("b.png", bits),
            ("b.cls", b"0"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    capsys.readouterr()
    assert main(["shards", "index", str(tar.parent), "--overwrite"]) == 1
    output = capsys.readouterr()
    text = output.out + output.err
    assert (
        "a: it has to be encoded anew (mode LA, transparent pixels, laid on white), "
        "and tars stay as they are" in text
    )
    assert "b: it has to be encoded anew (mode I;16, 0 to 4095 (sBIT) stretched to 8 bits)" in text
    assert "wds-train shards wds:PATH" in text


def test_a_conversion_of_odd_images_ends_in_the_same_bytes_however_it_is_made(
    tmp_path: Path,
) -> None:
    root = tree(tmp_path / "mine", lambda n: odd.png(with_alpha(n)), ".png")
    prints = []
    for processes in ("1", "2"):
        out = str(tmp_path / f"out-{processes}")
        flags = ("--hold-out", "0", "--shard-mb", "0.02", "--processes", processes)
        assert main(["shards", str(root), out, *flags]) == 0
        prints.append(Dataset.open(out).manifest.fingerprint)
        assert main(["shards", str(root), out, *flags]) == 0  # it is complete
    assert prints[0] == prints[1]
