"""The report of a run: its figures are those of the metrics, whatever is missing is said, and the run is left as it was."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from answers import answer
from pages import Page, page_of
from told_runs import (
    BEGAN,
    Paid,
    history_of,
    make_long_run,
    make_newer,
    make_run,
    recipe_of,
    row_of,
)

from wds_train.checkpoint.run_manifest import STATUSES, RunManifest
from wds_train.config.presets import PRESETS, preset
from wds_train.report.charts import timeline_chart
from wds_train.report.page import write
from wds_train.report.run_data import Account
from wds_train.report.run_report import NOT_EVALUATED, Prices, report
from wds_train.report.run_summary import (
    add_up_cost,
    audit_replays,
    choose_milestones,
    describe_expectation,
    list_attempts,
)
from wds_train.storage.open import open_store


def account_of(
    folder: Path, manifest: RunManifest, replayed: list[dict[str, Any]] | None = None
) -> Account:
    """The account of a run whose attempts noted more than `make_run` writes."""
    return replace(Account.of(open_store(str(folder)), manifest, print), replayed=replayed or [])


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty-seven epochs of a run that goes on. Not to be written to."""
    return make_long_run(tmp_path_factory.mktemp("told") / "long")


def test_its_figures_are_those_of_the_metrics(
    long: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, said = page_of(
        capsys, long, tmp_path, "--no-images", "--price", 0.6, "--on-demand-price", 1.2
    )
    rows = history_of(37)
    validated = {f"{row['epoch']:g}": row for row in rows if "val/top1" in row}
    table = next(
        table for caption, table in page.tables.items() if caption.startswith("Milestones")
    )
    assert len(table) == 14
    assert {"1", "37"} <= {line[0] for line in table[1:]}
    for epoch, top1, ema, top5, trained, loss, _, date in table[1:]:
        row = validated[epoch]
        assert (top1, ema, top5) == tuple(
            f"{row[f'val/{name}']:.2f} %" for name in ("top1", "top1_ema", "top5")
        )
        assert (float(trained), float(loss)) == pytest.approx(
            (row["epoch/loss"], row["val/loss"]), rel=1e-3
        )
        assert date.startswith("2023-11-1")
    last = validated["37"]
    assert page.facts["top-1"] == (f"{last['val/top1']:.2f} %", f"EMA {last['val/top1_ema']:.2f} %")
    assert page.facts["expected"] == ("77.2 %", "recipe standard")
    assert page.facts["epochs"][0] == "37 of 40"
    assert page.facts["hours"] == ("2.33", "in 2 attempts")
    assert page.facts["dollars"] == ("$1.40", "on demand $2.80")
    assert page.facts["interruptions"] == ("1", "20.0 min lost")
    assert [line[4] for line in page.tables["Attempts"]] == ["ended", "lost", "running"]
    shown = [tags["id"] for _, tags in page.tags if str(tags.get("id", "")).endswith("-text")]
    names = ["loss", "accuracy", "rate", "resolution", "throughput", "waiting", "attempts"]
    assert shown == [f"{name}-text" for name in names]
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    for line, name in (("raw", "val/top1"), ("EMA", "val/top1_ema")):
        assert f"{line} goes from {validated['1'][name]:.4g} to {last[name]:.4g}" in page.text
    markdown = (tmp_path / "report.md").read_text()
    assert f"| 37 | {last['val/top1']:.2f} % | {last['val/top1_ema']:.2f} % |" in markdown
    assert {*re.findall(r"\]\((\S+)\)", markdown)} == {f"{name}.png" for name in names}
    assert said == ""


def test_the_page_needs_nothing_else_and_names_all_that_is_seen(
    long: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, _ = page_of(capsys, long, tmp_path, "--no-images")
    assert (tmp_path / "report.html").stat().st_size < 1e6
    tags = [name for name, _ in page.tags]
    assert not {"script", "link", "iframe", "object"} & {*tags}
    for name, attributes in page.tags:
        for where in ("src", "href", "xlink:href"):
            assert str(attributes.get(where, "#")).startswith(("#", "data:")), (name, attributes)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len({*ids})
    named = [
        attributes.get("aria-labelledby")
        for name, attributes in page.tags
        if name in ("svg", "section")
    ]
    assert {*named} <= {*ids}
    assert {str(attributes["href"])[1:] for name, attributes in page.tags if name == "a"} <= {*ids}
    regions = [attributes for _, attributes in page.tags if attributes.get("role") == "region"]
    assert all(
        attributes.get("tabindex") == "0" for attributes in regions
    )  # or no key scrolls them


def test_the_command_trains_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of("digits", seed=3, optimizer__lr=0.05)
    make_run(tmp_path / "run", history_of(2), recipe=recipe)
    page, _ = page_of(capsys, tmp_path / "run", tmp_path / "out", "--no-images")
    words = "wds-train train --dataset {0}/no-dataset --run {0} --recipe digits --set seed=3 --set optimizer.lr=0.05"
    assert words.format(tmp_path / "run") in page.text
    assert "This run differs from it by seed=3, optimizer.lr=0.05." in page.text


@pytest.mark.parametrize("name", PRESETS)
def test_every_recipe_s_expectation_is_told_with_its_source(tmp_path: Path, name: str) -> None:
    account = account_of(tmp_path, make_run(tmp_path, history_of(3), recipe=preset(name)))
    text = describe_expectation(account)
    assert PRESETS[name].expected in text
    assert PRESETS[name].source in text
    assert "differs" not in text
    found = re.search(r"At epoch 3 it is ([\d.]+) points below it", text)
    assert bool(found) == (name in ("quick", "standard", "strong", "max", "seed"))
    if found:
        ours, theirs = (
            account.last["val/top1_ema"],
            float(re.findall(r"[\d.]+", PRESETS[name].expected)[0]),
        )
        assert float(found[1]) == pytest.approx(theirs - ours, abs=0.006)


def test_what_interruptions_cost(tmp_path: Path) -> None:
    """The first attempt fell silent at 4,800 s, at step 300 of which 260 were committed; the second was interrupted."""
    attempts = [
        Paid("a", BEGAN, 4800.0, "lost", price=0.5),
        Paid("b", BEGAN + 6000, 3600.0, "interrupted", price=0.4, step=260),
        Paid("c", BEGAN + 10600, 1800.0, "done", price=None, step=520),
    ]
    rows = [row_of(step, 1, BEGAN + step) for step in range(5, 261, 5)]
    rows += [row_of(step, 2, BEGAN + 6000 + 2 * (step - 250)) for step in range(265, 521, 5)]
    folder = tmp_path / "run"
    manifest = make_run(folder, rows, attempts=attempts)
    account = account_of(
        folder, manifest, [row_of(step, 1, BEGAN + step) for step in range(265, 301, 5)]
    )
    first, second, third = list_attempts(account, None)
    assert first.place == "a g5.2xlarge NVIDIA A10G"
    assert (first.down, first.again, first.twice) == (1200.0, 100.0, 40 * 1024)
    assert (second.down, second.again, second.twice) == (1000.0, None, 0)
    assert (third.down, third.again, third.twice) == (0.0, None, None)
    cost = add_up_cost(manifest, [first, second, third], None, 1.0)
    assert (cost.dollars, cost.unpriced) == (pytest.approx(0.5 * 4800 / 3600 + 0.4), 1)
    assert cost.on_demand == pytest.approx((4800 + 3600 + 1800 - 100) / 3600)
    cost = add_up_cost(manifest, list_attempts(account, 2.0), 2.0, None)
    assert (cost.dollars, cost.unpriced, cost.on_demand) == (
        pytest.approx(2 * 10200 / 3600),
        0,
        None,
    )
    page = Page(write(report(account, Prices(), NOT_EVALUATED), tmp_path / "out", "report"))
    assert page.facts["trained twice"] == ("≥ 40,960", "images")
    assert page.facts["dollars"] == ("$1.07", "for instances, without 1 attempt of unknown price")
    assert [line[-2:] for line in page.tables["Attempts"][1:]] == [
        ["21.7", "≥ 40,960"],
        ["16.7", "0"],
        ["–", "–"],
    ]


def test_what_a_crash_loop_costs_is_counted_once(tmp_path: Path) -> None:
    """The first attempt got to step 80, the second, ten hours before the third, to 75; 66 were committed. The third was
    interrupted at 70.
    """
    ends = ("lost", "lost", "interrupted", "done")
    begins = [BEGAN, BEGAN + 1000, BEGAN + 38_000, BEGAN + 39_000]
    steps = (0, 66, 66, 70)
    attempts = [
        Paid("a", *each, step=step)
        for *each, step in zip(begins, [800.0] * 4, ends, steps, strict=True)
    ]
    rows = [
        row_of(66, 1, BEGAN + 700),
        row_of(70, 3, BEGAN + 38_700),
        row_of(80, 4, BEGAN + 39_060),
    ]
    manifest = make_run(tmp_path / "run", rows, attempts=attempts)
    replayed = [row_of(80, 1, BEGAN + 790), row_of(75, 2, BEGAN + 1700)]
    told = list_attempts(account_of(tmp_path / "run", manifest, replayed), None)
    assert [(each.down, each.again) for each in told] == [
        (200.0, 800.0),
        (36_200.0, 800.0),
        (200.0, 60.0),
        (0.0, None),
    ]
    assert [each.twice for each in told] == [14 * 1024, 9 * 1024, 0, None]
    assert add_up_cost(manifest, told, None, 1.0).on_demand == pytest.approx(
        (4 * 800 - 1660) / 3600
    )


def test_no_two_ways_to_end_look_alike() -> None:
    ends = (*STATUSES, "lost")
    spans = [(end, 100.0 * number, 100.0 * number + 90, end) for number, end in enumerate(ends)]
    legend = re.findall(r'style="fill: var\((--\w+)\)', timeline_chart(spans, "").svg)[-len(ends) :]
    assert len({*legend}) == len(ends), legend


def test_the_determinism_audit(tmp_path: Path) -> None:
    history = history_of(4, attempt=2)
    history[9]["train/grad_norm"] = math.nan
    manifest = make_run(tmp_path / "run", history)
    replayed = [row | {"time/unix": 1.0, "time/attempt": 1} for row in history[5:13]]
    account = account_of(tmp_path / "run", manifest, replayed)
    audit = audit_replays(account)
    assert (audit.compared, audit.first, audit.last, audit.waiting, audit.differences) == (
        8,
        25,
        55,
        0,
        [],
    )
    assert audit.verdict == "8 replayed records, of steps 25 to 55: equal to the last bit."
    changed = math.nextafter(replayed[3]["train/loss"], 9)
    replayed[3] = replayed[3] | {"train/loss": changed}
    late = row_of(500, 1, BEGAN)
    account = replace(account, replayed=[*replayed, late])
    audit = audit_replays(account)
    assert (audit.compared, audit.waiting) == (8, 1)
    step, value = replayed[3]["step"], history[8]["train/loss"]
    assert audit.differences == [(step, "train/loss", repr(changed), repr(value))]
    page = Page(write(report(account, Prices(), NOT_EVALUATED), tmp_path / "out", "report"))
    assert (
        f"8 replayed records, of steps 25 to 55: not equal; 1 value of them, first at step {step}."
        in page.text
    )
    assert page.tables["Values that differ"][1] == [
        str(step),
        "train/loss",
        repr(changed),
        repr(value),
    ]
    assert "1 record of dead attempts wait" in page.text


def test_milestones_hold_the_first_the_best_and_the_last() -> None:
    rows = [
        {"step": i, "epoch": float(i), "val/top1": float(i), "val/top1_ema": 1.0 + i}
        for i in range(1, 601)
    ]
    rows[416]["val/top1"], rows[222]["val/top1_ema"] = 999.0, 999.0
    chosen = choose_milestones(rows)
    assert len(chosen) <= 17
    assert {1.0, 223.0, 417.0, 600.0} <= {row["epoch"] for row in chosen}
    assert choose_milestones(rows[:5]) == rows[:5]
    assert choose_milestones([]) == []


def damaged(run: Path) -> None:
    path = sorted(run.glob("metrics/*"))[1]
    path.write_bytes(path.read_bytes()[:-3])


def missing(run: Path) -> None:
    sorted(run.glob("metrics/*"))[1].unlink()


def odd_rows(run: Path) -> None:
    """A segment with NaN, and a row that cannot be placed."""
    rows = [row_of(5, 1, BEGAN) | {"train/loss": math.nan}, {"train/loss": 1.0}, *history_of(2)[1:]]
    make_run(run, rows)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (damaged, r"metrics metrics/\S+ cannot be used \(.* is damaged: .*\)"),
        (missing, r"metrics metrics/\S+ cannot be used \(.* is missing\)"),
        (
            make_newer,
            r"'newer' is nothing that this wds-train knows; use the one that wrote it; what needs the recipe is left out",
        ),
        (
            odd_rows,
            r"a row has no step or epoch, 1 time: left out(?s:.*)train/loss is not finite, 1 time: left out",
        ),
    ],
)
def test_what_is_damaged_is_said_and_the_rest_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], sentence: str
) -> None:
    run = tmp_path / "run"
    make_run(run, history_of(6))
    spoil(run)
    page, said = page_of(capsys, run, tmp_path / "out", "--no-images")
    assert re.search(sentence, page.text)
    assert re.search(sentence, said)
    assert "loss-text" in [attributes.get("id") for _, attributes in page.tags]
    assert "attempts-text" in [attributes.get("id") for _, attributes in page.tags]


