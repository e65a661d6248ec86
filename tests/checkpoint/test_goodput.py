"""Goodput: every paid second is in exactly one part, and each cause in its own."""

import json
import re
import signal
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from answers import answer
from hypothesis import given
from hypothesis import strategies as st
from pages import Page
from planted_time import Kill, train_planted
from told_runs import BEGAN, history_of, make_run
from trainers import Job

from wds_train.checkpoint import run_manifest as states
from wds_train.checkpoint.clock import Clock
from wds_train.checkpoint.find import state_of, where_time_went
from wds_train.checkpoint.goodput import Parts, Spent, parts_of
from wds_train.checkpoint.lease import this_process
from wds_train.checkpoint.run_manifest import Attempt, Checkpoint, Object, Progress, RunManifest
from wds_train.report.formatting import describe_goodput, headline, span
from wds_train.report.page import write
from wds_train.report.run_data import Account
from wds_train.report.run_report import NOT_EVALUATED, Prices, report
from wds_train.storage.open import open_store
from wds_train.tracking.wandb_board import Board

ACTIVITIES = ("start", "steps", "data", "commit", "validation")
SECONDS = st.floats(0, 1e6)


def test_a_clock_gives_every_second_to_one_activity() -> None:
    now = [100.0]
    clock = Clock(lambda: now[0])
    spans = [
        ("start", 7),
        ("steps", 2),
        ("data", 3),
        ("steps", 5),
        ("commit", 1),
        ("validation", 11),
        ("commit", 4),
    ]
    for activity, seconds in spans:
        if activity != "start":
            clock.turn(activity)  # type: ignore[arg-type]
        now[0] += seconds
    assert clock.read() == Spent(start=7, steps=7, data=3, commit=5, validation=11)
    assert clock.read().seconds == 33
    assert clock.activity == "commit"


@pytest.mark.parametrize("activity", ACTIVITIES)
def test_what_is_under_way_counts_as_such_where_it_can_come_to_nothing(activity: Any) -> None:
    now = [0.0]
    clock = Clock(lambda: now[0])
    clock.turn(activity)
    now[0] += 5
    clock.turn(activity)
    now[0] += 2
    spent = clock.read()
    assert getattr(spent, activity) == 7
    assert spent.under_way == (2 if activity in ("steps", "validation") else 0)


@given(st.lists(st.tuples(st.sampled_from(ACTIVITIES), st.floats(0, 1e4)), max_size=30))
def test_the_activities_sum_up_to_the_time_that_passed(turns: list[tuple[Any, float]]) -> None:
    now = [0.0]
    clock = Clock(lambda: now[0])
    for activity, seconds in turns:
        clock.turn(activity)
        now[0] += seconds
    assert clock.read().seconds == pytest.approx(now[0], abs=0.01)


def spent_of(values: list[float], under_way: float = 0.0) -> Spent:
    return Spent(*values, under_way=under_way)


@given(
    st.lists(SECONDS, min_size=5, max_size=5),
    st.lists(SECONDS, min_size=5, max_size=5),
    SECONDS,
    st.booleans(),
)
def test_the_parts_of_any_attempt_are_its_whole_time(
    until_commit: list[float], after: list[float], under_way: float, over: bool
) -> None:
    committed = spent_of(until_commit)
    spent = spent_of([one + two for one, two in zip(until_commit, after, strict=True)], under_way)
    parts = parts_of(spent, committed, 1.0, over=over)
    assert parts.paid == pytest.approx(spent.seconds)
    assert min(asdict(parts).values()) >= -1e-6
    if parts.paid:
        assert sum(parts.shares().values()) == pytest.approx(1)
        assert parts.goodput == pytest.approx(parts.shares()["steps"])


AT_COMMIT = Spent(start=10, steps=60, data=5, commit=2, validation=20)
KILLED = Spent(start=10, steps=100, data=9, commit=3, validation=21, under_way=6)


