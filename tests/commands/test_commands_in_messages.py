"""A command that a message gives to be typed holds each name as one word of the shell, whatever the name is."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wds_train.cli import main
from wds_train.console import program

FOLDERS = ["my photos", "it's mine", "cost in $", "a;b & c", "-dash", "plain"]


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path, aws_env: pytest.MonkeyPatch) -> Path:
    """A folder of two classes of photos in the current one, under a name that a shell would take apart."""
    aws_env.chdir(tmp_path)
    aws_env.setenv("WDS_HOME", str(tmp_path / "home"))
    aws_env.setenv("WDS_BUCKET", str(tmp_path / "bucket"))
    folder = tmp_path / request.param
    for kind in ("cats", "dogs"):
        (folder / kind).mkdir(parents=True)
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / kind / "0.png")
    return folder


def command(capsys: pytest.CaptureFixture[str], *typed: str, ends: str = "$") -> list[str]:
    """The words of the command in the last line that `wds-train TYPED` says, which reaches as far as `ends`."""
    assert main([*typed]) != 0
    said = capsys.readouterr().err.splitlines()[-1]
    found = re.search(rf"(wds-train (?:shards|train|export) .*?){ends}", said)
    assert found, said
    return shlex.split(found[1])


def test_a_folder_that_is_no_dataset(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = command(capsys, "inspect", f"./{folder.name}", ends="; it is then")
    assert found[:3] == ["wds-train", "shards", f"./{folder.name}"]
    found = command(capsys, "inspect", f"./{folder.name}/none")
    assert found == ["wds-train", "shards", "SOURCE", f"./{folder.name}/none"]


def test_a_folder_that_is_no_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"./{folder.name}/cats"
    found = command(capsys, "train", address, ends=r" \(for a run")
    assert found == ["wds-train", "train", "--dataset", address, "--shard"]


def test_shards_that_one_process_makes_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    found = command(capsys, "train", "--shard", "--dataset", f"./{folder.name}")
    assert found[:3] == ["wds-train", "shards", f"./{folder.name}"]
    assert len(found) == 4


def test_weights_that_are_not_there(
    folder: Path, small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = command(
        capsys, "eval", f"./{folder.name}/x.safetensors", "--dataset", small, ends="` makes one"
    )
    assert found == ["wds-train", "export", "RUN", "--to", f"{folder.name}/x.safetensors"]


def test_tars_on_s3(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = command(capsys, "shards", f"s3://bucket/{folder.name}")
    assert found == ["wds-train", "shards", "index", f"s3://bucket/{folder.name}"]


def test_a_run_like_another_without_a_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = command(capsys, "train", "--like", f"./{folder.name}", "--dataset", "x")
    assert found == ["wds-train", "train", "NAME", "--like", f"./{folder.name}"]


def test_the_program_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", [str(folder / "bin" / "wds-train")])
    assert shlex.split(program()) == [f"{folder.name}/bin/wds-train"]
