"""A commit whose owner was killed before the swap: the next owner adopts all of it, or none."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_checkpoint import FRESH, RECIPE, commit, flipped, snapshot

from wds_train.checkpoint import lease as leases
from wds_train.checkpoint import run_manifest as states
from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import Pending, Progress, RunManifest
from wds_train.cli import main
from wds_train.config.settings import with_settings
from wds_train.errors import Interrupted
from wds_train.storage.base import Store
from wds_train.storage.open import open_store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(
        str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("s3_url")
    )


@pytest.fixture(autouse=True)
def owners_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "is_gone", lambda owner: True)  # as in test_checkpoint


@pytest.fixture
def said() -> list[str]:
    return []


class Stopped(Exception):
    """Stands in for a kill in the thread that commits."""


def stop(*_: object, **__: object) -> None:
    raise Stopped


def upload(run: Run, step: int, result: dict[str, float] | None = None) -> Pending:
    """Make a commit up to the moment before its swap, which never comes."""
    changes = {} if result is None else {"status": "done", "result": result}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunManifest, "with_commit", stop)
        metrics = {"val/top1": float(step), "val/top1_ema": float(step)}
        run.committer.commit(snapshot(step), metrics, [{"step": step}], **changes)
        with pytest.raises(Stopped):
            run.committer.wait()
    assert run.manifest.pending is not None
    return run.manifest.pending


def resumed_at(run: Run, said: list[str]) -> int:
    restored = run.restore(said.append)
    assert {entry.key for entry in run.store.list()} == run.manifest.keys | {states.NAME}
    assert run.manifest.pending is None
    return 0 if restored is None else restored.progress.step


def steps_logged(run: Run) -> list[float]:
    return [record["step"] for record in run.history()]


@pytest.mark.parametrize(
    "before", [[], [1], [1, 2, 3]], ids=["the first", "the second", "a later one"]
)
def test_a_commit_that_was_uploaded_as_a_whole_is_adopted(
    store: Store, said: list[str], capsys: pytest.CaptureFixture[str], before: list[int]
) -> None:
    run = Run.claim(store, FRESH, said.append)
    for step in before:
        commit(run, step)
    upload(run, 4)
    assert main(["verify", store.url]) == 0
    assert (
        "a resume uses the checkpoint of step 4, ckpt/000001-000000004" in capsys.readouterr().out
    )
    later = Run.claim(store, FRESH, said.append)
    assert resumed_at(later, said) == 4
    assert said == [
        "the commit of step 4 was uploaded by the attempt before, which ended before it was named: "
        "adopted"
    ]
    assert steps_logged(later) == [*before, 4]
    assert later.manifest.checkpoints[-1].metrics == {"val/top1": 4.0, "val/top1_ema": 4.0}
    assert later.manifest.attempts[-1].step == 4
    commit(later, 5)
    assert resumed_at(Run.claim(store, FRESH, said.append), said) == 5
    assert len(said) == 1


@pytest.mark.parametrize("owners", [1, 2, 3])
def test_it_waits_for_an_owner_that_lives_long_enough(
    store: Store, said: list[str], owners: int
) -> None:
    """Those before were killed between their claim and their restore."""
    run = Run.claim(store, FRESH, said.append)
    commit(run, 1)
    upload(run, 2)
    for _ in range(owners):
        later = Run.claim(store, FRESH, said.append)
    assert (resumed_at(later, said), steps_logged(later)) == (2, [1, 2])


def spoil(store: Store, key: str, damage: Callable[[bytes], bytes] | None) -> None:
    data = store.read(key)
    store.delete(key)
    if damage is not None:
        store.write(key, damage(data))


@pytest.mark.parametrize("part", ["checkpoint", "metrics"])
@pytest.mark.parametrize(
    "damage",
    [flipped, lambda data: data[:-3], lambda data: b"", None],
    ids=["flip", "cut", "empty", "gone"],
)
def test_one_that_is_not_whole_is_left_out_as_a_whole(
    store: Store,
    said: list[str],
    capsys: pytest.CaptureFixture[str],
    part: str,
    damage: Callable[[bytes], bytes] | None,
) -> None:
    run = Run.claim(store, FRESH, said.append)
    commit(run, 1)
    pending = upload(run, 2)
    assert pending.segment is not None
    spoil(
        store,
        pending.checkpoint.object.key if part == "checkpoint" else pending.segment.object.key,
        damage,
    )
    assert main(["verify", store.url]) == 0
    assert (
        "a resume uses the checkpoint of step 1, ckpt/000001-000000001" in capsys.readouterr().out
    )
    later = Run.claim(store, FRESH, said.append)
    assert (resumed_at(later, said), steps_logged(later)) == (1, [1])
    assert len(said) == 1
    assert "the commit of step 2 was not finished by the attempt before" in said[0]
    commit(later, 2)
    assert steps_logged(later) == [1, 2]


def test_what_fits_its_digest_and_not_the_run_is_left_out(store: Store, said: list[str]) -> None:
    run = Run.claim(store, FRESH, said.append)
    commit(run, 1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunManifest, "with_commit", stop)
        odd = replace(snapshot(2), tensors={})
        run.committer.commit(odd, {}, [])
        with pytest.raises(Stopped):
            run.committer.wait()
    assert resumed_at(Run.claim(store, FRESH, said.append), said) == 1
    assert "is damaged" in said[0]


@pytest.mark.parametrize("arrives", ["before the commit of its successor", "after it"])
def test_what_a_sleeper_uploads_late_is_never_adopted(
    store: Store, said: list[str], monkeypatch: pytest.MonkeyPatch, arrives: str
) -> None:
    """It had announced its commit, and slept through its successor's claim before the upload."""
    old = Run.claim(store, FRESH, said.append)
    commit(old, 1)
    asleep = threading.Event()
    awake = threading.Event()
    write = store.write

    def sleeps(key: str, *arguments: object, **named: object) -> str:
        if key.startswith("ckpt/000001-000000003"):
            asleep.set()
            assert awake.wait(30)
        return write(key, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "write", sleeps)
    old.committer.commit(snapshot(3), {"val/top1": 99.0, "val/top1_ema": 99.0}, [{"step": 3}])
    assert asleep.wait(30)
    new = Run.claim(store, FRESH, said.append)
    assert resumed_at(new, said) == 1
    if arrives == "after it":
        commit(new, 2)
    awake.set()
    with pytest.raises(Interrupted, match="has claimed"):
        old.committer.wait()
    late = "ckpt/000001-000000003-000003.safetensors"
    assert late in {entry.key for entry in store.list("ckpt/")}
    if arrives != "after it":
        commit(new, 2)
    third = Run.claim(store, FRESH, said.append)
    assert (resumed_at(third, said), steps_logged(third)) == (2, [1, 2])
    assert any(f"removed {late}" in line for line in said)