@pytest.mark.parametrize(
    ("spent", "committed", "over", "expected"),
    [
        (AT_COMMIT, AT_COMMIT, True, Parts(60, 10, 5, 2, 20)),
        (KILLED, AT_COMMIT, True, Parts(60, 10, 9, 3, 20, lost=6, trained_twice=35)),
        (KILLED, AT_COMMIT, False, Parts(100, 10, 9, 3, 21)),
        (KILLED, None, True, Parts(0, 10, 9, 3, 0, lost=6, trained_twice=115)),
        (Spent(start=10), None, True, Parts(start=10)),
        (Spent(start=10, data=300), None, True, Parts(start=10, data=300)),
        (Spent(start=10, steps=600, under_way=600), None, True, Parts(start=10, lost=600)),
        (None, None, True, Parts(not_recorded=50)),
        (None, None, False, Parts(not_recorded=50)),
    ],
    ids=[
        "ended",
        "killed",
        "still-running",
        "never-committed",
        "no-step",
        "no-data",
        "hung",
        "old",
        "old-running",
    ],
)
def test_what_becomes_of_an_attempts_time(
    spent: Spent | None, committed: Spent | None, over: bool, expected: Parts
) -> None:
    assert parts_of(spent, committed, 50, over=over) == expected


def checkpoint_of(fence: int, step: int, spent: Spent | None) -> Checkpoint:
    key = f"ckpt/{fence:06d}-{step:09d}-000000.safetensors"
    return Checkpoint(Object(key, 1, "0" * 64), Progress(step), {}, spent)


def run_of(attempts: tuple[Attempt, ...], **changes: Any) -> RunManifest:
    manifest = RunManifest(
        "c1", {}, {}, "", fence=len(attempts), status="interrupted", attempts=attempts
    )
    return replace(manifest, **changes)


def test_a_commit_notes_what_counts_and_a_rollback_takes_it_back() -> None:
    later = replace(AT_COMMIT, steps=90, data=8)
    run = run_of((Attempt("a", BEGAN, ended="interrupted", spent=later),))
    run = run.with_commit(checkpoint_of(1, 10, AT_COMMIT), None).with_commit(
        checkpoint_of(1, 20, later), None
    )
    run = replace(
        run, attempts=(*run.attempts, Attempt("b", BEGAN, step=20, spent=KILLED)), fence=2
    )
    run = run.with_commit(checkpoint_of(2, 30, AT_COMMIT), None)
    before = where_time_went(run, BEGAN)
    assert (before.steps, before.trained_twice, before.lost) == (90 + 60, 35, 6)
    after = where_time_went(
        replace(run, checkpoints=run.checkpoints).up_to(run.checkpoints[0]), BEGAN
    )
    assert run.checkpoints[0].progress.step == 20
    assert (after.steps, after.trained_twice, after.lost) == (90, 35 + 60 + 20, 6)
    assert after.paid == before.paid


def test_a_rollback_within_an_attempt_counts_up_to_its_checkpoint() -> None:
    later = replace(AT_COMMIT, steps=90)
    run = run_of((Attempt("a", BEGAN, ended="interrupted", spent=later, committed=later),))
    run = replace(run, checkpoints=(checkpoint_of(1, 10, AT_COMMIT), checkpoint_of(1, 20, later)))
    parts = where_time_went(run.back_to(10), BEGAN)
    assert (parts.steps, parts.trained_twice) == (60, 30)
    old = replace(run, checkpoints=(checkpoint_of(1, 10, None), checkpoint_of(1, 20, later)))
    assert (
        where_time_went(old.back_to(10), BEGAN).steps == 90
    )  # what is not known is not taken back


@pytest.mark.parametrize("known", [True, False])
def test_attempts_that_are_only_summed_up_keep_their_parts(known: bool) -> None:
    spent = KILLED if known else None
    run = run_of(())
    for _ in range(states.LISTED + 25):
        run = run.with_claim(this_process(), 60, BEGAN)
        run = run.with_attempt(seconds=143.0, spent=spent, committed=AT_COMMIT if known else None)
    run = replace(run, status="failed")
    assert (len(run.attempts), run.earlier.attempts) == (states.LISTED, 25)
    parts = where_time_went(run, BEGAN)
    assert parts.paid == pytest.approx((states.LISTED + 25) * 143)
    assert parts.goodput == (pytest.approx(60 / 143) if known else None)
    dataset = {"url": "", "fingerprint": "f" * 64, "classes": 1, "mix": []}
    read = RunManifest.from_json(replace(run, dataset=dataset).to_json(), "here")
    assert where_time_went(read, BEGAN) == parts


