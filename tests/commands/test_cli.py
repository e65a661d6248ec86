"""What a person meets at the command line when something is wrong: one line with the value and the remedy, no traceback."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from wds_train.cli import main


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(arguments)
    return code, capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["inspect", "/nowhere"],
            1,
            "there is no dataset at /nowhere (no manifest.json); check the address, or make one: wds-train shards",
        ),
        (["order", "/nowhere"], 1, "there is no dataset at /nowhere"),
        (
            ["train", "--dataset", "/nowhere", "--run", "/tmp/r"],
            1,
            "there is no dataset at /nowhere",
        ),
        (
            ["train", "--set", "optimizer.lrr=1"],
            2,
            "--set knows no 'optimizer.lrr'; did you mean optimizer.lr",
        ),
        (
            ["train", "--recipe", "imagnet"],
            2,
            "there is no recipe 'imagnet'; did you mean imagenette?",
        ),
        (
            ["train", "--mix", "s3://b/x"],
            2,
            "'s3://b/x' is not DATASET=SHARE with a share between 0 and 1",
        ),
        (
            ["train", "--mix", "s3://b/x=1.5"],
            2,
            "'s3://b/x=1.5' is not DATASET=SHARE with a share between 0 and 1",
        ),
        (
            ["inspect", "gs://bucket/x"],
            2,
            "'gs://bucket/x' is neither an address nor a name; it is s3://BUCKET/PREFIX",
        ),
        (["inspect", "s3:///x"], 2, "'s3:///x' names no bucket; write s3://BUCKET/PREFIX"),
        (["order", "/nowhere", "--world", "0"], 2, "'0' is not a whole number of at least 1"),
        (["order", "/nowhere", "--workers", "-1"], 2, "'-1' is not a whole number of at least 0"),
        (["order", "/nowhere", "--workers", "two"], 2, "'two' is not a whole number of at least 0"),
        (["shards", "/nowhere", "/tmp/d"], 2, "/nowhere"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    got, err = answer(capsys, *arguments)
    assert got == code, err
    assert message in err
    assert "Traceback" not in err
    assert "\n" not in err.removeprefix("loading PyTorch ...\n")


def test_a_missing_dataset_on_s3(capsys: pytest.CaptureFixture[str], s3_url: str) -> None:
    assert answer(capsys, "inspect", f"{s3_url}/none") == (
        1,
        f"wds-train: error: there is no dataset at {s3_url}/none (no manifest.json); check the address, or make one: "
        f"wds-train shards SOURCE {s3_url}/none",
    )


def test_wrong_credentials(
    capsys: pytest.CaptureFixture[str], s3_url: str, aws_env: pytest.MonkeyPatch
) -> None:
    aws_env.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    code, err = answer(capsys, "inspect", s3_url)
    assert code == 1
    assert re.fullmatch(
        rf"wds-train: error: access to {s3_url}/manifest.json was denied .*check AWS_SECRET_ACCESS_KEY",
        err,
    )


def test_a_folder_without_images(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, err = answer(
        capsys,
        "shards",
        str(tmp_path / "empty"),
        str(tmp_path / "out"),
        "--spool",
        str(tmp_path / "spool"),
    )
    assert code == 1
    assert str(tmp_path / "empty") in err
    assert not (tmp_path / "out").exists()


def test_a_closed_pipe_is_no_error(digits: object) -> None:
    url = digits.store.url  # type: ignore[attr-defined]
    shell = f"{sys.executable} -m wds_train.cli order {url} --global-batch 64 | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "loading PyTorch ...\n")
    assert done.stdout.startswith("0\t0\t")


@pytest.mark.parametrize("nobody", ["| true", "> /dev/full", "2>&1 | true"])
def test_a_conversion_goes_on_where_nobody_reads_what_it_says(tmp_path: Path, nobody: str) -> None:
    shell = f"{sys.executable} -m wds_train.cli shards digits {tmp_path}/out --spool {tmp_path}/spool {nobody}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == ("" if "2>&1" in nobody else "reading digits ...\n")
    assert (tmp_path / "out" / "manifest.json").exists()
