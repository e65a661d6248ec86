"""The benchmark of large datasets, on small ones."""

import json
from pathlib import Path

import pytest

from benchmarks.scale import FIGURES
from wds_train.cli import main
from wds_train.dataset.shared_index import ROW


def test_the_figures_of_two_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WDS_HOME", str(tmp_path))
    assert main(["bench", "scale", "--samples", "1e4", "25e3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(size["samples"], size["shards"]) for size in result["sizes"]] == [
        (10_000, 8),
        (25_000, 20),
    ]
    for size in result["sizes"]:
        assert {*FIGURES} == {*size}
        assert size["full_mb"] > size["samples"] * ROW.itemsize / 1e6
        assert size["bytes_per_sample"] == pytest.approx(
            1e6 * size["full_mb"] / size["samples"], rel=0.01
        )
        assert size["step_ms"] > 0 and size["open_s"] < size["first_batch_s"]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WDS_HOME", str(tmp_path))
    assert main(["bench", "scale", "--samples", "1e10"]) == 2
    assert "10,000,000,000 samples take 800.0 GB" in capsys.readouterr().err