def as_older(data: bytes) -> bytes:
    """The manifest as a version wrote it that knew nothing of goodput."""
    content = json.loads(data)
    content["earlier"].pop("parts")
    for attempt in content["attempts"]:
        attempt.pop("spent"), attempt.pop("committed")
    for checkpoint in content["checkpoints"]:
        checkpoint.pop("spent")
    return json.dumps(content).encode()


def test_an_older_run_is_not_recorded_and_goes_on(tmp_path: Path) -> None:
    attempts = (Attempt("a", BEGAN, 100.0, "interrupted"),)
    old = make_run(
        tmp_path / "run", history_of(2), attempts=attempts, earlier=states.Totals(3, seconds=500.0)
    )
    old = replace(old, checkpoints=(checkpoint_of(1, 10, None),))
    run = RunManifest.from_json(as_older(old.to_json()), "here")
    assert where_time_went(run, BEGAN) == Parts(not_recorded=600)
    assert describe_goodput(where_time_went(run, BEGAN)) == "not recorded, of 10 min paid"
    went_on = run.with_claim(this_process(), 60, BEGAN).with_attempt(
        spent=AT_COMMIT, committed=AT_COMMIT
    )
    parts = where_time_went(replace(went_on, status="done"), BEGAN)
    assert (parts.not_recorded, parts.goodput) == (600, pytest.approx(60 / 697))
    assert headline(parts) == "at least 9 %"


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        (
            Parts(7_000, 200, 300, 20, 250, 30, 0),
            "90 %: of 2 h 10 min paid, start 3 %, data 4 %, commit <1 %, validation 3 %, lost <1 %",
        ),
        (Parts(steps=41), "100 % of 41 s paid"),
        (Parts(start=41), "0 %: of 41 s paid, start 100 %"),
        (Parts(steps=3600, not_recorded=3600), "at least 50 %: of 2 h paid, not recorded 50 %"),
        (Parts(not_recorded=90), "not recorded, of 2 min paid"),
        (Parts(), "nothing is paid yet"),
    ],
)
def test_it_is_told_in_a_line(parts: Parts, line: str) -> None:
    assert describe_goodput(parts) == line


def test_spans_are_told_as_people_do() -> None:
    assert [span(seconds) for seconds in (0, 59, 61, 3599, 3600, 7800, 90_000)] == [
        "0 s",
        "59 s",
        "1 min",
        "1 h",
        "1 h",
        "2 h 10 min",
        "25 h",
    ]


def test_the_newest_attempt_counts_while_it_may_commit() -> None:
    run = run_of(
        (Attempt("a", BEGAN, 50.0, spent=KILLED, committed=AT_COMMIT),),
        status="running",
        lease=60.0,
    )
    run = replace(run, written=BEGAN)
    assert state_of(run, BEGAN + 59) == "running"
    assert where_time_went(run, BEGAN + 59).steps == 100
    assert state_of(run, BEGAN + 61) == "silent"
    assert where_time_went(run, BEGAN + 61).steps == 60
    gone = replace(run, owner=replace(this_process(), started=1))
    assert state_of(gone, BEGAN) == "lost"
    assert where_time_went(gone, BEGAN).trained_twice == 35


class FakePage:
    """W&B's run, as far as a `Board` ends it."""

    starting_step = 0

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}

    def mark_preempting(self) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        pass


@pytest.mark.parametrize("known", [True, False])
def test_wandb_gets_the_goodput_and_its_parts(known: bool) -> None:
    attempt = Attempt("a", BEGAN, 143.0, "interrupted", spent=KILLED, committed=AT_COMMIT)
    run = run_of((attempt if known else replace(attempt, spent=None, committed=None),))
    page = FakePage()
    Board(page).finish(run, "/somewhere")
    found = {name: value for name, value in page.summary.items() if name.startswith("goodput")}
    if not known:
        assert not found
        return
    assert {*found} == {
        "goodput",
        *(f"goodput/{field.name}" for field in fields(Parts) if field.name != "steps"),
    }
    assert found["goodput"] == pytest.approx(60 / 143)
    assert found["goodput/lost"] == pytest.approx(6 / 143)
    assert sum(found.values()) == pytest.approx(1)


