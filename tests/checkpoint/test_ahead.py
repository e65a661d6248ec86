"""Rows of metrics that are uploaded ahead of their commit: those of a killed attempt are kept."""

from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import FRESH, snapshot
from waiting import wait_until

from wds_train.checkpoint import lease as leases
from wds_train.checkpoint import run_manifest as states
from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import REPLAYED, Progress
from wds_train.errors import Unavailable
from wds_train.storage.base import Store
from wds_train.storage.open import open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "run"))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "is_gone", lambda owner: True)  # as in test_checkpoint
    monkeypatch.setattr("wds_train.checkpoint.metrics_upload.EVERY_SECONDS", 0.01)


def begun(store: Store) -> Run:
    run = Run.claim(store, FRESH, print)
    run.begin()
    return run


def log(run: Run, *steps: int) -> None:
    for step in steps:
        run.uploader.log(row(run, step), Progress(step, evaluated=step))


def row(run: Run, step: int) -> dict[str, Any]:
    return {"step": step, "train/loss": step / 7, "time/attempt": run.manifest.fence}


def commit(run: Run, step: int) -> None:
    run.committer.commit(snapshot(step), {}, [row(run, step)])
    run.committer.wait()


def steps(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(row["time/attempt"], row["step"]) for row in rows]


def test_rows_beyond_the_last_commit_of_a_killed_attempt_are_replayed(store: Store) -> None:
    first = begun(store)
    log(first, 1, 2, 3)
    wait_until(lambda: first.manifest.replayed)
    commit(first, 2)  # of a snapshot from before step 3, which goes up later
    assert steps(Run(store, *read_run(store)).replayed()) == []  # it may yet commit them
    log(first, 4)
    wait_until(lambda: len(first.manifest.replayed) == 2)
    second = begun(store)  # the first was killed
    assert steps(second.replayed()) == [(1, 3), (1, 4)]
    assert second.replayed() == [row(first, 3), row(first, 4)]
    log(second, 3)
    wait_until(lambda: len(second.manifest.replayed) == 3)
    commit(second, 4)
    assert steps(second.replayed()) == [
        (1, 3),
        (1, 4),
    ]  # nothing of the second's, which is committed
    assert {entry.key for entry in store.list()} == second.manifest.keys | {states.NAME}


def test_what_is_committed_before_is_not_put(store: Store) -> None:
    run = begun(store)
    commit(run, 5)
    log(run, 5)
    wait_until(lambda: not run.uploader._rows)
    assert run.manifest.replayed == ()


def test_what_a_rollback_takes_back_is_replayed(store: Store) -> None:
    run = begun(store)
    for step in (1, 2, 3):
        commit(run, step)
    run.end("interrupted")
    Run.roll_back(store, 2, print)
    assert steps(Run(store, *read_run(store)).replayed()) == [(1, 3)]


def test_rows_that_cannot_be_put_are_put_later(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun(store)
    write = store.write

    def fails(key: str, *arguments: Any, **named: Any) -> str:
        raise Unavailable("no answer")

    monkeypatch.setattr(store, "write", fails)
    log(run, 1)
    wait_until(lambda: "the newest rows of the metrics wait" in capsys.readouterr().out)
    monkeypatch.setattr(store, "write", write)
    wait_until(lambda: run.manifest.replayed)
    run.committer.check()  # nothing ends the training


def test_one_that_was_replaced_puts_no_more(store: Store) -> None:
    old = begun(store)
    new = begun(store)
    log(old, 1)
    wait_until(lambda: old.writer.fatal)
    assert (new.manifest.replayed, read_run(store)[0].replayed) == ((), ())


def test_their_number_is_bounded(store: Store) -> None:
    run = begun(store)
    for step in range(1, REPLAYED + 3):
        log(run, step)
        wait_until(lambda at=step: at in [segment.step for segment in run.manifest.replayed])
    assert [segment.step for segment in run.manifest.replayed] == list(range(3, REPLAYED + 3))
    again = begun(store)
    assert {entry.key for entry in store.list("metrics/")} == {
        s.object.key for s in again.manifest.replayed
    }
