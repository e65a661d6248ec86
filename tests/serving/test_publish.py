"""`wds-train publish`: complete folders, true cards, and a hub that refuses."""

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from answers import answer

from wds_train import serving
from wds_train.cli import main
from wds_train.dataset.reader import Dataset
from wds_train.evaluation.evaluate import choose_weights
from wds_train.serving.provenance import remove_places
from wds_train.serving.publishing import push

yaml = pytest.importorskip("yaml")


@pytest.fixture(scope="module")
def published(served: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WDS_HOME", str(folder / "home"))
        assert main(["publish", served, "--to", str(folder / "out"), "--licence", "cc-by-4.0"]) == 0
    return folder / "out"


def head_of(path: Path) -> dict[str, object]:
    _, head, _ = path.read_text().split("---\n", 2)
    return yaml.safe_load(head)


def test_both_folders_are_complete(published: Path) -> None:
    found = {str(path.relative_to(published)) for path in published.rglob("*") if path.is_file()}
    assert found == {
        *(
            f"model/{name}"
            for name in ("README.md", "config.json", "model.onnx", "model.safetensors")
        ),
        *(
            f"space/{name}"
            for name in ("README.md", "app.json", "app.py", "classifier.py", "requirements.txt")
        ),
        *(f"space/models/{kind}-00000044.onnx" for kind in ("raw", "ema")),
    }
    assert "torch" not in (published / "space" / "requirements.txt").read_text()
    model = timm.create_model(f"local-dir:{published / 'model'}", pretrained=True).eval()
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


def test_the_card_says_what_the_manifest_knows(
    published: Path, served: str, digits: Dataset
) -> None:
    manifest = json.loads((Path(served) / "manifest.json").read_text())
    metrics = manifest["checkpoints"][-1]["metrics"]
    head, text = (
        head_of(published / "model" / "README.md"),
        (published / "model" / "README.md").read_text(),
    )
    assert (head["license"], head["library_name"]) == ("cc-by-4.0", "timm")
    scores = {
        entry["name"]: (entry["value"], entry["args"])
        for result in head["model-index"][0]["results"]  # type: ignore[index]
        for entry in result["metrics"]
    }
    view = {"size": 16, "crop": 1.0, "tta": "none"}
    assert scores["top-1, raw weights"] == (pytest.approx(metrics["val/top1"], abs=1e-3), view)
    assert scores["top-5, ema weights"] == (pytest.approx(metrics["val/top5_ema"], abs=1e-3), view)
    assert f"| ema | 2 | {metrics['val/top1_ema']:.2f} % |" in text
    assert digits.fingerprint in text and "360 images" in text and "dollars not recorded" in text
    # timm's own card of the model has these words.
    for word in ("apache", "arxiv", "a1_in1k"):
        assert word not in text


def test_nothing_tells_where_the_owner_keeps_things(
    published: Path, served: str, digits: Dataset
) -> None:
    places = [str(Path(served).parent).encode(), digits.store.url.encode()]
    for path in published.rglob("*"):
        assert path.is_dir() or not [place for place in places if place in path.read_bytes()], path


def test_a_path_in_the_recipe_becomes_a_name(served: str) -> None:
    weights = choose_weights(served, "ema", None)
    model = replace(weights.recipe.model, init="/home/me/secret/first.safetensors")
    found = remove_places(replace(weights, recipe=replace(weights.recipe, model=model)))
    assert (found.run, found.recipe.model.init) == ("digits-run", "first.safetensors")


def test_the_page_is_described(published: Path) -> None:
    head = head_of(published / "space" / "README.md")
    pins = dict(
        line.split("==") for line in (published / "space" / "requirements.txt").read_text().split()
    )
    assert {name: head[name] for name in ("sdk", "sdk_version", "app_file", "license")} == {
        "sdk": "gradio",
        "sdk_version": pins["gradio"],
        "app_file": "app.py",
        "license": "cc-by-4.0",
    }
    about = json.loads((published / "space" / "app.json").read_text())
    assert len(about["choices"]) == 2
    assert {*about["choices"]} <= {*about["models"]}


@pytest.mark.parametrize(
    "case",
    [
        (["--to", "new"], 2, "the following arguments are required: --licence"),
        (
            ["--to", "new", "--licence", "My Own!"],
            2,
            "--licence 'My Own!' is no identifier of the hub",
        ),
        (
            ["--to", "new", "--licence", "mit", "--push", "name"],
            2,
            "--push 'name' is no name on the hub; write OWNER/NAME",
        ),
        (["--to", "full", "--licence", "mit"], 2, "full is there and not empty"),
        (["--to", "file/below", "--licence", "mit"], 2, "file/below cannot be written"),
    ],
)
def test_what_cannot_work_leaves_nothing(
    served: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[list[str], int, str],
) -> None:
    arguments, expected, message = case
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    code, _, err = answer(capsys, "publish", served, *arguments)
    assert (code, message in err, "Traceback" in err) == (expected, True, False), err
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "home"] == before


def test_a_folder_that_is_taken_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").touch()
    code, _, err = answer(
        capsys, "publish", tmp_path / "no-run", "--to", tmp_path, "--licence", "mit"
    )
    assert (code, f"{tmp_path} is there and not empty" in err) == (2, True), err


class _Hub(http.server.BaseHTTPRequestHandler):
    """A hub that lets nobody in."""

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_error(403)

    do_GET = do_POST


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("case", ["no token", "no right", "no network"])
def test_a_hub_that_cannot_be_used_is_told_with_what_to_type(
    published: Path, hub: str, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    from wds_train.errors import WdsTrainError

    monkeypatch.setenv("HF_TOKEN", "" if case == "no token" else "hf_secret_of_a_test")
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", hub if case == "no right" else "http://127.0.0.1:9"
    )
    with pytest.raises(WdsTrainError) as error:
        push(published, "me/digits")
    assert {"no token": "there is no token", "no right": "403", "no network": "Connect"}[
        case
    ] in str(error.value)
    assert f"hf upload me/digits {published}/model\n" in str(error.value)
    assert "hf_secret" not in str(error.value)


def test_without_the_extra_it_says_what_to_install(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "wds_train.serving.publishing")
    monkeypatch.delattr(serving, "publishing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, err = answer(capsys, "publish", served, "--to", tmp_path / "out", "--licence", "mit")
    assert (code, "publish needs huggingface_hub: install wds-train[serve]" in err) == (2, True)
