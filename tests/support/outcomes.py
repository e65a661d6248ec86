"""What a run has come to, read as anybody could read it, and compared bit by bit."""

import hashlib

import torch

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run import Run
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.errors import NotFound
from wds_train.storage.base import Store
from wds_train.storage.open import open_store
from wds_train.tracking.metrics import repeatable


def assert_nothing_named_is_missing(store: Store) -> None:
    try:
        manifest, _ = read_run(store)
    except NotFound:
        return
    for named in [c.object for c in manifest.checkpoints] + [
        s.object for s in manifest.metrics + manifest.replayed
    ]:
        data = store.read(named.key)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (named.bytes, named.sha256), (
            named.key
        )


def end_state(url: str) -> tuple[Snapshot, list[dict[str, object]], dict[str, float]]:
    store = open_store(url)
    run = Run(store, *read_run(store))
    assert run.manifest.status == "done"
    snapshot = run.restore(print)
    assert snapshot is not None
    return snapshot, [repeatable(row) for row in run.history()], run.manifest.result


def assert_same_end(one: str, other: str) -> None:
    (snapshot, history, result), (snapshot2, history2, result2) = end_state(one), end_state(other)
    assert (history, result) == (history2, result2)
    assert (snapshot.progress, snapshot.extra) == (snapshot2.progress, snapshot2.extra)
    assert snapshot.tensors.keys() == snapshot2.tensors.keys()
    assert [
        n for n in snapshot.tensors if not torch.equal(snapshot.tensors[n], snapshot2.tensors[n])
    ] == []
