"""ckpt-chaos tries our trainer: killed at each change that it makes, resumed, and compared with a run left alone.

`make chaos-test` installs the tool into an environment of its own and runs this; it takes half an hour on two cores.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_trainer import Server

ROOT = Path(__file__).parents[2]
TOOL = ROOT / ".venv-chaos" / "bin" / "ckpt-chaos"
CLIENT = Path(__file__).with_name("chaos_client.py")
WANTED = "WDS_CHAOS"
EPOCH = r"resuming at step \d+ of \d+ \(epoch (\d+)\."
ALL_POINTS = 1000  # more than there are
JOBS = 2

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get(WANTED), reason=f"half an hour: make chaos-test, which sets {WANTED}"
    ),
    pytest.mark.timeout(7200),
]


@pytest.fixture
def server(
    small: str, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    with Server(tmp_path, small, s3_url) as server:
        monkeypatch.setenv("CHAOS_SOCKET", server.address)
        yield server


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("place", "ranks", "killed"),
    [("directory", 1, 0), ("directory", 2, 0), ("s3", 1, 0), ("s3", 2, 0), ("s3", 2, 1)],
    ids=["directory", "directory-2-ranks", "s3", "s3-2-ranks", "s3-2-ranks-the-second-killed"],
)
def test_every_point_of_ckpt_chaos_passes(
    tmp_path: Path, place: str, ranks: int, killed: int
) -> None:
    assert TOOL.exists(), "ckpt-chaos is not installed: make chaos-test"
    checkpoints = (
        "{out}/run/ckpt/*.safetensors" if place == "directory" else "{out}/ckpt/*.safetensors"
    )
    client = [sys.executable, str(CLIENT)]
    command = [str(TOOL), "run", "--work", str(tmp_path / "work"), "--step-regex", EPOCH]
    command += [
        "--checkpoint-glob",
        checkpoints,
        "--result-cmd",
        shlex.join([*client, "result", place, "{out}"]),
    ]
    command += ["--max-points", str(ALL_POINTS), "--jobs", str(JOBS), "--timeout", "300"]
    command += ["--ranks", str(ranks), "--crash-rank", str(killed)]
    command += ["--fail-on", "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK"]
    command += ["--", *client, "train", place, "{out}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    points = [json.loads(path.read_text()) for path in (tmp_path / "work").glob("pt_*/result.json")]
    assert done.returncode == 0
    assert sum(point["crashed"] for point in points) > len(points) / 2
