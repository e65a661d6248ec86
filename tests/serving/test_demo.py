"""`wds-train demo`: the page answers, and bad uploads end in a sentence.

Tests of the page are skipped unless `make demo` has installed its environment.
"""

import io
import json
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from visitors import PYTHON, Page, demo_command, free_port, leaks, served_page

from wds_train.cli import main
from wds_train.dataset.reader import Dataset
from wds_train.serving.classify import make_photo
from wds_train.serving.demo_page import find_interpreter

WITH_GRADIO = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"{PYTHON} is not there: make demo installs it"
)


@pytest.fixture(scope="module")
def page(served: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder, port = tmp_path_factory.mktemp("demo"), free_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WDS_HOME", str(folder / "home"))
        environment.setenv("TMPDIR", str(folder / "tmp"))
        (folder / "tmp").mkdir()
        with served_page(demo_command(served, port), folder, port) as (page, _):
            yield page
    log = (folder / "log").read_text()
    assert "classifier.py" not in log, log  # Gradio's own part tells its owner of forged requests
    assert "SystemExit" not in log, log
    assert not [*(folder / "tmp").glob("wds-demo-*")]  # nothing of a visitor's is kept


@WITH_GRADIO
def test_it_answers_as_predict_does(
    page: Page, served: str, digits: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_photo(digits.split("val"), 3).read()
    (tmp_path / "photo.png").write_bytes(data)
    assert main(["predict", served, str(tmp_path / "photo.png"), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)["top"]
    event = page.answer("photo.png", data)
    label, heat, note = event["output"]["data"]
    assert [entry["label"] for entry in label["confidences"]] == [entry["name"] for entry in ours]
    assert [entry["confidence"] for entry in label["confidences"]] == pytest.approx(
        [entry["probability"] for entry in ours], abs=1e-3
    )
    assert heat["path"] and "ms in the model" in note


@WITH_GRADIO
def test_it_begins_with_the_weights_that_eval_judged(
    page: Page, served: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", served, "--workers", "0", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    kind, top1 = report["members"][0]["weights"], report["top1"]
    assert (
        page.choice == f"{'EMA' if kind == 'ema' else kind}, epoch 2 (step 44), top-1 {top1:.2f} %"
    )


@WITH_GRADIO
def test_every_kept_checkpoint_answers(page: Page, digits: Dataset) -> None:
    path = page.upload("photo.png", make_photo(digits.split("val"), 0).read()).json()[0]
    image = {"path": path, "meta": {"_type": "gradio.FileData"}}
    assert page.learned is not None
    table = page.call(page.learned, [image])["output"]["data"][0]
    # A head, EMA and raw of the second epoch, and one of them of the first, which nobody calibrated.
    assert table.count("<tr>") == 1 + 3
    assert table.count("%, not calibrated") == 1


@WITH_GRADIO
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_a_phone_and_a_keyboard_are_enough(page: Page, tmp_path: Path) -> None:
    """Tab and Enter choose a validation image.

    Nothing is wider than a phone, and no other server is asked.
    """
    with Browser(tmp_path / "chromium") as browser:
        browser.open(page.url, 390, dark=True)
        until(browser, "document.querySelectorAll('.gallery-item').length == 8")
        for _ in range(20):
            browser.press("Tab", 9)
            if browser.evaluate("document.activeElement.className").startswith("gallery-item"):
                break
        browser.press("Enter", 13)
        until(browser, "document.body.innerText.includes('ms in the model')")
        assert browser.evaluate("document.documentElement.scrollWidth") == 390
        sent = [
            event["params"]["request"]["url"]
            for event in browser.events
            if "request" in event.get("params", {})
        ]
        assert {url.split("/")[2] for url in sent if url.startswith("http")} == {
            page.url.split("/")[2]
        }


def until(browser: Browser, condition: str) -> None:
    deadline = time.monotonic() + 120
    while not browser.evaluate(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)


def encoded(form: str, image: Image.Image | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    rng = np.random.default_rng(0)
    (image or Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))).save(
        out, form, **options
    )
    return out.getvalue()


def bomb() -> bytes:
    data = bytearray(encoded("PNG", Image.new("1", (8, 8))))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


HOSTILE = {
    "empty.jpg": b"",
    "text.txt": b"hello",
    "text.jpg": b"hello",
    "vector.svg": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
    "vector.jpg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "page.html": b"<script>alert(1)</script>",
    "cut.jpg": encoded("JPEG")[:700],
    "cut.png": encoded("PNG")[:700],
    "header.jpg": b"\xff\xd8\xff\xe0",
    "bomb.png": bomb(),
    "wide.png": encoded("PNG", Image.new("1", (1_000_000, 60))),
    "scan.tif": encoded("TIFF"),
    "icon.ico": encoded("ICO"),
    "paper.pdf": encoded("PDF"),
    "old.bmp": encoded("BMP"),
    "noise.webp": b"RIFF\x00\x00\x00\x00WEBP" + bytes(100),
    "archive.zip": b"PK\x03\x04" + bytes(1000),
    "large.jpg": bytes(21 << 20),
    "larger.jpg": bytes(100 << 20),
    "../../etc/passwd.jpg": b"x",
    "a" * 200 + ".jpg": b"x",
    "name\x1b[31m.jpg": b"x",
}
ODD = {
    "cmyk.jpg": encoded("JPEG", Image.new("CMYK", (50, 40))),
    "moving.gif": encoded("GIF", save_all=True, append_images=[Image.new("RGB", (60, 40))]),
    "wrong.png": encoded("JPEG"),
    "sixteen.png": encoded("PNG", Image.new("I;16", (40, 40))),
    "one.png": encoded("PNG", Image.new("RGB", (1, 1))),
}
FORGED = [
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    {"path": "app.json", "meta": {"_type": "gradio.FileData"}},
    {"path": "http://169.254.169.254/latest/meta-data", "meta": {"_type": "gradio.FileData"}},
    {"url": "data:image/png;base64,AAAA", "meta": {"_type": "gradio.FileData"}},
    {"path": None, "meta": {"_type": "gradio.FileData"}},
    {"nonsense": 1},
]


@WITH_GRADIO
@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_image_is_a_sentence(page: Page, name: str) -> None:
    event = page.answer(name, HOSTILE[name])
    text = json.dumps(event)
    assert not event["success"]
    assert not leaks(text), text
    assert "Traceback" not in text


@WITH_GRADIO
@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_answered(page: Page, name: str) -> None:
    assert page.answer(name, ODD[name])["success"]


@WITH_GRADIO
@pytest.mark.parametrize("number", range(len(FORGED)))
def test_forged_requests_reach_no_file(page: Page, number: int) -> None:
    event = page.ask(FORGED[number])
    assert not event["success"]
    assert not leaks(json.dumps(event).replace("/etc/passwd", "")), event
    assert page.answer("photo.jpg", encoded("JPEG"))["success"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--python", "/nowhere"], "--python /nowhere cannot be run"),
        ([], "has not both gradio and onnxruntime; `make demo`"),
    ],
)
def test_without_gradio_it_says_what_to_do(
    served: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["demo", served, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused_before_anything_is_made(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "nowhere.safetensors", "--port", str(port)]) == 2
    assert (
        f"--port {port} cannot be had (Address already in use); choose another"
        in capsys.readouterr().err
    )
    assert main(["demo", "nowhere.safetensors", "--port", "65536"]) == 2


def test_an_interpreter_is_found_from_where_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make demo` names its own by a relative path, and the page runs in another folder."""
    (tmp_path / "python").write_text("#!/bin/sh\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert find_interpreter("./python") == tmp_path / "python"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_interpreter("python") == tmp_path / "python"
