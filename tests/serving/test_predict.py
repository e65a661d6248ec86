"""`wds-train predict`: its answers are compared with the evaluation's own logits.

It takes every kind of image that a person names, and bad ones.
"""

import csv
import http.server
import io
import json
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answers import answer
from numpy.typing import NDArray
from PIL import Image

from wds_train.dataset.manifest import ClassInfo
from wds_train.dataset.reader import Dataset
from wds_train.errors import DataError
from wds_train.evaluation.calibrate import calibrate
from wds_train.evaluation.evaluate import Member, View, choose_weights
from wds_train.loader.pipeline import Pipeline
from wds_train.loader.plan import EvalPlan
from wds_train.models.calibration import probabilities
from wds_train.serving.classify import make_photo
from wds_train.serving.download import download, is_public
from wds_train.serving.prediction import Prediction, csv_line
from wds_train.storage.open import open_store

CPU = torch.device("cpu")


def logits_of(run: str, dataset: Dataset, tta: str | None = None) -> NDArray[np.float32]:
    """Return the logits of the validation split, read by the loader that evaluates."""
    weights = choose_weights(run, "best", None)
    member, split = Member(weights, View.of(weights.recipe, tta), CPU), dataset.split("val")
    loader = Pipeline(split, EvalPlan(len(split), 60), member.view.transform, 0)
    return torch.cat([member.logits(batch.images) for batch in loader]).numpy()


