"""The weights in a run's checkpoint."""

from wds_train.checkpoint import read_chosen
from wds_train.errors import RunError
from wds_train.fit import section
from wds_train.manifest import ClassInfo
from wds_train.state import Checkpoint, RunManifest
from wds_train.store import Store
from wds_train.weights import Weights


def weights_of(store: Store, manifest: RunManifest, chosen: Checkpoint, kind: str) -> Weights:
    """The `kind` ("raw" or "ema") weights of a checkpoint; `RunError` when it is damaged, with the steps of those that are
    not, or of a version that did not note the classes.
    """
    snapshot = read_chosen(store, manifest, chosen)
    if "classes" not in snapshot.extra:
        raise RunError(
            f"{store.url}/{chosen.object.key} does not hold its classes, being of an older wds-train; train again"
        )
    part = {"raw": "model/", "ema": "ema/"}[kind]
    return Weights(
        section(snapshot.tensors, part),
        kind,
        store.url,
        chosen.progress.step,
        chosen.progress.evaluated,
        chosen.metrics,
        manifest.settings,
        tuple(ClassInfo(*entry) for entry in snapshot.extra["classes"]),
    )
