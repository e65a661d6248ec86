"""Numbers in the environment are refused as those of flags are.

One line names variable, value and range.
"""

import os
from pathlib import Path

import pytest

from wds_train.cli import main
from wds_train.environment import PLACE, SETTINGS, number_of
from wds_train.errors import UsageError
from wds_train.loader.workers import default_workers
from wds_train.storage.s3_connection import PATIENCE_SECONDS, S3Connection
from wds_train.training.ranks import Ranks

WORDS = ["abc", "", " ", "nan", "inf", "-inf", "-1", "1,5", "0x10", "5 s", "١٢x"]
RANGES = {
    "WDS_S3_PATIENCE": "a number of at least 0",
    "RANK": "a whole number of at least 0",
    "LOCAL_RANK": "a whole number of at least 0",
    "WORLD_SIZE": "a whole number of at least 1",
    "LOCAL_WORLD_SIZE": "a whole number of at least 1",
    "MASTER_PORT": "a whole number from 1 to 65535",
    "WDS_LAUNCHER": "a whole number of at least 1",
}
FROM_ONE = ["WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "WDS_LAUNCHER"]
CASES = [
    *((name, text) for name in RANGES for text in WORDS),
    *((name, "0") for name in FROM_ONE),
    *((name, "1.5") for name in PLACE),
    ("MASTER_PORT", "65536"),
    ("MASTER_PORT", "1e3"),
    ("WDS_S3_PATIENCE", "1e999"),
]


@pytest.fixture
def here(tmp_path: Path, aws_env: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in RANGES:
        aws_env.delenv(name, raising=False)
    aws_env.setenv("WDS_HOME", str(tmp_path / "home"))
    aws_env.chdir(tmp_path)
    return aws_env


def test_every_variable_is_looked_at() -> None:
    assert {**SETTINGS, **PLACE}.keys() == RANGES.keys()


@pytest.mark.parametrize(("name", "text"), CASES)
def test_no_number_is_one_line_and_no_work(
    here: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
) -> None:
    here.setenv(name, text)
    assert main(["train", "--dataset", "./photos", "--shard", "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith(
        f"wds-train: error: {name} = {text!r} in the environment is not {RANGES[name]}; "
    )
    assert err.endswith(" unset it\n")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(UsageError, match=f"{name} = "):
        number_of(name, 0)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("WDS_S3_PATIENCE", "0", 0.0),
        ("WDS_S3_PATIENCE", "1.5", 1.5),
        ("WDS_S3_PATIENCE", " 1e3 ", 1000.0),
        ("RANK", "0", 0),
        ("WORLD_SIZE", "8", 8),
        ("MASTER_PORT", "65535", 65535),
    ],
)
def test_a_number_is_taken(here: pytest.MonkeyPatch, name: str, text: str, value: float) -> None:
    assert number_of(name, 7) == 7
    here.setenv(name, text)
    assert number_of(name, 7) == value


@pytest.mark.parametrize("text", ["abc", "-1", "nan", ""])
@pytest.mark.parametrize("command", ["recipes", "runs", "shards digits"])
def test_a_setting_is_looked_at_before_any_command(
    here: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    text: str,
) -> None:
    (tmp_path / ".env").write_text(f"WDS_S3_PATIENCE='{text}' # from the file\n")
    here.setenv("WDS_S3_PATIENCE", "x")  # for monkeypatch to take away what the file sets
    here.delenv("WDS_S3_PATIENCE")
    assert main(command.split()) == 2
    assert capsys.readouterr().err.startswith(
        f"wds-train: error: WDS_S3_PATIENCE = {text!r} in the environment is not"
    )
    assert [path.name for path in tmp_path.iterdir()] == [".env"]


def test_numbers_reach_what_uses_them(here: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert S3Connection("bucket", "", None).patience == PATIENCE_SECONDS
    here.setenv("WDS_S3_PATIENCE", "3")
    assert S3Connection("bucket", "", None).patience == 3.0
    here.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    here.setattr("wds_train.machine.ROOT", tmp_path)  # no quota of a container
    assert default_workers() == 15
    here.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers() == 3
    here.setenv("RANK", "1")
    here.setenv("WORLD_SIZE", "2")
    here.setenv("LOCAL_RANK", "1")
    here.setenv("MASTER_ADDR", "127.0.0.1")
    here.setenv("MASTER_PORT", "29500")
    ranks = Ranks.of_environment(cpu=True)
    assert (ranks.rank, ranks.size, ranks.local) == (1, 2, 1)


@pytest.mark.parametrize(
    ("given", "lacks"),
    [
        ((), "MASTER_ADDR and MASTER_PORT"),
        (("MASTER_ADDR",), "MASTER_PORT"),
        (("MASTER_PORT",), "MASTER_ADDR"),
    ],
)
def test_ranks_without_a_place_to_meet_are_refused(
    here: pytest.MonkeyPatch, given: tuple[str, ...], lacks: str
) -> None:
    here.delenv("MASTER_ADDR", raising=False)
    here.setenv("WORLD_SIZE", "2")
    for name in given:
        here.setenv(name, "1")
    with pytest.raises(
        UsageError, match=f"WORLD_SIZE = 2, but the environment lacks {lacks}; start with torchrun"
    ):
        Ranks.of_environment(cpu=True)