@pytest.fixture(scope="module")
def images(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first validation samples as files, some of them in a subfolder."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "z" / "deep").mkdir(parents=True)
    for number in range(40):
        photo = make_photo(digits.split("val"), number)
        (folder / ("z/deep" if number >= 36 else ".") / f"{number:02d}.png").write_bytes(
            photo.read()
        )
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("tta", [None, "flip"])
def test_a_folder_is_answered_as_the_evaluation_would(
    served: str, digits: Dataset, images: Path, capsys: pytest.CaptureFixture[str], tta: str | None
) -> None:
    code, out, err = answer(
        capsys, "predict", served, images, "--json", *(("--tta", tta) if tta else ())
    )
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [Path(row["image"]).name for row in rows] == [
        f"{number:02d}.png" for number in range(40)
    ]
    logits = logits_of(served, digits)
    expected = probabilities(
        logits_of(served, digits, tta), calibrate(logits, labels(digits)).temperature
    )
    for row, shares in zip(rows, expected, strict=False):
        best = np.argsort(-shares, kind="stable")[:5]
        assert [entry["id"] for entry in row["top"]] == [
            digits.manifest.classes[label].id for label in best
        ]
        assert [entry["probability"] for entry in row["top"]] == pytest.approx(
            shares[best].tolist(), abs=1e-5
        )
        assert row["sure"] == (shares.max() >= 0.5)


def labels(dataset: Dataset) -> NDArray[np.int64]:
    return dataset.split("val").index.label.astype(np.int64)


def test_an_exported_file_answers_as_its_run(
    served: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It does so without the run's dataset, too.

    The calibration is in the file, and in the file that is kept for the next time.
    """
    monkeypatch.chdir(tmp_path)
    file = "digits-run.safetensors"
    kept = [answer(capsys, "predict", served, images, "--csv") for _ in range(2)]
    assert (
        answer(capsys, "export", served, "--best", choose_weights(served, "best", None).kind)[0]
        == 0
    )
    exported = answer(capsys, "predict", file, images, "--csv")
    assert kept[0] == kept[1] == exported
    rows = list(csv.DictReader(io.StringIO(exported[1])))
    assert [*rows[0]][:6] == ["image", "error", "sure", "id1", "name1", "probability1"]
    assert len(rows) == 40


def test_a_cell_of_csv_may_hold_anything() -> None:
    cells = ["a\nb.jpg", "c\rd", 'say "hi", 猫', "=1+1"]
    assert [*csv.reader(io.StringIO(csv_line(cells), newline=""))] == [cells]


def test_bad_images_are_named_and_the_others_answered(
    served: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (images / "00.png").read_bytes()
    hostile = {
        "empty.png": b"",
        "text.jpg": b"this is text, not an image",
        "cut.png": good[: len(good) // 2],
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "bomb.png": bomb(),
    }
    for name, data in hostile.items():
        (tmp_path / name).write_bytes(data)
    Image.new("CMYK", (30, 20)).save(tmp_path / "cmyk.jpg")
    (tmp_path / "good.gif").write_bytes(gif())
    code, out, err = answer(
        capsys, "predict", served, tmp_path, images / "00.png", tmp_path / "nowhere.jpg", "--json"
    )
    rows = {Path(row["image"]).name: row for row in map(json.loads, out.splitlines())}
    assert (code, err) == (
        1,
        f"wds-train: {len(hostile) + 1} of {len(rows)} images could not be used",
    )
    assert {name for name, row in rows.items() if "error" in row} == {*hostile, "nowhere.jpg"}
    assert rows["nowhere.jpg"]["error"] == "there is no such file"
    assert "pixels" in rows["bomb.png"]["error"]
    assert all(len(rows[name]["top"]) == 5 for name in ("00.png", "cmyk.jpg", "good.gif"))
    long = "x" * 300  # as of an image that was pasted as its address
    assert answer(capsys, "predict", served, long, "~nobody-is-called-so/x.jpg")[1] == (
        f"{long}: it cannot be read: File name too long\n~nobody-is-called-so/x.jpg: there is no such file"
    )
    code, out, _ = answer(capsys, "predict", served, tmp_path / "empty.png", images / "00.png")
    assert code == 1
    assert out.startswith(f"{tmp_path}/empty.png: it is empty (0 bytes)\n{images}/00.png")


@pytest.mark.parametrize(
    "found", [{"error": "it is empty"}, {"top": ((ClassInfo("é", "é"), 0.9),)}]
)
def test_a_name_that_cannot_be_printed_is_printed_all_the_same(found: dict[str, Any]) -> None:
    answered = Prediction("a\n\x1b[31m\udcff.jpg", **found)
    for text in (answered.to_lines({"é": "é"}).partition("\n")[0], answered.to_csv()):
        assert text.startswith(r"a\n\x1b[31m\udcff.jpg")
    assert json.loads(answered.to_json().encode())["image"] == answered.image


def bomb() -> bytes:
    """Return a PNG of 60,000 by 60,000 pixels in a few kilobytes: only its header is right."""
    out = io.BytesIO()
    Image.new("1", (8, 8)).save(out, "PNG")
    data = bytearray(out.getvalue())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def gif() -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


@pytest.mark.parametrize(
    "case",
    [
        (["/nowhere", "x.jpg"], 1, "there is no run at /nowhere"),
        (["/nowhere.safetensors", "x.jpg"], 1, "there is no file /nowhere.safetensors"),
        (["SERVED", "EMPTY"], 1, "EMPTY holds no image (.jpg"),
        (["SERVED", "x.jpg", "--json", "--csv"], 2, "not allowed with"),
        (["SERVED"], 2, "the following arguments are required: IMAGE"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    served: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: tuple[list[str], int, str],
) -> None:
    arguments, code, message = case
    named = {"SERVED": served, "EMPTY": str(tmp_path)}
    got, out, err = answer(capsys, "predict", *(named.get(each, each) for each in arguments))
    assert (got, out) == (code, "")
    assert message.replace("EMPTY", str(tmp_path)) in err
    assert "Traceback" not in err


def test_objects_and_prefixes_on_s3(
    served: str, images: Path, s3_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(s3_url)
    for key in ("photos/00.png", "photos/b/01.png", "photos-2/02.png"):
        store.write(key, (images / Path(key).name).read_bytes())
    for named, found in (
        ("photos", ["photos/00.png", "photos/b/01.png"]),
        ("photos/00.png", ["photos/00.png"]),
    ):
        code, out, err = answer(capsys, "predict", served, f"{s3_url}/{named}", "--json")
        assert (code, err) == (0, "")
        assert [json.loads(line)["image"] for line in out.splitlines()] == [
            f"{s3_url}/{key}" for key in found
        ]
    code, _, err = answer(capsys, "predict", served, f"{s3_url}/none")
    assert (code, f"there is no object {s3_url}/none" in err) == (1, True)


def test_a_temperature_makes_overconfident_answers_honest() -> None:
    """It is judged on the half that did not fit it: logits of a known truth, times three."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(4000, 10)).astype(np.float32) * 2
    shares = probabilities(truth, 1.0)
    drawn = (shares.cumsum(axis=1) > rng.random((4000, 1))).argmax(axis=1)
    found = calibrate(3 * truth, drawn)
    assert found.temperature == pytest.approx(3, rel=0.1)
    assert (found.fitted, found.judged) == (2000, 2000)
    assert found.error < 5 and found.error_raw > 15
    assert found.right_sure > 50 > found.right_unsure
    assert calibrate(truth[:1], drawn[:1]).fitted == 0


def test_a_temperature_that_helps_nobody_does_no_harm() -> None:
    """The samples that fit are all right, which asks for no doubt at all.

    Every second one of the others is wrong.
    """
    logits = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    found = calibrate(np.tile(logits, (30, 1)), np.tile(np.array([0, 1, 1, 1]), 30))
    assert (found.temperature, found.fitted) == (1.0, 60)
    assert found.error == found.error_raw


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1%eth0",
        "fd00::1",
        "::",
        "::ffff:127.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::1",
    ],
)
def test_private_addresses_are_refused(address: str) -> None:
    assert not is_public(address)


