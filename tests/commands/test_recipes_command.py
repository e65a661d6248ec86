"""`wds-train recipes`: what it prints can be typed, and its pictures show the schedule that the training follows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from wds_train.cli import main
from wds_train.config.presets import PRESETS, preset
from wds_train.config.recipe import Recipe
from wds_train.config.schedule import image_side, lr_share
from wds_train.config.settings import setting_names, setting_of, with_settings


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["recipes", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_list_is_a_table_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    head, *rows = lines(capsys)[:-2]
    assert head.split() == ["name", "model", "epochs", "batch", "size", "hours", "expected"]
    assert [row.split()[0] for row in rows] == list(PRESETS)
    for name in ("model", "epochs", "batch", "size", "hours", "expected"):
        column = head.index(name)
        assert all(row[column - 1] == " " and row[column] != " " for row in rows), name
    assert rows[0].split()[:5] == ["quick", "resnet50", "16", "1024", "160-192"]
    listed = json.loads("\n".join(lines(capsys, "--json")))
    assert [row["expected"] for row in listed] == [each.expected for each in PRESETS.values()]


@pytest.mark.parametrize("name", PRESETS)
def test_every_field_is_printed_as_set_takes_it(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    printed = [line for line in lines(capsys, name) if line[:2] in ("  ", "* ") and "=" in line[2:]]
    settings = {line[2:].split("=")[0]: line[2:].split()[0] for line in printed}
    assert list(settings) == list(setting_names())
    assert with_settings(Recipe(name=name), [*settings.values()]) == preset(name)
    default, changed = (
        Recipe(name=name),
        [line[2:].split()[0] for line in printed if line[0] == "*"],
    )
    all_named = [
        f"{field}={setting_of(default, field)}" for field in setting_names()
    ]  # so that nothing follows
    assert with_settings(default, [*all_named, *changed]) == preset(name)  # none is missing
    for each in changed:
        assert with_settings(default, [each]) != default, each  # none is too many


def test_settings_change_what_is_shown_and_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    shown = lines(capsys, "imagenette", "--set", "batch=128", "--set", "data.size=160")
    assert "but --set changes batch, data.size, data.eval_size here" in "\n".join(shown)
    assert any(line.split() == ["*", "batch=128", "256"] for line in shown)
    assert "resolution  160 px throughout" in shown
    assert not any("--set changes" in line for line in lines(capsys, "imagenette"))


@pytest.mark.parametrize("name", ["quick", "strong", "onecycle"])
def test_the_chart_is_the_schedule(capsys: pytest.CaptureFixture[str], name: str) -> None:
    recipe, shown = preset(name), lines(capsys, name)
    first = shown.index("learning rate") + 1
    rows = [line.partition("|")[2].ljust(64) for line in shown[first : first + 9]]
    assert float(shown[first].split("|")[0]) == pytest.approx(recipe.peak_lr, rel=1e-2)
    for column in range(64):
        share = lr_share(
            recipe.schedule, int((column + 0.5) / 64 * recipe.schedule.epochs * 1000), 1000
        )
        marked = [8 - row for row in range(9) if rows[row][column] == "*"]
        assert min(abs(row - 8 * share) for row in marked) <= 0.51, (column, share, marked)
    assert shown[first + 10].split()[-2:] == [str(recipe.schedule.epochs), "epochs"]
    assert all(len(line) <= 90 for line in shown[first:])


def test_the_chart_of_the_resolution(capsys: pytest.CaptureFixture[str]) -> None:
    shown = lines(capsys, "quick", "--set", "data.start_size=128")
    first, recipe = (
        shown.index("resolution, px") + 1,
        with_settings(preset("quick"), ["data.start_size=128"]),
    )
    rows = {
        int(line.split("|")[0]): line.partition("|")[2].ljust(64)
        for line in shown[first : first + 3]
    }
    assert list(rows) == [192, 160, 128]
    for column in range(64):
        side = image_side(recipe.data, column // 4, 16)  # 16 epochs in 64 columns
        assert [each for each, row in rows.items() if row[column] == "*"] == [side]


def test_steps_are_drawn_on_a_logarithmic_axis(capsys: pytest.CaptureFixture[str]) -> None:
    shown = lines(capsys, "step")
    first = shown.index("learning rate, logarithmic") + 1
    assert [shown[first + row].split("|")[0].strip() for row in (0, 4, 8)] == [
        "0.1",
        "0.01",
        "0.001",
    ]
    assert [shown[first + row].count("*") > 20 for row in range(9)] == [
        row % 4 == 0 for row in range(9)
    ]


def test_as_json_and_png(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    full = json.loads(
        "\n".join(lines(capsys, "standard", "--json", "--png", str(tmp_path / "new" / "s.png")))
    )
    recipe = preset("standard")
    assert full["recipe"] == recipe.to_dict()
    assert full["source"] == PRESETS["standard"].source
    assert [entry["lr"] for entry in full["schedule"]] == pytest.approx(
        [recipe.peak_lr * lr_share(recipe.schedule, epoch, 1) for epoch in range(40)]
    )
    assert {entry["size"] for entry in full["schedule"]} == {160, 192}
    assert "data.start_size" in full["changed"]
    assert "seed" not in full["changed"]
    colours = Image.open(tmp_path / "new" / "s.png").convert("RGB").getcolors(1 << 20) or []
    pixels = {colour: count for count, colour in colours}
    # matplotlib's C3, the learning rate, and C0, the resolution: more than their labels are.
    assert min(pixels[214, 39, 40], pixels[31, 119, 180]) > 400, pixels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imagnette"], "there is no recipe 'imagnette'; did you mean imagenette?"),
        (["quick", "--set", "data.sise=1"], "--set knows no 'data.sise'; did you mean data.size"),
        (
            ["quick", "--set", "data.size=0"],
            "data.size = 0 cannot work: it must be at least 8 pixels",
        ),
        (
            ["--png", "x.png"],
            "--set and --png need the NAME of a recipe; there are quick, standard",
        ),
        (
            ["quick", "--png", "/proc/x/y.png"],
            "/proc/x/y.png cannot be written: No such file or directory",
        ),
    ],
)
def test_bad_input_is_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["recipes", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_it_answers_without_pytorch() -> None:
    code = "import sys; from wds_train.cli import main; main(['recipes', 'quick']); sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False
        ).returncode
        == 0
    )


def test_a_recipe_is_its_own_round_trip() -> None:
    for each in PRESETS.values():
        assert Recipe.from_dict(each.recipe.to_dict()) == each.recipe
    older = preset("max").to_dict()
    del older["distill"], older["data"]["repeats"]
    assert Recipe.from_dict(older) == with_settings(preset("max"), ["data.repeats=1"])
