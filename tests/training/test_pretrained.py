"""Weights to begin with: from timm's hub, from a file of timm's, or from one of ours."""

import http.server
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save, save_file
from test_engine import recipe, trainer
from test_recipe_parity import exported

from wds_train.config.presets import preset
from wds_train.config.recipe import Recipe
from wds_train.config.settings import with_settings
from wds_train.errors import RunError, StoreError, UsageError
from wds_train.models.pretrained import as_init

NAME = "test_resnet.r160_in1k"
PLACE = f"/timm/{NAME}/resolve/main/model.safetensors"


def tensors(
    name: str = "test_resnet", classes: int = 1000, **options: object
) -> dict[str, torch.Tensor]:
    return timm.create_model(name, num_classes=classes, **options).state_dict()


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that refuses connections, and nothing that was fetched before."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def hub(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub that has test_resnet's weights; what it was asked for."""
    asked: list[str] = []
    body = save({name: value.contiguous() for name, value in tensors().items()})

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            found = self.path in ("/", PLACE)
            self.send_response(200 if found else 404)
            self.send_header("ETag", '"1f2e"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()

        def do_GET(self) -> None:
            asked.append(self.path)
            self.do_HEAD()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield asked
        server.shutdown()


def test_timms_weights_come_from_the_hub_once(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trainer("model.name=test_resnet", "model.init=timm:")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the network is gone
    again = trainer("model.name=test_resnet", f"model.init=timm:{NAME}")
    assert asked_of(hub) == [PLACE]
    assert "but for the head" in first.notes[0]
    states = [
        {n: v for n, v in each.model.state_dict().items() if "fc." not in n}
        for each in (first, again)
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(
        states[0]["conv1.0.weight"], trainer().model.state_dict()["conv1.0.weight"]
    )


def asked_of(hub: list[str]) -> list[str]:
    return [path for path in hub if path.endswith(".safetensors")]


def test_without_a_network_one_sentence_says_which_file_to_bring(no_hub: None) -> None:
    with pytest.raises(StoreError) as caught:
        trainer("model.name=test_resnet", "model.init=timm:")
    assert re.fullmatch(
        r"model.init = 'timm:test_resnet': the weights could not be fetched "
        r"\(ConnectError: [^\n]*\); download "
        rf"https://huggingface.co{PLACE} where there is a network, and name that file here: "
        r"--init FILE",
        str(caught.value),
    )
    with pytest.raises(
        StoreError, match=r"name a file of `wds-train export`: --set distill.teacher=FILE"
    ):
        trainer("distill.teacher=timm:test_resnet")


@pytest.mark.parametrize("setting", ["model.init", "distill.teacher"])
@pytest.mark.parametrize("name", ["resnet5O", "resnet18.nonsense", "resnetblur18"])
def test_weights_that_timm_does_not_have(setting: str, name: str) -> None:
    with pytest.raises(
        UsageError, match=rf"{setting} = 'timm:{name}': timm has no pretrained weights of that name"
    ):
        trainer(f"{setting}=timm:{name}")


def plain(folder: Path, name: str = "test_resnet", classes: int = 1000, **options: object) -> Path:
    """Write a file as timm's hub has it; older ones lack BatchNorm's counters."""
    path = folder / "model.safetensors"
    found = {
        n: v
        for n, v in tensors(name, classes, **options).items()
        if not n.endswith("num_batches_tracked")
    }
    save_file(found, path, {"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("classes", "note"),
    [(1000, "but for the head"), (7, "but for the head"), (10, "with the head")],
)
def test_a_file_of_timms_is_taken(tmp_path: Path, classes: int, note: str) -> None:
    path = plain(tmp_path, classes=classes, block_args={"attn_layer": "se"})
    running = trainer(f"model.init={path}", "model.squeeze_excite=true")
    theirs = load_file(path)
    ours = running.model.state_dict()
    body = {name for name in theirs if classes == 10 or not name.startswith("fc.")}
    assert all(torch.equal(ours[name], theirs[name]) for name in body)
    assert note in running.notes[0]


def test_a_file_that_is_not_of_the_model_is_refused(tmp_path: Path) -> None:
    path = plain(tmp_path, "resnet10t")
    with pytest.raises(
        UsageError, match=r"model.safetensors' does not fit the model test_resnet: .*Set model.name"
    ):
        trainer(f"model.init={path}")
    with pytest.raises(RunError, match=r"was not written by this version of `wds-train export`"):
        trainer(f"distill.teacher={path}")
    with pytest.raises(
        UsageError, match=r"weights' cannot be read by timm: let its name end in .safetensors"
    ):
        trainer(f"model.init={shutil.copy(path, tmp_path / 'weights')}")
    path.write_bytes(b"nonsense")
    with pytest.raises(RunError, match="is no safetensors file"):
        trainer(f"model.init={path}")


IMAGES = ("size", "start_size", "eval_size", "eval_crop", "mean", "std")


def images(changed: Recipe) -> tuple[object, ...]:
    return tuple(getattr(changed.data, name) for name in IMAGES)


def test_images_are_those_of_the_weights_but_for_what_is_set(tmp_path: Path) -> None:
    half = (0.5, 0.5, 0.5)
    ours = exported(
        tmp_path, "data.size=40", "data.start_size=24", "data.eval_size=48", "data.eval_crop=0.9"
    )
    digits = recipe().data
    of = {
        "timm:": (160, 0, 160, 0.95, half, half),
        f"timm:{NAME}": (160, 0, 160, 0.95, half, half),
        str(plain(tmp_path)): (160, 0, 160, 0.95, half, half),
        str(ours): (40, 24, 48, 0.9, digits.mean, digits.std),
        "/nowhere": images(preset("finetune")),
    }
    for init, expected in of.items():
        settings = ["model.name=test_resnet", f"model.init={init}"]
        changed = as_init(with_settings(preset("finetune"), settings), settings)
        assert images(changed) == expected, init
        assert changed.data.as_init == (init == "/nowhere")
        settings += ["data.size=80", "data.mean=0,0,0"]
        changed = as_init(with_settings(preset("finetune"), settings), settings)
        assert (changed.data.size, changed.data.mean) == (80, (0, 0, 0)), init
        assert changed.data.eval_size == 80 * expected[2] / expected[0], init  # in proportion
        assert as_init(changed, []) == changed or init == "/nowhere"  # as a run does that goes on
    assert as_init(preset("imagenette"), []) == preset("imagenette")


def test_layers_before_learn_more_slowly() -> None:
    running = trainer("optimizer.layer_decay=0.5")
    scales = {
        weight: group["lr_scale"]
        for group in running.optimizer.param_groups
        for weight in group["params"]
    }
    names = ("conv1.0.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight", "fc.weight")
    found = [scales[running.model.get_parameter(name)] for name in names]
    assert found == sorted({*found})
    assert found[-1] == 1