@pytest.fixture(scope="module")
def killed_twice(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train four epochs of eleven steps, with a kill in step 19, and one in the second validation.
    Not to be written to.
    """
    folder = tmp_path_factory.mktemp("planted")
    job = Job(small, str(folder / "run"), str(folder))
    assert train_planted(job, Kill(step=19)) == -signal.SIGKILL
    assert train_planted(job, Kill(validation=2)) == -signal.SIGKILL
    assert train_planted(job) == 0, (folder / "planted.log").read_text()
    return folder


PLANTED = {
    "steps": 44.0,
    "start": 3 * 30.5,  # with the wait for the first batch
    "data": 0.5 * (18 + 10 + 32),
    "commit": 4 * 2.0,
    "validation": 4 * (10.0 + 3 * 0.5),  # with the waits for its three batches
    "lost": 4.0 + 4.0,
    "trained_twice": 7.0 + 11.0,
    "not_recorded": 0.0,
}


def test_each_planted_second_is_in_its_own_part(
    killed_twice: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = answer(capsys, "status", killed_twice / "run", "--json")
    assert code == 0
    goodput = json.loads(out)["goodput"]
    assert goodput["seconds"] == pytest.approx(PLANTED)
    assert goodput["paid_s"] == pytest.approx(sum(PLANTED.values()))
    assert goodput["share"] == pytest.approx(44 / sum(PLANTED.values()))
    assert sum(goodput["shares"].values()) == pytest.approx(1)
    line = (
        "18 %: of 4 min paid, start 37 %, data 12 %, commit 3 %, validation 19 %, lost 3 %, "
        "trained twice 7 %"
    )
    _, out, _ = answer(capsys, "status", killed_twice / "run")
    assert f"goodput      {line}" in out.splitlines()
    log = (killed_twice / "planted.log").read_text()
    assert [text for text in log.splitlines() if text.startswith("goodput")] == [f"goodput  {line}"]


def test_the_report_draws_them(killed_twice: Path, tmp_path: Path) -> None:
    store = open_store(str(killed_twice / "run"))
    manifest = RunManifest.from_json(store.read("manifest.json"), "here")
    account = Account.of(store, manifest, print)
    page = Page(write(report(account, Prices(), NOT_EVALUATED), tmp_path, "report"))
    assert page.facts["goodput"] == ("18 %", "of 4 min paid")
    rows = page.tables["Parts of the paid time"][1:]
    assert [row[0] for row in rows] == [
        "steps that count",
        "start",
        "data",
        "commit",
        "validation",
        "lost",
        "trained twice",
    ]
    assert [float(row[2]) for row in rows] == pytest.approx(
        [each / 60 for each in PLANTED.values() if each], abs=0.006
    )
    assert [row[0] for row in page.tables["Paid minutes by attempt"][1:]] == ["1", "2", "3", "all"]
    svg = re.search(
        r"<svg[^>]*goodput-text.*?</svg>", (tmp_path / "report.html").read_text(), re.DOTALL
    )
    assert svg
    for name in (
        "steps that count",
        "start",
        "data",
        "commit",
        "validation",
        "lost",
        "trained twice",
    ):
        assert f">{name} " in svg[0]
    assert "not recorded" not in svg[0]
    assert (tmp_path / "goodput.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_is_interrupted_in_order_loses_nothing_until_a_rollback(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    job = Job(small, str(tmp_path / "run"), str(tmp_path))
    assert train_planted(job, Kill(step=18, sent=number)) == 75, (
        tmp_path / "planted.log"
    ).read_text()
    _, out, _ = answer(capsys, "status", job.run, "--json")
    seconds = json.loads(out)["goodput"]["seconds"]
    assert (seconds["lost"], seconds["trained_twice"]) == (0, 0)
    assert seconds["steps"] == pytest.approx(
        18 + 4
    )  # the step's own second, and those before its signal
    paid = sum(seconds.values())
    code, _, said = answer(capsys, "rollback", job.run, "--to", 11)
    assert code == 0, said
    _, out, _ = answer(capsys, "status", job.run, "--json")
    seconds = json.loads(out)["goodput"]["seconds"]
    assert (seconds["steps"], seconds["trained_twice"]) == (pytest.approx(11), pytest.approx(7 + 4))
    assert sum(seconds.values()) == pytest.approx(paid)
