"""Every command, file and page uses the model that was judged.

One photo has the same probability in all of them.
"""

import hashlib
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from answers import answer
from pages import Page

from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.run_manifest import Checkpoint, Object, Progress, keep
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.checkpoint.weight_choice import best_weights, choose
from wds_train.cli import main
from wds_train.dataset.reader import Dataset
from wds_train.evaluation import calibrate as calibrating
from wds_train.evaluation.calibrate import calibrate
from wds_train.evaluation.evaluate import Member, View, choose_weights
from wds_train.loader.pipeline import Pipeline
from wds_train.loader.plan import EvalPlan
from wds_train.models.calibration import Calibration, judge_again, probabilities
from wds_train.models.weights import Weights
from wds_train.report.model_checks import find
from wds_train.serving import demo_page as demo
from wds_train.serving.classify import make_photo
from wds_train.serving.provenance import best_results
from wds_train.training.outcome import describe_outcome, next_commands

pytest.importorskip("onnxruntime")
CPU = torch.device("cpu")
# The kind of the best weights of each run.
KINDS = {"raw": "raw", "ema": "ema", "never": "raw", "tied": "raw"}
OTHER = {"raw": "ema", "ema": "raw"}
Tensors = dict[str, torch.Tensor]


def swapped(tensors: Tensors) -> Tensors:
    return {_other(name): value for name, value in tensors.items()}


def _other(name: str) -> str:
    for one, other in (("model/", "ema/"), ("ema/", "model/")):
        if name.startswith(one):
            return other + name.removeprefix(one)
    return name


def equal(tensors: Tensors) -> Tensors:
    raw = {
        name.replace("model/", "ema/", 1): value
        for name, value in tensors.items()
        if name.startswith("model/")
    }
    return tensors | {name: value.clone() for name, value in raw.items()}


def swapped_scores(metrics: dict[str, float]) -> dict[str, float]:
    return {
        name.removesuffix("_ema") if name.endswith("_ema") else f"{name}_ema": value
        for name, value in metrics.items()
    }


def equal_scores(metrics: dict[str, float]) -> dict[str, float]:
    raw = {name: value for name, value in metrics.items() if not name.endswith("_ema")}
    return raw | {f"{name}_ema": value for name, value in raw.items()}


def changed(
    run: str,
    folder: Path,
    tensors: Callable[[Tensors], Tensors],
    scores: Callable[..., Any],
    every: int,
) -> str:
    """Copy a run, with other weights and other scores."""
    shutil.copytree(run, folder)
    manifest, _ = find_run(str(folder))
    checkpoints = []
    for each in manifest.checkpoints:
        snapshot = Snapshot.decode((folder / each.object.key).read_bytes(), each.progress)
        data = replace(snapshot, tensors=tensors(snapshot.tensors)).encode()
        (folder / each.object.key).write_bytes(data)
        held = Object(each.object.key, len(data), hashlib.sha256(data).hexdigest())
        checkpoints.append(Checkpoint(held, each.progress, scores(each.metrics)))
    recipe = manifest.recipe | {"ema": manifest.recipe["ema"] | {"every": every}}
    result = checkpoints[-1].metrics
    new = replace(manifest, checkpoints=tuple(checkpoints), recipe=recipe, result=result)
    (folder / "manifest.json").write_bytes(new.to_json())
    return str(folder)


