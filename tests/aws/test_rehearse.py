"""The rehearsal: two real trainings, and their times."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_notice_a_commit_and_a_replacement_that_goes_on(aws_env: pytest.MonkeyPatch) -> None:
    environment = os.environ | {"WDS_BUCKET": "s3://of-somebody"}
    command = [sys.executable, "-m", "wds_train.cli", "rehearse"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    order = re.findall(
        r"^notice|stopped by the spot notice at step \d+|^resuming at step \d+", done.stderr, re.M
    )
    step = int(order[1].rpartition(" ")[2])
    assert order == [
        "notice",
        f"stopped by the spot notice at step {step}",
        f"resuming at step {step}",
    ]
    commit, gone, first = re.findall(r"([\d.]+) s", done.stdout)
    assert f"at step {step}" in done.stdout
    assert f"start to step {step + 1}" in re.sub(" +", " ", done.stdout)
    assert 0 < float(commit) <= float(gone) < 120
    assert float(first) > 0


def test_nothing_stays_of_a_rehearsal_that_is_ended(
    aws_env: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "wds_train.cli", "rehearse"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as rehearsal:
        assert rehearsal.stderr
        assert next(line for line in rehearsal.stderr if line.startswith("run  "))
        rehearsal.terminate()
        assert "stopped at once" in rehearsal.communicate()[1]
    assert rehearsal.returncode == 75
    assert not [*tmp_path.glob("wds-rehearsal-*")]
    assert not of_folder(tmp_path)


def of_folder(folder: Path) -> list[str]:
    """Return the processes that were started with `folder` in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if bytes(folder) in (process / "environ").read_bytes():
                found.append(process.name)
        except OSError:  # it has gone, or is another's
            continue
    return found
