"""What the best checkpoint gets right and wrong: as `wds-train eval` has it, and shown as text, whatever a class is called."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import answer
from browser import CHROMIUM, Browser
from pages import Page, page_of
from PIL import Image
from trainers import Job, Training

from wds_train.cli import main
from wds_train.dataset.reader import Dataset
from wds_train.errors import DataError
from wds_train.evaluation.calibrate import bin_confidence
from wds_train.evaluation.evaluate import spread

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on noise, of which nothing can be learned, in two classes, one with a script for a name. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    rng, lines = np.random.default_rng(0), ["image,label"]
    (folder / "images").mkdir()
    for i in range(120):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            folder / "images" / f"{i:03d}.png"
        )
        lines.append(f"{i:03d}.png,{(SCRIPT, 'b|c `d` [e](f)')[i % 2]}")
    (folder / "images" / "labels.csv").write_text("\n".join(lines) + "\n")
    assert main(["shards", str(folder / "images"), str(folder / "data"), "--hold-out", "0.3"]) == 0
    settings = (
        "schedule.epochs=1",
        "schedule.warmup_epochs=0",
        "mix.mixup=0",
        "batch=8",
        "optimizer.lr=0.01",
    )
    training = Training(
        Job(str(folder / "data"), str(folder / "run"), str(folder), settings=settings)
    )
    assert training.end() == 0, training.output
    assert re.search(r"report   \S+/runs/run-\w{6}/report.html", training.output)
    return folder


def test_its_findings_are_those_of_eval(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = trained / "data", trained / "run"
    code, out, err = answer(
        capsys, "eval", run, "--dataset", data, "--workers", 0, "--device", "cpu", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    page, _ = page_of(capsys, run, tmp_path)
    assert f"on all {found['samples']} validation images" in page.text
    assert f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %" in page.text
    matrix = page.tables["Confusion: true classes down, predicted ones across"]
    counts = np.array([[int(cell or 0) for cell in line[1:]] for line in matrix[1:]])
    assert counts.sum(axis=1).tolist() == [row["samples"] for row in found["classes"]]
    assert counts.diagonal().tolist() == [row["correct"] for row in found["classes"]]
    wrong = int(counts.sum() - counts.trace())
    assert wrong > 0
    pictures = [attributes for name, attributes in page.tags if name == "img"]
    assert len(pictures) == min(wrong, 24)
    assert {picture["alt"] for picture in pictures} <= {
        f"{a}, taken for {b}" for a in matrix[0] for b in matrix[0]
    }
    assert len(list(tmp_path.glob("mistake-*.jpg"))) == len(pictures)
    assert Image.open(tmp_path / "mistake-01.jpg").size == (112, 112)
    bins = page.tables["Calibration in figures"][1:]
    assert sum(int(line[2]) for line in bins) == found["samples"]


def test_a_class_named_like_a_script_is_shown_as_text(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, _ = page_of(capsys, trained / "run", tmp_path)
    assert SCRIPT in page.tables["Confusion: true classes down, predicted ones across"][0]
    assert "script" not in {name for name, _ in page.tags}
    markdown = (tmp_path / "report.md").read_text()
    assert "<script" not in markdown.replace("\\<script", "")
    assert "b\\|c \\`d\\` \\[e\\](f)" in markdown


def test_few_images_are_taken_evenly(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], digits: Dataset
) -> None:
    page, _ = page_of(capsys, trained / "run", tmp_path, "--images", 10)
    assert "on 10 (evenly taken) of the 36 validation images" in page.text
    assert sum(int(line[2]) for line in page.tables["Calibration in figures"][1:]) == 10
    split = digits.split("val")
    part = spread(split, 7)
    places = [split.index.key.to_pylist().index(key) for key in part.index.key.to_pylist()]
    assert (places[0], places[-1], len(places)) == (0, 359, 7)
    assert {*np.diff(places)} <= {59, 60}
    assert part.index.label.tolist() == split.index.label[places].tolist()
    assert spread(split, 360) is split


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda m: m["dataset"].update(url="/nowhere"),
            "could not be evaluated: there is no dataset at /nowhere",
        ),
        (
            lambda m: m["dataset"].update(fingerprint="0" * 64),
            "is another dataset now than the run was trained on",
        ),
        (
            lambda m: m["checkpoints"][-1]["object"].update(sha256="0" * 64),
            "could not be evaluated: .* is damaged",
        ),
    ],
)
def test_a_model_that_cannot_be_evaluated(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[dict[str, Any]], None],
    sentence: str,
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for part in ("ckpt", "metrics"):
        (run / part).symlink_to(trained / "run" / part)
    manifest = json.loads((trained / "run" / "manifest.json").read_text())
    spoil(manifest)
    (run / "manifest.json").write_text(json.dumps(manifest))
    page, said = page_of(capsys, run, tmp_path / "out")
    assert re.search(sentence, page.text)
    assert re.search(sentence, said)
    assert page.facts["epochs"][0] == "1 of 1"


def test_a_run_that_goes_on_meanwhile_is_told_as_it_is_after_the_evaluation(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Minutes pass, and the page would name weights of epochs that it has not reached."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    after = json.loads((run / "manifest.json").read_text())
    before = after | {"checkpoints": [], "metrics": [], "status": "running", "result": {}}
    (run / "manifest.json").write_text(json.dumps(before))

    def found(*_: object, **__: object) -> None:
        (run / "manifest.json").write_text(json.dumps(after))
        raise DataError("no matter")

    monkeypatch.setattr("wds_train.report.model_checks.find", found)
    assert answer(capsys, "report", run, "--out", tmp_path)[0] == 0
    assert Page(tmp_path / "report.html").facts["epochs"][0] == "1 of 1"


def test_calibration() -> None:
    """Against Guo et al.'s sums, written out."""
    confidence = np.array([0.31, 0.33, 0.95, 0.99, 1.0], np.float32)
    right = np.array([True, False, True, True, False])
    bins, error = bin_confidence(confidence, right)
    assert [each.samples for each in bins] == [2, 3]
    assert [each.accuracy for each in bins] == pytest.approx([50, 200 / 3])
    assert [each.confidence for each in bins] == pytest.approx([32, 98])
    assert error == pytest.approx((2 * abs(50 - 32) + 3 * abs(200 / 3 - 98)) / 5, rel=1e-5)
    assert bin_confidence(confidence[:0], right[:0]) == ([], 0.0)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.mark.parametrize("name", ["report", "compare"])
def test_in_chromium_a_page_fits_and_asks_for_nothing(
    browser: Browser, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run, page, colours = trained / "run", tmp_path / f"{name}.html", set()
    arguments = (
        ["report", run, "--workers", 0, "--device", "cpu"]
        if name == "report"
        else ["compare", run, run]
    )
    assert answer(capsys, *arguments, "--out", tmp_path)[0] == 0
    browser.events.clear()
    for width in (1280, 390):
        for dark in (False, True):
            browser.open(page.as_uri(), width, dark=dark)
            assert browser.evaluate("innerWidth") == width
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            for what in (
                "document.body).backgroundColor",
                "document.querySelector('svg path[style*=\"--c0\"]')).stroke",
            ):
                colours.add(browser.evaluate(f"getComputedStyle({what}"))
    assert len(colours) == 4, colours  # of the page and of a line, light and dark
    methods = {event.get("method") for event in browser.events}
    assert not methods & {
        "Log.entryAdded",
        "Runtime.exceptionThrown",
        "Runtime.consoleAPICalled",
    }, browser.events
    sent = [
        event["params"]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert {each["request"]["url"].partition(":")[0] for each in sent} <= {"file", "data"}
    assert page.stat().st_size < 3e6