@pytest.fixture(scope="module")
def runs(served: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Trainings on the digits, not to be written to.

    The raw weights are better; the EMA ones are; the EMA ones have the higher score, but were never
    updated; both are equal.
    """
    folder = tmp_path_factory.mktemp("bucket") / "runs"
    found = {
        "raw": changed(served, folder / "raw", lambda t: t, lambda m: m, 1),
        "ema": changed(served, folder / "ema", swapped, swapped_scores, 1),
        "never": changed(
            served, folder / "never", lambda t: t, lambda m: m | {"val/top1_ema": 99.0}, 1000
        ),
        "tied": changed(served, folder / "tied", equal, equal_scores, 1),
    }
    for name, run in found.items():
        newest = find_run(run)[0].checkpoints[-1].metrics
        raw, ema = newest["val/top1"], newest["val/top1_ema"]
        assert {"raw": raw > ema, "ema": ema > raw, "never": ema > raw, "tied": ema == raw}[name]
    return found


@pytest.fixture(scope="module")
def labels(digits: Dataset) -> list[str]:
    """The class of each validation sample."""
    return [digits.manifest.classes[label].id for label in digits.split("val").index.label]


@pytest.fixture(scope="module")
def photos(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole validation split, as files named by their numbers."""
    folder, split = tmp_path_factory.mktemp("photos"), digits.split("val")
    for number in range(len(split)):
        (folder / f"{number:03d}.png").write_bytes(make_photo(split, number).read())
    return folder


@pytest.fixture(scope="module")
def published(runs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder that `publish` makes of each run.

    The dataset has a test split, which is the validation split once more.
    """
    folder = tmp_path_factory.mktemp("published")
    opened = Dataset.open(find_run(runs["raw"])[0].dataset["url"])
    splits = opened.manifest.splits | {"test": opened.manifest.splits["val"]}
    tested = replace(opened, manifest=replace(opened.manifest, splits=splits))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WDS_HOME", str(folder / "home"))
        patch.setattr("wds_train.serving.publishing.own_dataset", lambda _: tested)
        for name, run in runs.items():
            assert main(["publish", run, "--to", str(folder / name), "--licence", "mit"]) == 0
    return {name: folder / name for name in runs}


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """The module of the page that answers for images."""
    path = Path(demo.__file__).parent / "space" / "classifier.py"
    spec = importlib.util.spec_from_file_location("classifier", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["classifier"] = module
    spec.loader.exec_module(module)
    return module


def judged(capsys: pytest.CaptureFixture[str], run: str, *more: object) -> dict[str, Any]:
    code, out, err = answer(capsys, "eval", run, "--workers", 0, "--device", "cpu", "--json", *more)
    assert code == 0, err
    return json.loads(out)


def predicted(
    capsys: pytest.CaptureFixture[str], model: object, photos: Path, labels: list[str]
) -> tuple[float, list[dict[str, Any]]]:
    """Return the top-1 of the answers of `predict`, and the answers."""
    code, out, err = answer(capsys, "predict", model, photos, "--json", "--device", "cpu")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    hits = sum(row["top"][0]["id"] == label for row, label in zip(rows, labels, strict=True))
    return 100 * hits / len(labels), rows


def top1_of(
    logits: Callable[[torch.Tensor], torch.Tensor], weights: Weights, digits: Dataset
) -> float:
    """Return the top-1 of `logits`, which takes uint8 images [n, side, side, 3]."""
    split, hits = digits.split("val"), 0
    with torch.inference_mode():
        for batch in Pipeline(
            split, EvalPlan(len(split), 64), View.of(weights.recipe, None).transform, 0
        ):
            hits += int((logits(batch.images).argmax(dim=1) == batch.labels).sum())
    return 100 * hits / len(split)


@pytest.mark.parametrize("name", KINDS)
def test_every_command_uses_the_weights_that_eval_judged(
    *,
    runs: dict[str, str],
    photos: Path,
    labels: list[str],
    digits: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    run, kind = runs[name], KINDS[name]
    report = judged(capsys, run)
    best, member = report["top1"], report["members"][0]
    newest = find_run(run)[0].checkpoints[-1].metrics
    assert (best, member["weights"]) == (
        newest[{"raw": "val/top1", "ema": "val/top1_ema"}[kind]],
        kind,
    )
    step, epoch = member["step"], member["epoch"]
    said = f"{kind} weights of step {step} (epoch {epoch}), top-1 {best:.2f} % on val"

    assert predicted(capsys, run, photos, labels)[0] == best
    assert f"by the {said}" in answer(capsys, "predict", run, photos / "000.png")[2]
    file = tmp_path / "file.safetensors"
    code, out, _ = answer(capsys, "export", run, "--to", file)
    assert (code, out.splitlines()[0]) == (0, f"{file}: {said}")
    assert predicted(capsys, file, photos, labels)[0] == best
    assert judged(capsys, str(file), "--dataset", digits.store.url)["top1"] == best

    code, _, err = answer(
        capsys, "report", run, "--out", tmp_path / "report", "--workers", 0, "--device", "cpu"
    )
    assert code == 0, err
    told = Page(tmp_path / "report" / "report.html")
    assert f"The {kind} weights of step {step} (epoch {epoch}), on all 360" in told.text
    assert f"top-1 {best:.2f} %, top-5" in told.text
    assert told.facts["best top-1"] == (f"{best:.2f} %", f"the {kind} weights of epoch {epoch}")

    page = demo._space_of_run(run)
    weights = page.choices[0]
    assert (weights.kind, weights.step) == (kind, step)
    assert (
        top1_of(Member(weights, View.of(weights.recipe, None), CPU).logits, weights, digits) == best
    )
    assert f"the page begins with the {said}" in capsys.readouterr().err


@pytest.mark.parametrize("name", KINDS)
def test_what_only_names_the_best_names_the_same(
    runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run, kind = runs[name], KINDS[name]
    manifest = find_run(run)[0]
    best = best_weights(manifest)
    assert best is not None and best.top1 is not None
    assert (best, best.kind) == (choose(manifest), kind)
    status = json.loads(answer(capsys, "status", run, "--json")[1])
    assert status["weights"] == {"kind": kind, "step": 44, "epoch": 2, "top1": best.top1}
    assert ("ema" in status["best"]) == (name != "never")
    assert (
        f"best         {kind} weights of step 44 (epoch 2), top-1 {best.top1:.2f} % on val"
        in answer(capsys, "status", run)[1]
    )
    named = f"{best.top1:.2f} % {'EMA' if kind == 'ema' else 'raw'}"
    compared = answer(capsys, "compare", run, run)[1]
    assert compared.count(f"{named}, epoch 2") == 2
    assert (
        describe_outcome(manifest)[1]
        == f"best     top-1 {named}, of epoch 2: the weights that eval uses"
    )
    assert (" --best raw" in next_commands(manifest, run, test=False)[0]) == (kind == "raw")
    assert (
        [row["weights"] for row in best_results(manifest)] == [kind]
        if name == "never"
        else [kind, OTHER[kind]]
    )
    listed = json.loads(answer(capsys, "runs", "--bucket", Path(run).parent.parent, "--json")[1])
    assert {row["name"]: row["top1"] for row in listed}[name] == best.top1


@pytest.mark.parametrize("name", KINDS)
def test_the_published_folder_holds_them(
    *,
    runs: dict[str, str],
    published: dict[str, Path],
    page: ModuleType,
    photos: Path,
    labels: list[str],
    digits: Dataset,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """timm and the page load them, and the card's scores are those of eval."""
    folder, kind = published[name], KINDS[name]
    report = judged(capsys, runs[name])
    model = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    held = Weights.read(folder / "model" / "model.safetensors")
    normalise = Member(held, View.of(held.recipe, None), CPU)._normalise
    assert top1_of(lambda images: model(normalise(images)), held, digits) == report["top1"]

    about = json.loads((folder / "space" / "app.json").read_text())
    for file in (
        folder / "model" / "model.onnx",
        folder / "space" / "models" / about["models"][about["choices"][0]],
    ):
        classifier = page.Classifier(file)
        images = [page.open_image(path.read_bytes()) for path in sorted(photos.iterdir())]
        answers = [
            classifier.facts["classes"][classifier.answer(image).top(1)[0]]["id"]
            for image in images
        ]
        assert 100 * sum(map(str.__eq__, answers, labels)) / len(labels) == report["top1"]
        assert {metric.endswith("_ema") for metric in classifier.facts["metrics"]} == {
            kind == "ema"
        }
    kinds = [title.partition(",")[0].lower() for title in about["choices"]]
    assert kinds == ([kind] if name == "never" else [kind, OTHER[kind]])

    card = (folder / "model" / "README.md").read_text()
    assert (
        f"**top-1 {report['top1']:.2f} %**, top-5 {report['top5']:.2f} %, of these {kind} weights on the test"
        in card
    )
    assert f"| {kind}, these | 2 | {report['top1']:.2f} % |" in card
    assert ("| ema" in card) == (name != "never")
    assert f"(logits / {held.calibration.temperature!r}).softmax" in card


def test_one_photo_has_one_probability(
    *,
    runs: dict[str, str],
    published: dict[str, Path],
    page: ModuleType,
    photos: Path,
    labels: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is the same in predict, the report's pictures, the exported file and the published model.

    All divide by one temperature, to the last bit, whether it was kept or is fitted again.
    """
    run = runs["raw"]
    manifest, store = find_run(run)
    found = find(store, manifest, 2000, workers=0, device=CPU)
    assert found.calibration.used and found.calibration.temperature != 1.0
    _, rows = predicted(capsys, run, photos, labels)
    monkeypatch.setenv("WDS_HOME", str(tmp_path / "another"))
    file = tmp_path / "file.safetensors"
    assert main(["export", run, "--to", str(file)]) == 0
    _, again = predicted(capsys, file, photos, labels)
    classifier = page.Classifier(published["raw"] / "model" / "model.onnx")
    assert {
        found.calibration.temperature,
        Weights.read(file).calibration.temperature,
        Weights.read(published["raw"] / "model" / "model.safetensors").calibration.temperature,
        classifier.facts["calibration"]["temperature"],
    } == {found.calibration.temperature}
    keys = [Path(row["image"]).stem for row in rows]
    split = Dataset.open(manifest.dataset["url"]).split("val")
    numbers = {split.index.key_of(number): f"{number:03d}" for number in range(len(split))}
    assert len(found.mistakes) > 20
    for mistake in found.mistakes:
        place = keys.index(numbers[mistake.key])
        image = page.open_image((photos / f"{keys[place]}.png").read_bytes())
        shown = float(classifier.answer(image).probabilities.max())
        for row in (rows[place], again[place]):
            assert row["top"][0]["probability"] == pytest.approx(mistake.confidence, abs=2e-6)
        assert shown == pytest.approx(mistake.confidence, abs=1e-4)
    # It makes a difference that is seen.
    weights = choose_weights(run, "best", None)
    member = Member(weights, View.of(weights.recipe, None), CPU)
    batch = next(iter(Pipeline(split, EvalPlan(len(split), 360), member.view.transform, 0)))
    raw = probabilities(member.logits(batch.images).numpy(), 1.0).max(axis=1)
    ours = np.array([row["top"][0]["probability"] for row in rows])
    assert np.abs(raw - ours).max() > 0.01


ASKED_FOR = [
    ["export", "RUN", "--best", "ema"],
    ["export", "RUN", "--best", "ema", "--step", "44"],
    ["eval", "RUN", "--weights", "ema"],
    ["eval", "RUN", "--weights", "ema", "--step", "22"],
    ["eval", "RUN", "--weights", "ema", "--ensemble", "RUN"],
]


@pytest.mark.parametrize("arguments", ASKED_FOR)
def test_ema_weights_that_were_never_updated_are_refused(
    runs: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = answer(
        capsys, *[runs["never"] if each == "RUN" else each for each in arguments]
    )
    step = 22 if "22" in arguments else 44
    assert (code, out) == (2, "")
    assert (
        f"were never updated: ema.every is 1000, and these are of step {step}; they still are those"
        in err
    )
    assert not [*tmp_path.glob("*.safetensors")]


@pytest.mark.parametrize("kind", ["raw", "ema"])
@pytest.mark.parametrize("name", ["raw", "ema", "tied"])
def test_what_is_asked_for_is_taken(
    runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    file, score = tmp_path / "x.safetensors", {"raw": "val/top1", "ema": "val/top1_ema"}[kind]
    newest = find_run(runs[name])[0].checkpoints[-1].metrics[score]
    assert answer(capsys, "export", runs[name], "--best", kind, "--to", file)[0] == 0
    assert Weights.read(file).kind == kind
    assert judged(capsys, runs[name], "--weights", kind)["top1"] == newest


def test_a_training_says_that_its_ema_weights_say_nothing(
    runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["never"]
    manifest = find_run(run)[0]
    raw = manifest.result["val/top1"]
    assert describe_outcome(manifest)[0] == (
        f"last     top-1 {raw:.2f} % raw, the EMA weights were never updated: ema.every is 1000, and these are of step 44"
    )
    assert "99" not in answer(capsys, "status", run)[1].partition("metrics")[2].splitlines()[0]
    rows = [line.split("\t") for line in answer(capsys, "checkpoints", run)[1].splitlines()[1:]]
    assert [row[4] for row in rows] == ["-", "-"]
    assert answer(capsys, "report", run, "--out", tmp_path, "--no-images")[0] == 0
    told = Page(tmp_path / "report.html")
    assert told.facts["top-1"] == (f"{raw:.2f} %", "EMA –")
    assert (
        "updated every 1000 steps (ema.every): their scores up to step 44 are left out" in told.text
    )


def test_they_are_not_kept_for_their_score() -> None:
    def checkpoint(step: int, raw: float, ema: float) -> Checkpoint:
        return Checkpoint(
            Object(str(step), 0, ""), Progress(step), {"val/top1": raw, "val/top1_ema": ema}
        )

    checkpoints = [
        checkpoint(1, 5, 90),
        checkpoint(2, 9, 8),
        checkpoint(3, 3, 50),
        checkpoint(4, 4, 7),
    ]
    checkpoints += [checkpoint(5, 5, 6), checkpoint(6, 6, 6)]
    kept = {
        every: [c.progress.step for c in keep(tuple(checkpoints), ema_every=every)]
        for every in (1, 3, 4, 9)
    }
    assert kept == {1: [1, 2, 5, 6], 3: [2, 3, 5, 6], 4: [2, 4, 5, 6], 9: [2, 5, 6]}
    assert Progress(1).with_validation({"val/top1": 5.0}).best == 5.0


def test_an_old_file_of_such_weights_is_read_and_said(
    runs: dict[str, str],
    photos: Path,
    digits: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = choose_weights(runs["raw"], "ema", None)
    recipe = replace(weights.recipe, ema=replace(weights.recipe.ema, every=1000))
    replace(weights, recipe=recipe).save(tmp_path / "old.safetensors")
    for arguments in (
        ["predict", photos / "000.png"],
        ["eval", "--dataset", digits.store.url, "--workers", 0],
    ):
        code, _, err = answer(capsys, arguments[0], tmp_path / "old.safetensors", *arguments[1:])
        assert code == 0
        assert (
            "holds EMA weights that were never updated (ema.every is 1000, and these are of step 44)"
            in err
        )


@pytest.fixture
def interrupted(served: str, tmp_path: Path) -> Path:
    """A run that ended before its first validation."""
    run = tmp_path / "interrupted"
    shutil.copytree(served, run)
    manifest = find_run(str(run))[0]
    bare = tuple(replace(each, metrics={}) for each in manifest.checkpoints)
    (run / "manifest.json").write_bytes(
        replace(manifest, checkpoints=bare, result={}, status="interrupted").to_json()
    )
    return run


COMMANDS = [
    ["eval", "RUN"],
    ["predict", "RUN", "PHOTO"],
    ["export", "RUN"],
    ["export", "RUN", "--best", "ema"],
    ["publish", "RUN", "--to", "OUT", "--licence", "mit"],
]


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_without_a_validation_is_a_sentence(
    *,
    interrupted: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    bare: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    if bare:
        manifest = find_run(str(interrupted))[0]
        (interrupted / "manifest.json").write_bytes(replace(manifest, checkpoints=()).to_json())
    places = {
        "RUN": str(interrupted),
        "PHOTO": str(photos / "000.png"),
        "OUT": str(tmp_path / "out"),
    }
    code, out, err = answer(capsys, *[places.get(each, each) for each in command])
    assert (code, out, "Traceback" in err) == (2, "", False)
    assert "has no validated checkpoint yet" in err
    assert ("--step 44 --best raw" in err) == (not bare)
    code, out, _ = answer(capsys, "status", interrupted)
    assert (code, "best         none yet" in out) == (0, True)
    assert json.loads(answer(capsys, "status", interrupted, "--json")[1])["weights"] is None


def test_a_step_that_was_not_validated_needs_a_word(
    interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.safetensors"
    code, _, err = answer(capsys, "export", interrupted, "--step", 22, "--to", file)
    assert code == 2
    assert (
        "nothing says whether its raw or its EMA weights are better; say which: export takes --best raw"
        in err
    )
    code, out, _ = answer(
        capsys, "export", interrupted, "--step", 22, "--best", "ema", "--to", file
    )
    assert (code, out.splitlines()[0]) == (0, f"{file}: ema weights of step 22, not validated")
    manifest = find_run(str(interrupted))[0]
    recipe = manifest.recipe | {"ema": manifest.recipe["ema"] | {"every": 1000}}
    assert choose(replace(manifest, recipe=recipe), step=22).kind == "raw"  # there are no others


@pytest.mark.parametrize("images", [0, 1, 9, 99])
def test_of_few_images_no_temperature_is_fitted(images: int) -> None:
    rng = np.random.default_rng(0)
    found = calibrate(
        5 * rng.normal(size=(images, 3)).astype(np.float32), rng.integers(0, 3, images)
    )
    what = "1 image" if images == 1 else f"{images} images"
    assert (found.temperature, found.fitted, found.used) == (1.0, 0, False)
    assert str(found) == f"not calibrated: {what}, at least 100 are needed"


def test_of_a_hundred_one_is_fitted() -> None:
    rng = np.random.default_rng(0)
    found = calibrate(5 * rng.normal(size=(100, 3)).astype(np.float32), rng.integers(0, 3, 100))
    assert (found.fitted, found.judged, found.used) == (50, 50, True)
    assert found.temperature > 2


def pairs(
    right_of: tuple[int, int], fitted_right_of: tuple[int, int], times: int = 1
) -> tuple[Any, Any]:
    """Return answers of two classes that are 75 % sure.

    The shares of right ones are given: in the half that judges, and in the half that fits.
    """
    logits = np.tile(np.array([[np.log(3), 0]], np.float32), (2 * right_of[1] * times, 1))
    labels = np.zeros(len(logits), np.int64)
    for half, (right, of) in ((0, fitted_right_of), (1, right_of)):
        labels[half::2] = np.arange(len(labels) // 2) % of >= right
    return logits, labels


UNHELPFUL = {
    "too sure": (pairs((75, 100), (99, 100)), 0.0),
    "not sure enough": (pairs((75, 100), (50, 100)), 0.0),
    "no better than is printed": (pairs((7502, 10000), (7502, 10000)), 0.0),
    "better on one half, worse on the other": (pairs((60, 100), (99, 100)), 15.0),
}


@pytest.mark.parametrize("name", UNHELPFUL)
def test_a_temperature_is_judged_by_the_figure_that_is_printed(name: str) -> None:
    (logits, labels), error = UNHELPFUL[name]
    found = calibrate(logits, labels)
    assert (found.temperature, found.used, found.fitted) == (1.0, False, len(labels) // 2)
    assert found.error == found.error_raw == pytest.approx(error, abs=0.03)
    printed = re.search(r"off by ([\d.]+) points with it, ([\d.]+) without", str(found))
    assert str(found).startswith("not calibrated: a temperature of ")
    assert printed and float(printed[1]) >= float(printed[2])
    assert found.sure == 100.0


@pytest.mark.parametrize(
    ("old", "temperature", "text"),
    [
        (
            Calibration(2.3, 5, 4, 13.3, 9.0),
            1.0,
            "not calibrated: 9 images, at least 100 are needed",
        ),
        (
            Calibration(2.3, 50, 49, 13.3, 9.0),
            1.0,
            "not calibrated: 99 images, at least 100 are needed",
        ),
        (Calibration(2.3, 90, 90, 13.3, 17.4), 1.0, "off by 17.4 points with it, 13.3 without"),
        (Calibration(2.3, 90, 90, 13.34, 13.32), 1.0, "off by 13.3 points with it, 13.3 without"),
        (
            Calibration(2.3, 90, 90, 17.4, 13.3),
            2.3,
            "temperature 2.30 of 90 validation samples; on 90 others",
        ),
        (Calibration(), 1.0, "not calibrated"),
    ],
)
def test_what_an_earlier_version_fitted_is_judged_by_the_same_rule(
    runs: dict[str, str], tmp_path: Path, old: Calibration, temperature: float, text: str
) -> None:
    replace(choose_weights(runs["raw"], "best", None), calibration=old).save(
        tmp_path / "old.safetensors"
    )
    found = Weights.read(tmp_path / "old.safetensors").calibration
    assert found.temperature == temperature
    assert text in str(found)
    assert judge_again(found) == found


def test_without_the_validation_there_is_no_temperature_until_it_is_back(
    runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A calibration that failed is not kept."""
    run, file = shutil.copytree(runs["raw"], tmp_path / "run"), tmp_path / "x.safetensors"
    manifest = find_run(str(run))[0]
    gone = manifest.dataset | {"url": str(tmp_path / "secret-place")}
    (run / "manifest.json").write_bytes(replace(manifest, dataset=gone).to_json())
    code, out, err = answer(capsys, "export", run, "--to", file)
    assert (code, "there is none at" in err) == (0, True)
    assert "not calibrated: the validation images of the training could not be read" in out
    assert b"secret-place" not in file.read_bytes()
    (run / "manifest.json").write_bytes(manifest.to_json())
    assert "calibrated: temperature" in answer(capsys, "export", run, "--to", file)[1]


def test_few_images_are_said_everywhere(
    *,
    runs: dict[str, str],
    photos: Path,
    labels: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a validation of nine images.

    predict says so, also the next time; so do export, its file, and the report.
    """
    monkeypatch.setattr(calibrating, "SAMPLES", 9)
    text, run, file = (
        "not calibrated: 9 images, at least 100 are needed",
        runs["raw"],
        tmp_path / "x.safetensors",
    )
    for _ in range(2):
        assert text in answer(capsys, "predict", run, photos / "000.png", "--json")[2]
    assert text in answer(capsys, "export", run, "--to", file)[1]
    assert text in answer(capsys, "predict", file, photos / "000.png")[2]
    assert (
        answer(capsys, "report", run, "--out", tmp_path / "out", "--workers", 0, "--device", "cpu")[
            0
        ]
        == 0
    )
    assert f"The confidences are {text}." in Page(tmp_path / "out" / "report.html").text
    shares = [row["top"][0]["probability"] for row in predicted(capsys, file, photos, labels)[1]]
    manifest, store = find_run(run)
    found = find(store, manifest, 2000, workers=0, device=CPU)
    assert found.calibration.temperature == 1.0
    surest = max(mistake.confidence for mistake in found.mistakes)
    assert min(abs(share - surest) for share in shares) < 2e-6
