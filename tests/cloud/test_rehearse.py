"""The rehearsal: two real trainings, and what they took."""

import os
import re
import subprocess
import sys

import pytest


def test_a_notice_a_commit_and_a_replacement_that_goes_on(aws_env: pytest.MonkeyPatch) -> None:
    environment = os.environ | {"WDS_BUCKET": "s3://of-somebody"}
    command = [sys.executable, "-m", "wds_train.cli", "rehearse"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    order = re.findall(r"^notice|stopped by the spot notice at step \d+|^resuming at step \d+", done.stderr, re.M)
    step = int(order[1].rpartition(" ")[2])
    assert order == ["notice", f"stopped by the spot notice at step {step}", f"resuming at step {step}"]
    commit, gone, first = re.findall(r"([\d.]+) s", done.stdout)
    assert f"at step {step}" in done.stdout
    assert f"start to step {step + 1}" in re.sub(" +", " ", done.stdout)
    assert 0 < float(commit) <= float(gone) < 120
    assert float(first) > 0
