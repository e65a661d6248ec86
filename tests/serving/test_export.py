"""`wds-train export`: other programs get the logits of the evaluation from its files.

The files say nothing that is not true.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray

from wds_train.cli import main
from wds_train.config.recipe import DataRecipe, ModelRecipe, Recipe
from wds_train.dataset.manifest import ClassInfo
from wds_train.dataset.reader import Dataset
from wds_train.errors import RunError, UsageError
from wds_train.evaluation.evaluate import Member, View, choose_weights
from wds_train.loader.pipeline import Pipeline
from wds_train.loader.plan import EvalPlan
from wds_train.models.model import create_model
from wds_train.models.weights import Weights
from wds_train.serving.exporters import (
    METADATA,
    new_folder,
    write_onnx,
    write_timm_folder,
    write_torch_export,
)
from wds_train.serving.graph import Graph

CPU = torch.device("cpu")
Logits = Callable[[torch.Tensor], NDArray[np.float32]]  # of uint8 [n, side, side, 3]


def by_timm(path: Path) -> Logits:
    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    mean, std = (
        torch.tensor(model.pretrained_cfg["mean"]),
        torch.tensor(model.pretrained_cfg["std"]),
    )
    return lambda pixels: model(((pixels / 255 - mean) / std).permute(0, 3, 1, 2)).numpy()


def by_onnx(path: Path) -> Logits:
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    return lambda pixels: session.run(["logits"], {"pixels": pixels.numpy()})[0]


def by_torch(path: Path) -> Logits:
    program = torch.export.load(str(path)).module()
    return lambda pixels: program(pixels)[0].numpy()


FORMATS: dict[str, tuple[str, Callable[[Path], Logits], float]] = {
    "timm-hub": ("folder", by_timm, 1e-5),
    "onnx": ("model.onnx", by_onnx, 1e-4),
    "torch-export": ("model.pt2", by_torch, 1e-5),
}


@pytest.mark.parametrize("form", FORMATS)
def test_others_find_the_logits_of_the_evaluation(
    served: str, digits: Dataset, tmp_path: Path, form: str
) -> None:
    name, loaded, tolerance = FORMATS[form]
    assert main(["export", served, "--format", form, "--to", str(tmp_path / name)]) == 0
    weights = choose_weights(served, "best", None)
    member, split = Member(weights, View.of(weights.recipe, None), CPU), digits.split("val")
    logits = loaded(tmp_path / name)
    with torch.inference_mode():
        for batch in Pipeline(split, EvalPlan(len(split), 100), member.view.transform, 0):
            ours = member.logits(batch.images).numpy()
            assert np.abs(logits(batch.images) - ours).max() <= tolerance * np.abs(ours).max()
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == [name]


LAYERS: dict[str, dict[str, Any]] = {
    "blur": {"blur_pool": True},
    "squeeze-excite, deep stem": {"squeeze_excite": True, "deep_stem": True},
    "all": {"squeeze_excite": True, "deep_stem": True, "blur_pool": True},
}


def untrained(name: str, **layers: Any) -> Weights:
    model = ModelRecipe(name, **layers)
    net = create_model(model, 4, 1, CPU)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as if trained: blocks begin by adding nothing
        for place, value in net.state_dict().items():
            if value.ndim == 1 and place.endswith(("weight", "running_var")):
                value.uniform_(0.5, 1.5, generator=rng)
    classes = tuple(ClassInfo(f"n{label}", f"name {label}") for label in range(4))
    recipe = Recipe("test", model=model, data=DataRecipe(size=32, eval_size=32))
    return Weights(net.state_dict(), "raw", "/runs/test", 7, 1, {}, recipe, classes)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("form", FORMATS)
def test_layer_options_are_not_lost(tmp_path: Path, form: str, layers: str) -> None:
    """The export is compared with the model itself.

    timm's folder needs a ResNet that timm can also name with its blur.
    """
    weights = untrained("resnet18" if form == "timm-hub" else "test_resnet", **LAYERS[layers])
    name, loaded, tolerance = FORMATS[form]
    {"timm-hub": write_timm_folder, "onnx": write_onnx, "torch-export": write_torch_export}[form](
        weights, tmp_path / name
    )
    graph, logits = Graph(weights), loaded(tmp_path / name)
    with torch.inference_mode():
        pixels = graph.example(5)
        ours = graph(pixels)[0].numpy()
        assert ours.std(axis=0).min() > 1e-3 * np.abs(ours).max()  # they tell the images apart
        assert np.abs(logits(pixels) - ours).max() <= tolerance * np.abs(ours).max()


def test_a_timm_folder_tells_of_no_other_training(served: str, tmp_path: Path) -> None:
    assert main(["export", served, "--format", "timm-hub", "--to", str(tmp_path / "folder")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    config = model.pretrained_cfg
    ours = {
        "num_classes",
        "input_size",
        "interpolation",
        "crop_pct",
        "mean",
        "std",
        "label_names",
        "label_descriptions",
    }
    said = {name for name, value in config.items() if value not in (None, "", (), False)}
    # timm's own words on how it loads, and its class's default for what a config does not name.
    assert said - ours <= {"architecture", "source", "file", "crop_mode"}
    assert config["label_names"] == [str(digit) for digit in range(10)]
    assert (config["input_size"], config["crop_pct"]) == ([3, 16, 16], 1.0)


def test_what_timm_cannot_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"the model test_resnet cannot be put into timm's config\.json"
    ):
        write_timm_folder(untrained("test_resnet", blur_pool=True), tmp_path / "folder")
    assert not [*tmp_path.glob("*folder*")]


def test_an_onnx_file_holds_what_it_takes(served: str, tmp_path: Path) -> None:
    """It has classes, preprocessing and calibration.

    The logits follow from the features and the head's weights.
    """
    file, onnxruntime = tmp_path / "model.onnx", pytest.importorskip("onnxruntime")
    assert main(["export", served, "--format", "onnx", "--to", str(file)]) == 0
    session = onnxruntime.InferenceSession(str(file))
    facts = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    assert facts["names"] == [str(digit) for digit in range(10)]
    assert facts["view"] == {"side": 16, "crop": 1.0, "flip": False}
    assert facts["calibration"]["fitted"] == facts["calibration"]["judged"] == 180
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    logits, features, head = session.run(None, {"pixels": pixels})
    assert features.mean(axis=(2, 3)) @ head.T == pytest.approx(
        logits - logits[0] + (features.mean(axis=(2, 3)) @ head.T)[0], abs=1e-4
    )


def test_a_model_without_a_map_has_no_head(tmp_path: Path) -> None:
    weights = untrained("test_vit")
    weights = replace(weights, recipe=replace(weights.recipe, data=DataRecipe(eval_size=160)))
    write_onnx(weights, tmp_path / "vit.onnx")
    session = pytest.importorskip("onnxruntime").InferenceSession(str(tmp_path / "vit.onnx"))
    assert [output.name for output in session.get_outputs()] == ["logits", "features"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for path in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with pytest.raises(UsageError, match="is there and not empty"), new_folder(path):
            pytest.fail("it was begun")
    for path in (Path(), Path("/")):
        with (
            pytest.raises(UsageError, match="cannot be made anew; name a folder"),
            new_folder(path),
        ):
            pytest.fail("it was begun")
    with pytest.raises(KeyError), new_folder(tmp_path / "new") as folder:
        (folder / "half").write_text("half")
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*") if path.name != "home"] == [
        "full",
        "mine.txt",
    ]
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "whole").write_text("whole")
    assert (tmp_path / "empty" / "whole").read_text() == "whole"


@pytest.mark.parametrize(
    ("form", "name"), [("onnx", "x.safetensors"), ("torch-export", "x"), ("safetensors", "x.onnx")]
)
def test_a_name_of_another_format_is_refused(
    served: str, tmp_path: Path, form: str, name: str
) -> None:
    assert main(["export", served, "--format", form, "--to", str(tmp_path / name)]) == 2
    assert not [*tmp_path.iterdir()]
