"""`bench gpu`, every part at a tiny scale on the CPU, by the code that a GPU would run.

It goes on where it was, and says what it cannot measure.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.gpu import TITLES
from benchmarks.gpu_parts import halved
from benchmarks.gpu_work import SEARCHED, SMOKE
from wds_train.cli import main
from wds_train.config.presets import preset
from wds_train.config.settings import with_settings

pytestmark = pytest.mark.timeout(900)  # all parts in one fixture, on a busy machine


def bench(data: object, out: Path, *arguments: str) -> int:
    return main(["bench", "gpu", "--data", str(data), "--out", str(out), *arguments])


def read(out: Path, part: str) -> dict[str, dict[str, float]]:
    found = json.loads((out / f"{part}.json").read_text())
    assert found["complete"], found
    return found["rows"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def out(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "out"
    assert bench(small, folder, "--smoke") == 0
    return folder


def test_every_part_is_measured_and_drawn(out: Path) -> None:
    assert set(read(out, "a")) == {"64 px, bf16"}
    assert {"wds-train", "timm's parts, NHWC", "timm's parts, NCHW"} == set(
        read(out, "a")["64 px, bf16"]
    )
    fed = read(out, "b")["trainer"]
    assert fed["img_per_s"] > 0 <= fed["data_wait_percent"] <= 100
    assert (
        read(out, "c")["embedded S3 server"]["upload_s"]
        > 0
        < read(out, "c")["local directory"]["stall_ms"]
    )
    resumed = read(out, "d")["--deterministic"]
    assert (resumed["bit_equal"], resumed["largest_difference"]) == (True, 0.0)
    assert read(out, "e")["64 px"]["micro_batches"] == 1
    assert read(out, "f")["gloo"]["loss"] > 0
    assert len(read(out, "g")) == SMOKE.searched + 1
    for part in "abg":
        with Image.open(out / f"{part}.png") as picture:
            assert picture.format == "PNG"


def test_the_table_has_every_part_and_says_what_was_not_measured(out: Path) -> None:
    table = (out / "benchmarks.md").read_text()
    assert all(f"| ({part}) {title} |" in table for part, title in TITLES.items())
    assert "| 80 | 93.5 | not measured | 0 |" in table


def test_what_is_measured_is_not_repeated(
    small: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("?.json")}
    assert bench(small, out, "--smoke") == 0
    assert capsys.readouterr().out.count("measured already") == len(TITLES)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("?.json")} == before


def test_a_row_that_is_there_is_not_repeated(small: str, out: Path) -> None:
    """A machine vanished in the midst of a part."""
    found = json.loads((out / "c.json").read_text())
    found["complete"] = False
    found["rows"] = {"local directory": {"stall_ms": 123.0}}
    (out / "c.json").write_text(json.dumps(found))
    assert bench(small, out, "--smoke", "--parts", "c") == 0
    assert read(out, "c")["local directory"] == {"stall_ms": 123.0}
    assert read(out, "c")["embedded S3 server"]["upload_s"] > 0


def test_figures_of_another_scale_are_not_mixed_in(
    small: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(small, out) == 2
    assert "holds figures of other --data or --smoke" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_every_part_says_so_in_a_line(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(small, tmp_path, "--parts", "a,e") == 0
    said = capsys.readouterr().out
    assert said.count("PyTorch finds no GPU here; --smoke tries the part on the CPU") >= 2
    assert "| (b) the trainer fed by the real loader |  | not measured |" in said


def test_without_images_the_parts_that_need_none_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    assert bench(tmp_path / "data", tmp_path / "out", "--smoke", "--parts", "b,e") == 0
    said = capsys.readouterr().out
    assert (
        f"part b, {TITLES['b']}: --data {tmp_path / 'data'} holds neither a dataset nor images"
        in said
    )
    assert read(tmp_path / "out", "e")


def test_without_time_the_rest_is_named(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(small, tmp_path, "--smoke", "--parts", "c", "--minutes", "0.000001") == 0
    assert "no time is left for local directory; more --minutes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "a,x"], "there is no part x; there are a, b"),
        (["--minutes", "0"], "--minutes: '0' is not a number of more than 0"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert bench(tmp_path, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err


def test_halving_keeps_the_best_and_asks_the_better_more_often() -> None:
    asked: list[tuple[str, int]] = []

    def score(settings: tuple[str, ...], seed: int) -> float:
        asked.append((settings[0], seed))
        return {"a": 1.0, "b": 5.0, "c": 3.0 - 9 * (seed == 1), "d": 4.0, "e": 0.0}[settings[0]]

    assert halved([(name,) for name in "abcde"], score) == ("b",)
    assert [name for name, seed in asked if seed == 1] == ["b", "d", "c"]
    assert [name for name, seed in asked if seed == 2] == ["b", "d"]


@pytest.mark.parametrize("settings", SEARCHED)
def test_what_is_searched_is_a_recipe(settings: tuple[str, ...]) -> None:
    assert (
        with_settings(preset("imagenette"), [*settings, "schedule.epochs=5"]).schedule.epochs == 5
    )
