"""Finding a run and its checkpoints, to look at: nothing is claimed, and no thread is started."""

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.manifest import Checkpoint, RunManifest, best
from wds_train.errors import NotFound, UsageError
from wds_train.storage.base import Store
from wds_train.storage.open import open_store

SCORES = {"raw": "val/top1", "ema": "val/top1_ema"}


def find_run(url: str) -> tuple[RunManifest, Store]:
    """The run at `url`; `NotFound` when there is none."""
    store = open_store(url)
    try:
        return read_run(store)[0], store
    except NotFound as error:
        raise NotFound(f"there is no run at {store.url} (no manifest.json); check the address") from error


def choose(manifest: RunManifest, kind: str, step: int | None) -> Checkpoint:
    """The checkpoint of `step`, or else the one whose `kind` weights had the best validation."""
    if step is not None:
        return manifest.back_to(step).checkpoints[-1]
    found = best(manifest.checkpoints, SCORES[kind])
    if found is None:
        raise UsageError(f"run {manifest.run} has no validated checkpoint yet; choose one by --step, or wait")
    return found


def best_kind(checkpoints: tuple[Checkpoint, ...]) -> str:
    """The kind of weights, a name in SCORES, with the highest top-1 of any validation; EMA where there was none."""
    tops = {kind: found.metrics[name] for kind, name in SCORES.items() if (found := best(checkpoints, name))}
    return max(tops, key=lambda kind: tops[kind], default="ema")
