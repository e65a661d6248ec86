"""The run protocol on both stores: one writer, manifest last, damaged checkpoints named."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import wait_until

from wds_train.checkpoint import lease as leases
from wds_train.checkpoint import run_manifest as states
from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import Checkpoint, Object, Progress, RunManifest, keep
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.config.presets import preset
from wds_train.config.settings import with_settings
from wds_train.errors import Interrupted, RunError, Unavailable, UsageError
from wds_train.models.model import create_model
from wds_train.storage.base import Store
from wds_train.storage.open import open_store

RECIPE = with_settings(
    preset("digits"), ["model.name=test_resnet", "optimizer.name=sgd", "optimizer.lr=0.1"]
)
DATASET = {"url": "d", "fingerprint": "f", "classes": 10}
FRESH = RunManifest(run="r", recipe=RECIPE.to_dict(), dataset=DATASET, wandb_id="w")
WEIGHTS = create_model(RECIPE.model, 10, 0, torch.device("cpu")).state_dict()


def snapshot(step: int) -> Snapshot:
    filled = {}
    for name, value in WEIGHTS.items():
        filled[f"model/{name}"] = torch.full_like(value, step)
        filled[f"ema/{name}"] = torch.full_like(value, step)
    return Snapshot(filled, {"scalars": {}, "scaler": {}}, Progress(step, evaluated=step))


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(
        str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("s3_url")
    )


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def owners_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All claims here are by this process, which lives: each would wait for the one before."""
    monkeypatch.setattr(leases, "is_gone", lambda owner: True)


def commit(run: Run, step: int, top1: float = 0.0) -> None:
    run.committer.commit(snapshot(step), {"val/top1": top1, "val/top1_ema": top1}, [{"step": step}])
    run.committer.wait()


def logged_steps(run: Run) -> list[float]:
    """Return the steps of the committed rows."""
    return [record["step"] for record in run.history()]


def kept_steps(run: RunManifest) -> list[int]:
    """Return the steps of the checkpoints that a manifest names."""
    return [checkpoint.progress.step for checkpoint in run.checkpoints]


def keys_of(store: Store, prefix: str = "") -> set[str]:
    """Return the keys of the objects on the store."""
    return {entry.key for entry in store.list(prefix)}


def contents_of(store: Store) -> dict[str, bytes]:
    """Return all objects on the store."""
    return {key: store.read(key) for key in keys_of(store)}


def test_what_is_committed_is_restored(store: Store, said: list[str]) -> None:
    run = Run.claim(store, FRESH, said.append)
    assert run.restore(said.append) is None
    commit(run, 1)
    commit(run, 2)
    later = Run.claim(store, FRESH, said.append)
    restored = later.restore(said.append)
    assert restored is not None
    assert restored.tensors.keys() == snapshot(2).tensors.keys()
    assert all((value == 2).all() for value in restored.tensors.values())
    assert restored.progress == Progress(2, evaluated=2)
    assert logged_steps(later) == [1, 2]
    assert (later.manifest.fence, said) == (2, [])


