"""What a command answers, run in this process."""

import pytest

from wds_train.cli import main


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's own
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip()