def test_public_addresses_are_allowed() -> None:
    assert all(map(is_public, ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")))


class _Pages(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, _, rest = self.path.strip("/").partition("/")
        if path == "to":
            self.send_response(302)
            self.send_header("Location", rest if "://" in rest else f"/{rest}")
            self.end_headers()
        elif path == "missing":
            self.send_error(404)
        elif path == "headers":  # more than a client takes, if it has the time
            self.send_response(200)
            for number in range(150):
                self.send_header(f"X-{number}", "x")
                self.flush_headers()
                time.sleep(0.01)
        elif path == "echo":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.path.encode())
        else:
            self.send_response(200)
            self.end_headers()
            for _ in range({"image": 1, "drip": 100, "large": 3}[path]):
                time.sleep(0.05 * (path == "drip"))
                self.wfile.write(b"x" * (1 << 20 if path == "large" else 10))
                self.wfile.flush()


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pages)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  (clients that have gone)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_download_follows_redirects(site: str) -> None:
    assert download(f"{site}/to/to/image", allowed=lambda _: True) == b"x" * 10


def test_an_address_may_be_written_as_people_see_it(site: str) -> None:
    found = download(f"{site}/echo/\u00c4 b%20c.jpg?d=\u732b&e=/", allowed=lambda _: True)
    assert found == b"/echo/%C3%84%20b%20c.jpg?d=%E7%8C%AB&e=/"


@pytest.mark.parametrize(
    ("path", "limits", "message"),
    [
        ("image", {}, "127.0.0.1 is at 127.0.0.1, which is no public address"),
        (
            "to/http://169.254.169.254/latest",
            {"allowed": lambda a: a != "169.254.169.254"},
            "no public address",
        ),
        ("to/file:///etc/passwd", {"allowed": lambda _: True}, "none of the form http://HOST"),
        ("to/to/to/to/to/to/to/image", {"allowed": lambda _: True}, "redirects more than 5 times"),
        ("drip", {"allowed": lambda _: True, "seconds": 0.4}, "did not come within 0.4 s"),
        ("headers", {"allowed": lambda _: True, "seconds": 0.4}, "did not come within 0.4 s"),
        ("large", {"allowed": lambda _: True, "most": 2 << 20}, "more than 2 MB"),
        ("missing", {"allowed": lambda _: True}, "the server answered 404"),
    ],
)
def test_a_download_has_limits(site: str, path: str, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        download(f"{site}/{path}", **limits)


def test_an_address_is_an_image_like_others(
    served: str, site: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = answer(capsys, "predict", served, f"{site}/image")
    assert code == 1
    assert out.startswith(f"{site}/image: 127.0.0.1 is at 127.0.0.1, which is no public address")
