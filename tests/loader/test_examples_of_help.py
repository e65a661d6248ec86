"""The examples in the docstrings of the public names run, as `help(TrainLoader)` shows them."""

import doctest
import inspect
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import wds_train
from wds_train.cli import main

DOCUMENTED = ("Dataset", "EvalLoader", "SampleLoader", "TrainLoader", "keyed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, captioned: str) -> Path:
    """A folder with the datasets of the examples: photos of two classes, and images with captions."""
    folder = tmp_path_factory.mktemp("examples")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 40, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        kind = ("cat", "dog")[number % 2]
        (folder / "photos" / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "photos" / kind / f"{number}.png")
    dataset = folder / "photos-dataset"
    assert main(["shards", str(folder / "photos"), str(dataset), "--hold-out", "0.2"]) == 0
    shutil.copytree(captioned, folder / "captions-dataset")
    return folder


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_example_runs(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    documented = getattr(wds_train, name)
    text = inspect.getdoc(documented) or ""
    assert text.count(">>> ") >= 5, f"{name} has no example"
    assert "+SKIP" not in text
    # No names but those that the example imports itself: it can be typed as it stands.
    test = doctest.DocTestParser().get_doctest(text, {}, name, os.devnull, 0)
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert result.failed == 0, "".join(said)
    assert result.attempted >= 5


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_argument_is_described(name: str) -> None:
    documented = getattr(wds_train, name)
    text = inspect.getdoc(documented) or ""
    arguments = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
    for argument in inspect.signature(documented).parameters:
        assert f"    {argument}: " in arguments, f"{name} does not describe {argument}"
