"""What a command answers, run in this process."""

import sys
from pathlib import Path

import pytest

from shards import make_shards
from wds_train.cli import main


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's own
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out.strip(), captured.err.strip()


def conversion(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    before, sys.argv = sys.argv, ["make_shards", *map(str, arguments), "--processes", "1"]
    try:
        code = make_shards.main()
    finally:
        sys.argv = before
    return code, "".join(capsys.readouterr())
