"""The loaders' benchmark, on a tiny dataset and a real S3 server.

Whole epochs, figures that add up, peers that are absent or fail named, and nothing left behind.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.loader_rates import FIGURES, one_pass
from benchmarks.passes import cause, in_child
from benchmarks.peers import CONTENDERS, OURS, Pass, missing
from wds_train.cli import main
from wds_train.dataset.reader import Dataset
from wds_train.errors import WdsTrainError

SMALL = [
    "bench",
    "loader",
    "--batch",
    "8",
    "--size",
    "32",
    "--repeats",
    "1",
    "--cores",
    "1",
    "--json",
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the result of `bench loader --peers` for 44 photos."""
    home = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "wds_train.cli", *SMALL, "--samples", "44", "--peers"]
    done = subprocess.run(
        command,
        env=os.environ | {"WDS_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(home.iterdir()) == []
    assert not any(
        str(home).encode() in path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_the_description_names_data_machine_and_versions(result: dict[str, Any]) -> None:
    wanted = {
        "samples": 44,
        "shards": 2,
        "workers": 2,
        "cores": 1,
        "batch": 8,
        "size": 32,
        "repeats": 1,
    }
    assert {name: result[name] for name in wanted} == wanted
    assert result["mean_kb"] > 100
    assert {"torch", "pillow", "webdataset", OURS} <= set(result["versions"])
    assert "CPUs" in result["machine"]


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_loader_reads_a_whole_epoch_or_is_named(result: dict[str, Any], name: str) -> None:
    if missing(name):
        assert result["skipped"][name].endswith("`make bench-peers` installs it")
        pytest.skip(f"{name} is not installed")
    figures = result["loaders"][name]
    assert set(FIGURES) < set(figures)
    assert figures["images"] == 40 if name == OURS else 40 <= figures["images"] <= 44
    assert figures["first_batch_s"] >= figures["open_s"] > 0
    assert figures["workers_rss_mb"] > figures["workers_pss_mb"] > 10


def test_ratios_are_ours_to_the_peer(result: dict[str, Any]) -> None:
    ours, peer, ratios = (
        result["loaders"][OURS],
        result["loaders"]["webdataset"],
        result["ours_to_peer"]["webdataset"],
    )
    assert ratios["cpu_ms_per_img"] == pytest.approx(
        ours["cpu_ms_per_img"] / peer["cpu_ms_per_img"], rel=0.01
    )
    assert OURS not in result["ours_to_peer"]


def test_the_bound_is_what_decoding_checksum_and_server_allow(result: dict[str, Any]) -> None:
    bound = result["bound"]
    assert (
        min(bound["checksum_ms"], bound["decode_ms"], bound["steady_cpu_ms_per_img"]) > 0
    )  # which is more, load decides
    assert (
        bound["server_cpu_ms_per_img"] >= 0
    )  # of 13 images; nothing is known of a server on more cores than the pass
    taken = bound["decode_ms"] + bound["checksum_ms"] + bound["server_cpu_ms_per_img"]
    assert bound["img_per_s"] == pytest.approx(1e3 / taken, rel=0.01)
    assert bound["share_reached"] == pytest.approx(
        bound["steady_img_per_s"] / bound["img_per_s"], rel=0.02
    )
    own = bound["steady_cpu_ms_per_img"] - bound["decode_ms"]
    assert bound["own_to_decode"] == pytest.approx(own / bound["decode_ms"], rel=0.02)


def test_an_existing_dataset_in_a_directory(
    digits: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ours reads it; webdataset, which would have to read S3, is named with the reason."""
    monkeypatch.setenv("WDS_HOME", str(tmp_path))
    before = sorted(Path(digits.store.url).parent.iterdir())
    assert main([*SMALL, "--dataset", digits.store.url, "--peers"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["loaders"][OURS]["images"] == 1437 // 8 * 8
    assert (
        "webdataset failed with code 1: wds_train.errors.UsageError: --peers compares"
        in result["skipped"]["webdataset"]
    )
    assert digits.store.url in result["skipped"]["webdataset"]
    assert sorted(Path(digits.store.url).parent.iterdir()) == before


def test_a_pass_of_one_batch_has_a_rate(tmp_path: Path, digits: Dataset) -> None:
    wanted = Pass(
        digits.store.url, f"{tmp_path}/copies", str(tmp_path), workers=0, batch=1024, side=8
    )
    figures = in_child("measure", OURS, wanted, [0], dict(os.environ))
    assert (figures["images"], figures["server_cpu_ms_per_img"]) == (1024, 0)
    assert figures["steady_img_per_s"] > 0 and figures["steady_cpu_ms_per_img"] > 0


def test_a_pass_that_cannot_work_says_why(tmp_path: Path, digits: Dataset) -> None:
    wanted = Pass(
        digits.store.url, f"{tmp_path}/copies", str(tmp_path), workers=0, batch=2000, side=8
    )
    with pytest.raises(
        WdsTrainError,
        match=r"wds-train failed with code 1: .*1437 samples to train on, fewer than .* 2000",
    ):
        in_child("measure", OURS, wanted, [0], dict(os.environ))


def test_a_peers_pass_that_fails_is_tried_again_and_ours_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted, tried = Pass("d", "c", "f", workers=0, batch=1, side=1), []

    def fails_twice(task: str, name: str, *_: object) -> dict[str, float]:
        tried.append(name)
        if name == OURS or tried.count(name) < 3:
            raise WdsTrainError(f"{name} failed")
        return {"images": 1}

    monkeypatch.setattr("benchmarks.loader_rates.in_child", fails_twice)
    assert one_pass("measure", "litdata", wanted, [0], {}) == {"images": 1}
    with pytest.raises(WdsTrainError, match="wds-train failed"):
        one_pass("measure", OURS, wanted, [0], {})
    assert tried == ["litdata"] * 3 + [OURS]


def test_the_cause_is_the_exception_not_what_follows_it() -> None:
    assert cause("Traceback\nlib.BadError: no {\n  }\n}\n") == "lib.BadError: no {"
    assert cause("first\nlast\n\n") == "last"
    assert cause("") == "nothing was printed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cores", "4096"], "--cores 4096: this process may use"),
        (["--samples", "0"], "--samples: '0' is not a whole number of at least 1"),
        (["--dataset", "/d", "--images", "/i"], "--dataset /d and --images /i exclude each other"),
        (["--images", "/nowhere.tar"], "--images /nowhere.tar cannot be read"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WDS_HOME", str(tmp_path))
    assert main(["bench", "loader", *arguments]) == 2
    assert message in capsys.readouterr().err