def test_a_commit_names_its_own_records_and_no_later_ones(
    store: Store, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later one's would be logged twice, were this one the last before a kill."""
    passed = threading.Semaphore(0)
    write = store.write

    def held(key: str, *arguments: Any, **named: Any) -> str:
        if key.startswith("ckpt/"):
            passed.acquire()
        return write(key, *arguments, **named)

    monkeypatch.setattr(store, "write", held)
    run = Run.claim(store, FRESH, said.append)
    run.committer.commit(snapshot(1), {}, [{"step": 1}])
    run.committer.commit(snapshot(2), {}, [{"step": 2}])  # the next, while the first is under way
    for step in (3, 4):
        passed.release()
        run.committer.commit(snapshot(step), {}, [{"step": step}])
        while (
            len(run.manifest.checkpoints) < 1
            or run.manifest.checkpoints[-1].progress.step < step - 2
        ):
            time.sleep(0.01)
        assert logged_steps(run) == list(range(1, step - 1))
    for _ in range(2):
        passed.release()
    run.committer.wait()
    assert logged_steps(run) == [1, 2, 3, 4]


def test_a_newer_claim_ends_the_older_ones_writing(store: Store, said: list[str]) -> None:
    old = Run.claim(store, FRESH, said.append)
    commit(old, 1)
    new = Run.claim(store, FRESH, said.append)
    commit(new, 2)
    manifest = store.read(states.NAME)
    old.committer.commit(snapshot(3), {}, [])
    with pytest.raises(Interrupted, match=r"another instance \(.*, process \d+\) has claimed"):
        old.committer.wait()
    assert store.read(states.NAME) == manifest
    restored = Run.claim(store, FRESH, said.append).restore(said.append)
    assert restored is not None
    assert restored.progress.step == 2


def test_an_owner_that_lives_is_waited_for_however_long(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It commits nothing for several leases, and only renews."""
    monkeypatch.setattr(leases, "LEASE_SECONDS", 3.0)
    monkeypatch.setattr(leases, "is_gone", lambda owner: False)
    store = open_store(str(tmp_path / "run"))
    owner = Run.claim(store, FRESH, said.append)
    seen = {store.head(states.NAME)[1]}
    owner.begin()

    def pause(_: float) -> None:
        """Until the owner has renewed once more: on a slow machine later than after a lease."""
        if len(seen) > 2 * leases.RENEWALS:
            raise TimeoutError
        wait_until(lambda: store.head(states.NAME)[1] not in seen, "a renewal")
        seen.add(store.head(states.NAME)[1])

    with pytest.raises(TimeoutError):
        Run.claim(store, FRESH, said.append, pause=pause)
    owner.end("interrupted")
    assert (
        Run.claim(store, FRESH, said.append, pause=pause).manifest.fence == 2
    )  # given up: at once


def test_a_run_that_kept_nothing_takes_other_settings(store: Store, said: list[str]) -> None:
    """A mistyped setting is found when the model is made, which is after the claim."""
    other = replace(FRESH, recipe=with_settings(RECIPE, ["optimizer.lr=0.3"]).to_dict())
    Run.claim(store, FRESH, said.append).end("failed")
    run = Run.claim(store, other, said.append)
    assert run.manifest.recipe == other.recipe
    commit(run, 1)
    run.end("interrupted")
    with pytest.raises(
        UsageError, match=r"begun with optimizer.lr 0.3, not 0.1; leave out what differs"
    ):
        Run.claim(store, FRESH, said.append)


def test_only_named_objects_are_kept(store: Store, said: list[str]) -> None:
    run = Run.claim(store, FRESH, said.append)
    for step, top1 in enumerate([10.0, 90.0, 20.0, 30.0, 40.0], start=1):
        commit(run, step, top1)
    # The best, and the newest two.
    assert kept_steps(run.manifest) == [2, 4, 5]
    assert [entry.key for entry in store.list("ckpt/")] == [
        checkpoint.object.key for checkpoint in run.manifest.checkpoints
    ]
    store.write("ckpt/000001-000000099-000001.safetensors", b"half")
    again = Run.claim(store, FRESH, said.append)
    assert said == [
        "removed ckpt/000001-000000099-000001.safetensors, which no manifest names: left by an "
        "interrupted upload or removal"
    ]
    assert len(list(store.list("ckpt/"))) == len(again.manifest.checkpoints)


def test_a_kill_after_the_last_commit_leaves_nothing_for_ever(
    store: Store, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.claim(store, FRESH, said.append)
    for step in (1, 2):
        commit(run, step, 90.0 - step)
    monkeypatch.setattr(
        "wds_train.checkpoint.committer.collect", lambda *_: None
    )  # as if killed before it
    for step in (3, 4):
        commit(run, step, 90.0 - step)
    run.end("done")
    newer = f"ckpt/{run.manifest.fence + 1:06d}-000000005-000005.safetensors"
    store.write(newer, b"of one who has claimed the run since, and will name it")
    named = {checkpoint.object.key for checkpoint in run.manifest.checkpoints}
    assert keys_of(store, "ckpt/") > named | {newer}
    assert Run.claim(store, FRESH, said.append).manifest == run.manifest
    assert keys_of(store, "ckpt/") == named | {newer}


@pytest.mark.parametrize(
    ("announces", "kept"), [(False, [1, 2]), (True, [2])], ids=["commit", "announcement"]
)
def test_a_swap_whose_answer_is_lost_is_settled_before_the_next_commit(
    store: Store, said: list[str], monkeypatch: pytest.MonkeyPatch, announces: bool, kept: list[int]
) -> None:
    """A commit that was only announced is replaced by the next one, which holds its records."""
    run = Run.claim(store, FRESH, said.append)
    write = store.write
    lost = list[str]()

    def loses(key: str, body: bytes, **condition: Any) -> str:
        tag = write(key, body, **condition)
        if (
            key == states.NAME
            and not lost
            and (json.loads(body)["pending"] is not None) == announces
        ):
            lost.append(key)
            run.committer.commit(snapshot(2), {}, [{"step": 2}])  # meanwhile
            raise Unavailable("no answer")
        return tag

    monkeypatch.setattr(store, "write", loses)
    monkeypatch.setattr("wds_train.checkpoint.committer.RETRY_SECONDS", 0.01)
    run.committer.commit(snapshot(1), {}, [{"step": 1}])
    run.committer.wait()
    assert lost and logged_steps(run) == [1, 2]
    assert kept_steps(run.manifest) == kept
    assert keys_of(store) == run.manifest.keys | {states.NAME}


def test_every_nth_epoch_is_kept_if_asked(store: Store, said: list[str]) -> None:
    run = Run.claim(store, FRESH, said.append, keep_every=3)
    commit(run, 1, 90.0)
    for step in range(2, 9):
        commit(run, step)
        run.committer.commit(
            replace(snapshot(step), progress=Progress(10 * step, evaluated=step)), {}, []
        )  # within the next epoch
        run.committer.wait()
    assert kept_steps(run.manifest) == [1, 3, 6, 8, 80]
    assert [entry.key[12:21] for entry in store.list("ckpt/")] == [
        f"{step:09d}" for step in (1, 3, 6, 8, 80)
    ]


class Killed(BaseException):
    """No code of ours catches it."""


def killed(*_: object, **__: object) -> None:
    raise Killed


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [flipped, lambda data: data[:-3], lambda data: b"", None],
    ids=["flip", "cut", "empty", "gone"],
)
def test_a_damaged_newest_checkpoint_is_passed_over(
    store: Store, said: list[str], damage: Callable[[bytes], bytes] | None
) -> None:
    run = Run.claim(store, FRESH, said.append)
    commit(run, 1)
    commit(run, 2)
    key = run.manifest.checkpoints[-1].object.key
    data = store.read(key)
    store.delete(key)
    if damage is not None:
        store.write(key, damage(data))
    later = Run.claim(store, FRESH, said.append)
    restored = later.restore(said.append)
    assert restored is not None
    assert restored.progress.step == 1
    assert len(said) == 1
    assert f"checkpoint {key} cannot be used" in said[0]
    commit(later, 2)
    # A step that is trained again is logged once.
    assert logged_steps(later) == [1, 2]
    assert kept_steps(later.manifest) == [1, 2]


@pytest.mark.parametrize("damage", [flipped, None], ids=["flip", "gone"])
def test_a_rollback_to_what_is_damaged_changes_nothing(
    store: Store, said: list[str], damage: Callable[[bytes], bytes] | None
) -> None:
    run = Run.claim(store, FRESH, said.append)
    for step in (1, 2, 3):
        commit(run, step, float(step == 1))
    run.end("interrupted")
    key = run.manifest.checkpoints[1].object.key
    data = store.read(key)
    store.delete(key)
    if damage is not None:
        store.write(key, damage(data))
    before = contents_of(store)
    with pytest.raises(
        RunError, match=rf"{key} is .*; the usable checkpoints are those of step 1, 3$"
    ):
        Run.roll_back(store, 2, said.append)
    assert contents_of(store) == before


def test_a_rollback_deletes_what_is_newer_once_the_manifest_is_safe(
    store: Store, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at any write or deletion leaves the run as it was, or as it is to be."""
    run = Run.claim(store, FRESH, said.append)
    for step in (1, 2, 3):
        commit(run, step, float(step == 1))
    run.end("interrupted")
    named = run.manifest.keys
    usable = []
    for verb in ("write", "delete"):
        monkeypatch.setattr(store, verb, killed)
        with pytest.raises(Killed):
            Run.roll_back(store, 2, said.append)
        monkeypatch.undo()
        monkeypatch.setattr(leases, "is_gone", lambda owner: True)
        assert keys_of(store) == named | {states.NAME}
        usable.append(kept_steps(read_run(store)[0]))
    assert usable == [[1, 2, 3], [1, 2]]
    before, after = Run.roll_back(store, 1, said.append)
    assert len(before.checkpoints) == 2
    assert len(after.checkpoints) == 1
    assert said == []
    later = Run.claim(store, FRESH, said.append)
    assert later.restore(said.append).progress.step == 1  # type: ignore[union-attr]
    # The rollback itself has removed the objects that it dropped.
    assert "-000000002-" not in "".join(said)
    assert keys_of(store) == later.manifest.keys | {states.NAME}


def test_one_that_was_rolled_back_writes_no_more(store: Store, said: list[str]) -> None:
    old = Run.claim(store, FRESH, said.append)
    commit(old, 1)
    commit(old, 2)
    Run.roll_back(store, 1, said.append)
    old.committer.commit(snapshot(3), {}, [])
    with pytest.raises(Interrupted, match="has claimed"):
        old.committer.wait()
    assert kept_steps(read_run(store)[0]) == [1]


def test_all_damaged_is_an_error_and_never_a_fresh_run(store: Store, said: list[str]) -> None:
    run = Run.claim(store, FRESH, said.append)
    for step in (1, 2):
        commit(run, step)
    for checkpoint in run.manifest.checkpoints:
        store.write(checkpoint.object.key, b"junk")
    with pytest.raises(RunError, match=r"every checkpoint of .* is damaged"):
        Run.claim(store, FRESH, said.append).restore(said.append)


def test_another_recipe_or_dataset_is_refused_with_both_values(
    store: Store, said: list[str]
) -> None:
    Run.claim(store, FRESH, said.append)
    before = store.read(states.NAME)
    other = replace(FRESH, recipe=with_settings(RECIPE, ["optimizer.lr=0.3"]).to_dict())
    with pytest.raises(UsageError, match=r"begun with optimizer.lr 0.1, not 0.3;"):
        Run.claim(store, other, said.append)
    with pytest.raises(
        UsageError, match=r"begun with dataset d \(fingerprint f\), not d \(fingerprint g\);"
    ):
        Run.claim(store, replace(FRESH, dataset=DATASET | {"fingerprint": "g"}), said.append)
    assert store.read(states.NAME) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "something else"}, "is not a wds-train run manifest"),
        ({"format": 2}, "has format 2, this wds-train reads format 1; upgrade it"),
        ({"checkpoints": [{"x": 1}]}, "is damaged"),
    ],
)
def test_a_foreign_manifest_is_refused_and_left_alone(
    store: Store, said: list[str], change: dict[str, object], message: str
) -> None:
    content = json.dumps(json.loads(FRESH.to_json()) | change).encode()
    store.write(states.NAME, content)
    with pytest.raises(RunError, match=message):
        Run.claim(store, FRESH, said.append)
    assert store.read(states.NAME) == content


def test_the_best_are_kept_though_they_are_old() -> None:
    def checkpoint(step: int, raw: float, ema: float) -> Checkpoint:
        return Checkpoint(
            Object(str(step), 0, ""), Progress(step), {"val/top1": raw, "val/top1_ema": ema}
        )

    scores = [(5, 1), (9, 2), (3, 8), (4, 4), (5, 5), (6, 6)]
    kept = keep(tuple(checkpoint(step, raw, ema) for step, (raw, ema) in enumerate(scores)))
    assert [c.progress.step for c in kept] == [1, 2, 4, 5]
