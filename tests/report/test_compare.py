"""Runs beside one another: where they differ, what they reached."""

import re
from pathlib import Path

import pytest
from answers import answer
from pages import Page
from told_runs import history_of, make_long_run, make_newer, make_run, recipe_of


def test_what_differs_and_what_was_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, other = make_long_run(tmp_path / "long"), tmp_path / "other"
    make_run(other, history_of(3), recipe=recipe_of(seed=1, optimizer__lr=2.0, mix__mixup=0.2))
    code, out, said = answer(
        capsys, "compare", long, other, "--price", 2, "--out", tmp_path / "out"
    )
    assert (code, said) == (0, "")
    lines = {
        line.split("  ")[0]: line.split("  ", 1)[1].split()
        for line in out.splitlines()
        if "  " in line
    }
    reached = {row["epoch"]: row["val/top1"] for row in history_of(37) if "val/top1" in row}
    top = {epoch: f"{value:.2f}" for epoch, value in reached.items()}
    assert lines["top-1"] == [top[37.0], "%", top[3.0], "%"]
    assert lines["dollars"] == ["$4.67", "$2.00"]
    different = {name: values for name, values in lines.items() if "." in name or name == "seed"}
    assert different == {
        "dataset.url": [f"{long}/no-dataset", f"{other}/no-dataset"],
        "seed": ["0", "1"],
        "optimizer.lr": ["1.7", "2.0"],
        "mix.mixup": ["0.0", "0.2"],
    }
    page = Page(tmp_path / "out" / "compare.html")
    assert page.tables["Where they differ"][0] == ["setting", "long", "other"]
    assert page.facts["other"][0] == f"{top[3.0]} %"
    assert f"long goes from {reached[1.0]:.4g} to {reached[37.0]:.4g}; other goes from" in page.text
    assert (tmp_path / "out" / "accuracy.png").exists()


def test_compare_of_runs_that_are_hard_to_tell_or_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, twin = make_long_run(tmp_path / "one" / "long"), tmp_path / "long"
    make_run(twin, [], recipe=recipe_of())
    make_newer(twin)
    code, out, said = answer(capsys, "compare", long, twin)
    assert code == 0
    assert out.splitlines()[0].split() == [str(long), str(twin)]
    assert "what needs the recipe is left out" in said
    assert re.search(r"optimizer\.lr +1\.7 +\?", out)
    assert answer(capsys, "compare", long, long)[1].endswith("recipes and datasets are the same")
    code, _, said = answer(capsys, "compare", long)
    assert (
        code,
        f"compare needs two runs or more, {long} is one; `wds-train report` tells of one" in said,
    ) == (
        2,
        True,
    )
    code, _, said = answer(capsys, "compare", long, tmp_path / "none")
    assert (code, "there is no run at" in said) == (1, True)