def test_a_rollback_takes_it_back_too(store: Store, said: list[str]) -> None:
    run = Run.claim(store, FRESH, said.append)
    commit(run, 1)
    commit(run, 2)
    upload(run, 3)
    run.end("interrupted")
    before, after = Run.roll_back(store, 2, said.append)
    assert before.pending is not None and after.pending is None
    assert {entry.key for entry in store.list()} == after.keys | {states.NAME}
    assert resumed_at(Run.claim(store, FRESH, said.append), said) == 2


@pytest.mark.parametrize("same", [True, False], ids=["the same settings", "other settings"])
def test_of_a_run_that_kept_nothing_it_is_adopted_for_the_same_settings_alone(
    store: Store, said: list[str], same: bool
) -> None:
    run = Run.claim(store, FRESH, said.append)
    upload(run, 1)
    run.end("failed")
    now = (
        FRESH
        if same
        else replace(FRESH, recipe=with_settings(RECIPE, ["optimizer.lr=0.3"]).to_dict())
    )
    assert resumed_at(Run.claim(store, now, said.append), said) == (1 if same else 0)


def test_the_last_commit_of_a_run_brings_its_result(store: Store, said: list[str]) -> None:
    run = Run.claim(store, FRESH, said.append)
    commit(run, 1)
    result = {"val/top1": 2.0, "val/top1_ema": 2.0, "epoch/loss": 0.5}
    upload(run, 2, result)
    later = Run.claim(store, FRESH, said.append)
    assert (resumed_at(later, said), later.manifest.status) == (2, "running")
    later.end("done")
    assert (read_run(store)[0].status, read_run(store)[0].result) == ("done", result)


def test_rows_put_ahead_by_the_same_attempt_are_not_replayed(
    store: Store, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wds_train.checkpoint.metrics_upload.EVERY_SECONDS", 0.01)
    run = Run.claim(store, FRESH, said.append)
    commit(run, 1)
    run.uploader._rows.append(({"step": 2.0, "time/attempt": 1}, Progress(2, evaluated=1)))
    run.uploader._put(1)
    assert len(run.manifest.replayed) == 1
    upload(run, 2)
    later = Run.claim(store, FRESH, said.append)
    assert (resumed_at(later, said), later.replayed()) == (2, [])


def test_every_nth_epoch_is_kept_by_an_adoption_too(store: Store, said: list[str]) -> None:
    run = Run.claim(store, FRESH, said.append, keep_every=1)
    for step in (1, 2, 3, 4):
        commit(run, step)
    upload(run, 5)
    later = Run.claim(store, FRESH, said.append, keep_every=1)
    assert resumed_at(later, said) == 5
    assert [checkpoint.progress.step for checkpoint in later.manifest.checkpoints] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_a_commit_that_replaces_one_that_failed_deletes_what_that_uploaded(
    store: Store, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wds_train.errors import Unavailable

    run = Run.claim(store, FRESH, said.append)
    write = store.write

    def fails(key: str, *arguments: object, **named: object) -> str:
        if key.startswith("ckpt/000001-000000001"):
            run.committer.commit(snapshot(2), {}, [{"step": 2}])  # the next waits already
            raise Unavailable("no answer")
        return write(key, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "write", fails)
    monkeypatch.setattr("wds_train.checkpoint.committer.RETRY_SECONDS", 0.01)
    run.committer.commit(snapshot(1), {}, [{"step": 1}])
    run.committer.wait()
    assert [checkpoint.progress.step for checkpoint in run.manifest.checkpoints] == [2]
    assert steps_logged(run) == [1, 2]
    assert {entry.key for entry in store.list()} == run.manifest.keys | {states.NAME}


def test_an_older_run_s_manifest_has_none(tmp_path: Path, said: list[str]) -> None:
    store = open_store(str(tmp_path / "run"))
    commit(Run.claim(store, FRESH, said.append), 1)
    text = store.read(states.NAME)
    assert b'"pending": null' in text
    store.write(states.NAME, text.replace(b',\n "pending": null', b""))
    assert b"pending" not in store.read(states.NAME)
    assert resumed_at(Run.claim(store, FRESH, said.append), said) == 1
