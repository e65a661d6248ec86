"""`wds-train eval`: the training's own numbers again.

All else is compared with plain counts over logits.
"""

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from trainers import Job, Training, all_ended, make_dataset

from wds_train.cli import main
from wds_train.dataset.reader import Dataset
from wds_train.loader.pipeline import Pipeline
from wds_train.loader.plan import EvalPlan
from wds_train.loader.transform import EvalTransform
from wds_train.models.model import create_model
from wds_train.models.scoring import metrics, percent
from wds_train.models.weights import Weights

SETTINGS = (
    "model.drop_path=0",
    "mix.mixup=0",
    "batch=64",
    "schedule.epochs=2",
    "optimizer.lr=0.3",
    "ema.decay=0.9",
)


@pytest.fixture(scope="module")
def runs(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two short trainings, not to be written to.

    `flip` validated at 16 px with mirror images, `plain` at 24 px without.
    """
    folder = tmp_path_factory.mktemp("runs")
    own = {
        "flip": ("data.eval_flip=true",),
        "plain": ("data.eval_size=24", "data.eval_crop=0.8", "seed=1"),
    }
    jobs = [
        Job(digits.store.url, str(folder / name), str(folder), settings=SETTINGS + settings)
        for name, settings in own.items()
    ]
    trainings = [Training(job) for job in jobs]
    with all_ended(trainings):
        for training in trainings:
            assert training.end() == 0, training.output
    return {name: str(folder / name) for name in own}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the trainings: the last digits of sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip()


def evaluated(
    capsys: pytest.CaptureFixture[str], dataset: Dataset | str, run: str, *arguments: object
) -> Any:
    url = dataset if isinstance(dataset, str) else dataset.store.url
    code, out, err = answer(
        capsys, "eval", run, "--dataset", url, "--workers", 0, "--json", *arguments
    )
    assert code == 0, err
    return json.loads(out)


def logits(
    weights: Weights, dataset: Dataset, side: int, crop: float, flip: bool = False
) -> torch.Tensor:
    """Return the plain logits of the validation split, float64 [samples, classes]."""
    model = create_model(weights.recipe.model, 10, 0, torch.device("cpu"))
    model.load_state_dict(weights.tensors)
    split, mean, std = (
        dataset.split("val"),
        torch.tensor(weights.recipe.data.mean),
        torch.tensor(weights.recipe.data.std),
    )
    found = []
    with torch.inference_mode():
        for batch in Pipeline(split, EvalPlan(len(split), 60), EvalTransform(side, crop), 0):
            pixels = ((batch.images / 255 - mean) / std).permute(0, 3, 1, 2)
            views = [pixels, pixels.flip(3)] if flip else [pixels]
            found.append(sum(model.eval()(view).double() for view in views) / len(views))
    return torch.cat(found)  # type: ignore[arg-type]


def weights_of(run: str, kind: str, tmp_path: Path) -> Weights:
    step = json.loads((Path(run) / "manifest.json").read_text())["checkpoints"][-1]["progress"][
        "step"
    ]
    file = tmp_path / f"{kind}.safetensors"
    assert main(["export", run, "--step", str(step), "--best", kind, "--to", str(file)]) == 0
    return Weights.read(file)


def labels_of(dataset: Dataset) -> NDArray[np.int64]:
    return dataset.split("val").index.label.astype(np.int64)


@pytest.mark.parametrize("name", ["flip", "plain"])
def test_it_repeats_what_the_training_logged(
    runs: dict[str, str], digits: Dataset, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """To the last digit: for every kept checkpoint, raw and EMA, with and without workers."""
    checkpoints = json.loads((Path(runs[name]) / "manifest.json").read_text())["checkpoints"]
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        for kind, suffix in (("raw", ""), ("ema", "_ema")):
            step = checkpoint["progress"]["step"]
            report = evaluated(
                capsys, digits, runs[name], "--weights", kind, "--step", step, "--workers", step % 4
            )
            logged = {
                each: checkpoint["metrics"][f"val/{each}{suffix}"]
                for each in ("loss", "top1", "top5")
            }
            assert {each: report[each] for each in logged} == logged
            member = report["members"][0]
            assert (member["weights"], member["step"], member["validated"]) == (
                kind,
                step,
                logged["top1"],
            )
            assert member["views"] == (2 if name == "flip" else 1)
    assert (
        evaluated(capsys, digits, runs["flip"], "--tta", "none")["loss"]
        != evaluated(capsys, digits, runs["flip"])["loss"]
    )


def test_the_best_weights_are_those_of_the_highest_top1(
    runs: dict[str, str], digits: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = json.loads((Path(runs["plain"]) / "manifest.json").read_text())["checkpoints"]
    tops = [c["metrics"][name] for c in checkpoints for name in ("val/top1", "val/top1_ema")]
    assert len(set(tops)) > 1
    assert evaluated(capsys, digits, runs["plain"])["top1"] == max(tops)


def test_an_exported_file_scores_as_its_run(
    runs: dict[str, str], digits: Dataset, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    weights_of(runs["flip"], "ema", tmp_path)
    of_file = evaluated(capsys, digits, str(tmp_path / "ema.safetensors"))
    assert of_file == evaluated(capsys, digits, runs["flip"], "--weights", "ema", "--step", 44)


def test_percentages_of_equal_counts_are_equal_wherever_they_are_computed() -> None:
    found = [
        metrics(torch.tensor([0.0, hits, hits, 360], dtype=torch.float64), 360)
        for hits in range(361)
    ]
    expected = [percent(hits, 360) for hits in range(361)]
    assert [each["top1"] for each in found] == [each["top5"] for each in found] == expected
    assert expected == [100 * hits / 360 for hits in range(361)]


def test_counts_by_class_and_confused_pairs(
    runs: dict[str, str], digits: Dataset, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    predicted = (
        logits(weights_of(runs["plain"], "raw", tmp_path), digits, 20, 0.9).argmax(dim=1).tolist()
    )
    labels = labels_of(digits).tolist()
    flags = ("--weights", "raw", "--size", 20, "--crop", 0.9, "--out", tmp_path / "out")
    report = evaluated(
        capsys, digits, runs["plain"], "--step", 44, *flags, "--per-class", tmp_path / "c.csv"
    )
    assert (report["samples"], report["members"][0]["size"], report["members"][0]["crop"]) == (
        360,
        20,
        0.9,
    )
    pairs: dict[tuple[str, str], int] = {}
    for label, taken in zip(labels, predicted, strict=True):
        if label != taken:
            pairs[str(label), str(taken)] = pairs.get((str(label), str(taken)), 0) + 1
    assert len(pairs) > 10
    assert [pair["samples"] for pair in report["confused"]] == sorted(pairs.values(), reverse=True)[
        :10
    ]
    assert all(
        pairs[pair["class"], pair["taken_for"]] == pair["samples"] for pair in report["confused"]
    )
    hits = [
        sum(a == b == label for a, b in zip(labels, predicted, strict=True)) for label in range(10)
    ]
    assert [row["correct"] for row in report["classes"]] == hits
    assert [row["samples"] for row in report["classes"]] == [
        labels.count(label) for label in range(10)
    ]
    assert report["top1"] == 100 * sum(hits) / 360
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [(row["id"], int(row["correct"])) for row in rows] == [
        (str(i), hit) for i, hit in enumerate(hits)
    ]
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == report
    assert (tmp_path / "out" / "classes.csv").read_text() == (tmp_path / "c.csv").read_text()


def test_an_ensemble_is_the_mean_of_the_probabilities(
    runs: dict[str, str], digits: Dataset, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The members see the images at their own sizes."""
    one = logits(weights_of(runs["flip"], "raw", tmp_path), digits, 16, 1.0, flip=True)
    other = logits(weights_of(runs["plain"], "raw", tmp_path), digits, 24, 0.8)
    mean = (one.softmax(dim=1) + other.softmax(dim=1)) / 2
    labels = torch.from_numpy(labels_of(digits))
    flags = ("--ensemble", runs["plain"], "--weights", "raw", "--step", 44)
    report = evaluated(capsys, digits, runs["flip"], *flags)
    assert [(member["size"], member["views"]) for member in report["members"]] == [(16, 2), (24, 1)]
    assert report["loss"] == pytest.approx(-mean[range(360), labels].log().mean().item(), rel=1e-5)
    assert report["top1"] == pytest.approx(
        100 * (mean.argmax(dim=1) == labels).double().mean().item()
    )
    alone = [float(torch.nn.functional.cross_entropy(each, labels)) for each in (one, other)]
    assert min(abs(report["loss"] - each) for each in alone) > 1e-3


def test_multi_crop_is_the_mean_of_ten_views(
    runs: dict[str, str], digits: Dataset, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The square has 24 / .8 = 30 px, which is the whole image."""
    weights = weights_of(runs["plain"], "raw", tmp_path)
    model = create_model(weights.recipe.model, 10, 0, torch.device("cpu"))
    model.load_state_dict(weights.tensors)
    split, total = digits.split("val"), 0.0
    with torch.inference_mode():
        for batch in Pipeline(split, EvalPlan(len(split), 60), EvalTransform(30, 1.0), 0):
            pixels = ((batch.images / 255 - 0.3) / 0.35).permute(0, 3, 1, 2)
            squares = [
                pixels[:, :, y : y + 24, x : x + 24]
                for y, x in ((0, 0), (0, 6), (6, 0), (6, 6), (3, 3))
            ]
            views = [model.eval()(view) for square in squares for view in (square, square.flip(3))]
            mean = torch.stack(views).double().mean(dim=0)
            total += torch.nn.functional.cross_entropy(mean, batch.labels, reduction="sum").item()
    report = evaluated(
        capsys, digits, runs["plain"], "--weights", "raw", "--step", 44, "--tta", "crops"
    )
    assert report["members"][0]["views"] == 10
    assert report["loss"] == pytest.approx(total / 360, rel=1e-5)


def test_an_unreadable_sample_is_named_and_counts_as_wrong(
    runs: dict[str, str], digits: Dataset, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ("--weights", "raw", "--step", 44)
    whole = evaluated(capsys, digits, runs["flip"], *flags)
    weights = weights_of(runs["flip"], "raw", tmp_path)
    predicted = logits(weights, digits, 16, 1.0, flip=True).argmax(dim=1).numpy()
    model = create_model(weights.recipe.model, 10, 0, torch.device("cpu")).eval()
    model.load_state_dict(weights.tensors)
    # One that is right, and would be right as the grey image that stands for it.
    right = int(model(torch.full((1, 3, 16, 16), (128 / 255 - 0.3) / 0.35)).argmax())
    sample = int(np.flatnonzero((predicted == right) & (labels_of(digits) == right))[0])
    broken = shutil.copytree(digits.store.url, tmp_path / "broken")
    split = digits.split("val")
    shard = broken / split.shard_names[split.index.shard[sample]]
    data = bytearray(shard.read_bytes())
    data[int(split.index.offset[sample] + split.index.length[sample] // 2)] ^= 0xFF
    shard.write_bytes(data)
    report = evaluated(capsys, str(broken), runs["flip"], *flags)
    assert [entry["key"] for entry in report["unreadable"]] == [split.index.key_of(sample)]
    assert report["top1"] == pytest.approx(whole["top1"] - 100 / 360)
    assert report["classes"][right]["correct"] == whole["classes"][right]["correct"] - 1
    assert sum(pair["samples"] for pair in report["confused"]) == sum(
        pair["samples"] for pair in whole["confused"]
    )
    code, out, _ = answer(capsys, "eval", runs["flip"], "--dataset", broken, "--workers", 0, *flags)
    assert code == 0
    assert "unreadable  1, counted as wrong" in out
    assert f"key {split.index.key_of(sample)}: " in out
    assert f"top-1       {report['top1']:.2f} %" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{run}", "--size", "0"], 2, "--size: '0' is not a whole number of at least 8"),
        (
            ["{run}", "--crop", "1.5"],
            2,
            "--crop: '1.5' is not a number of more than 0 and at most 1",
        ),
        (["{run}", "--split", "test"], 1, "the dataset has no split 'test'; it has train, val"),
        (["{run}", "--batch", "0"], 2, "'0' is not a whole number of at least 1"),
        (["{run}", "--step", "7"], 2, "has no checkpoint of step 7; it has those of 22, 44"),
        (["{run}", "--ensemble", "/nowhere/run"], 1, "there is no run at /nowhere/run"),
        (["/nowhere/x.safetensors"], 1, "there is no file /nowhere/x.safetensors"),
        (["{run}/manifest.json"], 1, "there is no run at"),
        (["{folder}/text.safetensors"], 1, "text.safetensors is no safetensors file"),
        (
            ["{folder}/other.safetensors"],
            1,
            "other.safetensors was not written by this version of `wds-train export`",
        ),
        (
            ["{folder}/raw.safetensors", "--weights", "ema"],
            2,
            "holds the raw weights of step 44 alone",
        ),
        (["{run}", "--dataset", "{two}"], 2, "it knows 10 classes, the dataset has 2"),
        (["{run}", "--dataset", "{renamed}"], 2, "it has '7' as class 7, the dataset '8'"),
        (
            ["{folder}/vit.safetensors"],
            2,
            "--size = 16 cannot work: vit_tiny_patch16_224 takes no images of that size (Input height",
        ),
        (
            ["{folder}/misfit.safetensors"],
            1,
            "do not fit the model test_resnet: bn1.bias is absent",
        ),
        (
            ["{run}", "--per-class", "/nowhere/c.csv"],
            2,
            "/nowhere/c.csv cannot be written: No such file or directory",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    places: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    given = [part.format(**places) for part in arguments]
    got, _, err = answer(capsys, "eval", "--dataset", places["digits"], "--workers", 0, *given)
    assert (got, message in err) == (code, True), err
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def places(
    runs: dict[str, str], digits: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Files that are no model of the digits, and datasets that are not theirs."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "text.safetensors").write_text("hello")
    save_file({"a": torch.zeros(1)}, folder / "other.safetensors", {"format": "pt"})
    weights = weights_of(runs["flip"], "raw", folder)
    replace(weights, tensors={}).save(folder / "misfit.safetensors")
    vit = replace(weights.recipe.model, name="vit_tiny_patch16_224")
    tensors = create_model(vit, 10, 0, torch.device("cpu")).state_dict()
    replace(weights, tensors=tensors, recipe=replace(weights.recipe, model=vit)).save(
        folder / "vit.safetensors"
    )
    images = folder / "images"
    for split in ("train", "val"):
        for name in ("0", "1", "2", "3", "4", "5", "6", "8", "9", "seven"):
            (images / split / name).mkdir(parents=True)
            pixels = np.full((8, 8, 3), 4 * len(list(images.rglob("*"))), np.uint8)
            Image.fromarray(pixels).save(images / split / name / "1.png")
    assert main(["shards", str(images), str(folder / "renamed")]) == 0
    return {
        "run": runs["flip"],
        "digits": digits.store.url,
        "folder": str(folder),
        "two": make_dataset(folder / "two"),
        "renamed": str(folder / "renamed"),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU can be used")
def test_a_gpu_that_cannot_be_used_is_refused_unless_the_cpu_is_meant(
    runs: dict[str, str],
    digits: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the CPU, unnoticed, it would take a hundred times as long."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 470.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    arguments = ["eval", runs["plain"], "--dataset", digits.store.url]
    assert main(arguments) == 2
    assert "this machine has a GPU (driver 470.1) that PyTorch" in capsys.readouterr().err
    assert main([*arguments, "--device", "cpu"]) == 0
