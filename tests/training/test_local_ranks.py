"""The launcher waits for the ranks of this machine, and ends those that a lost one leaves behind."""

import subprocess
import sys
import time

import pytest

from wds_train.training import local_ranks

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
FAIL = [sys.executable, "-c", "raise SystemExit(3)"]


@pytest.mark.parametrize("commands", [(FAIL, SLEEP), (SLEEP, FAIL), (SLEEP, FAIL, SLEEP)])
def test_a_lost_rank_ends_the_others_wherever_it_stands(
    commands: tuple[list[str], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ranks, "LAST_SECONDS", 0.2)
    ranks = [subprocess.Popen(command) for command in commands]
    began = time.monotonic()
    local_ranks._wait_for(ranks)
    assert time.monotonic() - began < 50
    assert sorted(rank.returncode for rank in ranks) == sorted(
        3 if command is FAIL else -15 for command in commands
    )
