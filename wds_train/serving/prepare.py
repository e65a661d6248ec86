"""The calibrated weights of a run or an exported file."""

import contextlib
from pathlib import Path

import torch

from wds_train.checkpoint.find import SCORES, find_run
from wds_train.checkpoint.manifest import RunManifest
from wds_train.checkpoint.read import weights_of
from wds_train.errors import WdsTrainError
from wds_train.evaluation.evaluate import chosen_checkpoint
from wds_train.home import home
from wds_train.models.weights import SUFFIX, Weights
from wds_train.serving.calibrate import calibrated
from wds_train.serving.classify import Classifier


def prepared(source: str, device: torch.device, kind: str = "best") -> Weights:
    """The weights in the file `source`, or those of the run at that address: of the `kind` ("raw", "ema", or whichever scored
    higher), of their best epoch, calibrated. A run's are kept below `home()`: to download a whole checkpoint and to calibrate
    it takes longer than most of what follows.
    """
    if source.endswith(SUFFIX):
        return Weights.read(Path(source))
    manifest, store = find_run(source)
    checkpoint, kind = chosen_checkpoint(manifest, kind, None)
    kept = _place(manifest, checkpoint.object.sha256[:16], kind)
    with contextlib.suppress(WdsTrainError):
        return Weights.read(kept)
    weights = weights_of(store, manifest, checkpoint, kind)
    weights = calibrated(weights, Classifier(weights, None, device), manifest)
    if weights.calibration.fitted:
        with contextlib.suppress(OSError, WdsTrainError):  # the next time takes as long, no more
            kept.parent.mkdir(parents=True, exist_ok=True)
            for older in kept.parent.glob(_place(manifest, "[0-9a-f]" * 16, kind).name):
                older.unlink(missing_ok=True)
            weights.save(kept)
    return weights


def both_kinds(url: str, device: torch.device) -> list[Weights]:
    """The raw and the EMA weights of the run at `url`, those that scored higher first."""
    first = prepared(url, device)
    return [first, *(prepared(url, device, kind) for kind in SCORES if kind != first.kind)]


def _place(run: RunManifest, checkpoint: str, kind: str) -> Path:
    return home() / "exports" / f"{run.run}-{checkpoint}-{kind}{SUFFIX}"
