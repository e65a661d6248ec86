"""A change of a run's manifest by another process: neither it nor the owner's writes are lost."""

from dataclasses import replace
from typing import Any

import pytest
from fault_proxy import FaultProxy
from test_checkpoint import FRESH, snapshot

from wds_train.checkpoint import run_manifest as states
from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.manifest_changes import amend
from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import Page, RunManifest
from wds_train.errors import StoreError
from wds_train.storage.base import Store
from wds_train.storage.open import open_store
from wds_train.storage.s3 import S3Store

PAGE = Page("p", "me", "https://wandb.ai/me/p/runs/x")


def with_page(manifest: RunManifest) -> RunManifest:
    return replace(manifest, wandb_id="new", page=PAGE)


@pytest.fixture(params=["directory", "S3"])
def store(request: pytest.FixtureRequest, tmp_path: Any) -> Store:
    where = (
        tmp_path / "run"
        if request.param == "directory"
        else f"{request.getfixturevalue('s3_url')}/run"
    )
    return open_store(str(where))


def test_the_owner_takes_it_up(store: Store) -> None:
    owner = Run.claim(store, FRESH, print)
    assert amend(store, with_page, print).page == PAGE
    owner.committer.commit(snapshot(1), {}, [])
    owner.committer.wait()
    found = read_run(store)[0]
    assert (found.wandb_id, found.page, found.fence, found.step) == ("new", PAGE, 1, 1)
    owner.end("interrupted")
    assert (read_run(store)[0].wandb_id, read_run(store)[0].status) == ("new", "interrupted")
    assert Run.claim(store, FRESH, print).manifest.page == PAGE


@pytest.mark.parametrize("status", ["interrupted", "failed", "done"])
def test_a_run_that_nobody_owns_keeps_its_state(store: Store, status: str) -> None:
    owner = Run.claim(store, FRESH, print)
    owner.committer.commit(snapshot(1), {}, [])
    owner.committer.wait()
    owner.end(
        status, **({"result": {"val/top1": 1.0, "val/top1_ema": 1.0}} if status == "done" else {})
    )
    before = read_run(store)[0]
    after = amend(store, with_page, print)
    assert replace(after, wandb_id=before.wandb_id, page=before.page, nonce=before.nonce) == before
    assert read_run(store)[0] == after


def test_a_write_in_between_is_kept_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Run.claim(store, FRESH, print)
    calls = list[int]()

    def change(found: RunManifest) -> RunManifest:
        calls.append(found.step)
        if len(calls) == 1:
            owner.committer.commit(snapshot(1), {}, [])
            owner.committer.wait()
        return with_page(found)

    assert amend(store, change, print).step == 1
    assert calls == [0, 1]
    assert (read_run(store)[0].step, read_run(store)[0].page) == (1, PAGE)


def test_nothing_is_written_where_nothing_changes(store: Store) -> None:
    Run.claim(store, FRESH, print)
    before = store.read_tagged(states.NAME)
    amend(store, lambda found: found, print)
    assert store.read_tagged(states.NAME) == before


def test_a_store_that_ignores_conditions_is_left_alone(
    fault_proxy: FaultProxy, s3_url: str
) -> None:
    """A commit of the owner could be overwritten."""
    store = S3Store(*s3_url.removeprefix("s3://").split("/", 1))
    Run.claim(store, FRESH, print)
    before = store.read(states.NAME)
    fault_proxy.fail("strip", method="PUT", header="if-none-match|if-match", times=10**9)
    with pytest.raises(StoreError, match="ignores If-None-Match"):
        amend(store, with_page, print)
    assert store.read(states.NAME) == before