def test_a_run_without_metrics_and_without_a_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", [], attempts=[])
    page, said = page_of(capsys, tmp_path / "run", tmp_path / "out")
    assert "no metrics are committed yet" in said
    assert "No epoch has been validated yet." in page.text
    assert "The model could not be evaluated: run run has no validated checkpoint yet" in page.text
    assert page.facts["top-1"] == ("–", "EMA –")
    assert page.facts["epochs"] == ("0 of 40", "step 0")


def test_a_manifest_of_a_newer_format_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", [])
    path = tmp_path / "run" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    code, _, said = answer(capsys, "report", tmp_path / "run", "--out", tmp_path / "out")
    assert (code, "has format 2, this wds-train reads format 1; upgrade it" in said) == (1, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_place_that_cannot_be_written_is_said(
    long: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").touch()
    arguments = [command, long, *([long] if command == "compare" else ["--no-images"]), "--out"]
    code, _, said = answer(capsys, *arguments, tmp_path / "file")
    assert (code, said) == (2, f"wds-train: error: --out {tmp_path}/file is a file; give a folder")
    code, _, said = answer(capsys, *arguments, "/proc/nope")
    assert (
        code,
        "/proc/nope cannot be written (No such file or directory); give another --out DIR" in said,
    ) == (
        2,
        True,
    )
