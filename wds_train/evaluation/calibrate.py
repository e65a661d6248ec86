"""Calibration: a temperature for a model's logits, fitted on validation samples.

One half of the samples fits it, and the other half judges it. Dividing the logits by it changes no
ranking, only how sure the probabilities are (Guo et al. 2017, arXiv:1706.04599). All that shows a
probability takes the weights from here, so that all use the same number.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from wds_train.checkpoint.restore import weights_of
from wds_train.checkpoint.resume_checks import own_dataset
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.checkpoint.weight_choice import Choice
from wds_train.errors import WdsTrainError
from wds_train.evaluation.evaluate import View, score, spread
from wds_train.files import home
from wds_train.models.calibration import (
    NEEDED,
    SURE,
    Calibration,
    probabilities,
    refused,
    uncalibrated,
)
from wds_train.models.weights import SUFFIX, Weights
from wds_train.storage.base import Store

SAMPLES = 1000  # at most: enough for one number, and a minute for a model on a CPU
TEMPERATURES = (0.05, 20.0)
BATCH = 32  # of images at a time: little memory, wherever a model is used
BINS = 15  # of confidence
RULE = 2  # the version of the method; kept weights of another version are calibrated again
UNREADABLE = Calibration(reason="the validation images of the training could not be read")
LOG = logging.getLogger(__name__)

Counted = Callable[[int], AbstractContextManager[Callable[[int], object]]]


@contextlib.contextmanager
def uncounted(_: int) -> Iterator[Callable[[int], object]]:
    """Count nothing of so many images."""
    yield lambda _: None


def loaded(store: Store, run: RunManifest, choice: Choice) -> Weights:
    """Return the chosen weights of a run, calibrated if this machine has calibrated them before.

    Those are kept on its disk: to download and calibrate a checkpoint takes longer than most of
    what follows. No thread is started.
    """
    with contextlib.suppress(WdsTrainError):
        return replace(Weights.read(_place(run, choice)), run=store.url)
    return weights_of(store, run, choice)


def calibrated(
    weights: Weights,
    run: RunManifest,
    choice: Choice,
    device: torch.device,
    counted: Counted = uncounted,
) -> Weights:
    """Return weights with their calibration by the run's validation split, or the reason for none.

    They are kept below `home()` for the next time, and replace older ones of the run.

    Args:
        weights: The chosen weights.
        run: The run's manifest.
        choice: The choice that the weights are of.
        device: Where the model computes.
        counted: Called with the number of images. Its context yields a function that counts those
        done.
    """
    if weights.calibration != Calibration():
        return weights
    try:
        logits, labels = _scored(weights, run, device, counted)
    except WdsTrainError as error:
        LOG.warning("the probabilities are not calibrated: %s", error)
        return replace(weights, calibration=UNREADABLE)
    weights = replace(weights, calibration=calibrate(logits, labels))
    kept = _place(run, choice)
    with contextlib.suppress(OSError, WdsTrainError):  # the next time takes as long, no more
        kept.parent.mkdir(parents=True, exist_ok=True)
        for older in kept.parent.glob(f"{run.run}-{'[0-9a-f]' * 16}-{choice.kind}*{SUFFIX}"):
            older.unlink(missing_ok=True)
        weights.save(kept)
    return weights


def _place(run: RunManifest, choice: Choice) -> Path:
    checkpoint = choice.checkpoint.object.sha256[:16]
    return home() / "exports" / f"{run.run}-{checkpoint}-{choice.kind}-{RULE}{SUFFIX}"


def _scored(
    weights: Weights, run: RunManifest, device: torch.device, counted: Counted
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Score at most SAMPLES validation samples, evenly spaced.

    Returns:
        float32 logits [samples, classes] and int64 labels [samples] of those that can be read.
    """
    split = spread(own_dataset(run).split("val"), SAMPLES)
    view = View.of(weights.recipe, None)
    with counted(len(split)) as seen:
        # Without loader workers: a forked one would not survive the threads that PyTorch may have
        # by now.
        scored = score(
            [weights], [view], split, BATCH, workers=0, device=device, seen=seen, keep_logits=True
        )
    readable = scored.predicted >= 0
    return scored.logits[readable], split.index.label[:].astype(np.int64)[readable]


def calibrate(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Calibration:
    """Fit a temperature on every other sample, and judge it on the rest by the printed figure.

    A temperature that does not help is not used. Fewer than NEEDED samples fit none.

    Args:
        logits: float32 [samples, classes].
        labels: int64 [samples].
    """
    if len(labels) < NEEDED:
        return uncalibrated(len(labels))
    fit = slice(0, None, 2)
    rest = slice(1, None, 2)

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits[fit] / np.exp(log_temperature), axis=1)
        return -float(scaled[np.arange(len(scaled)), labels[fit]].mean())

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded")
    fitted = len(labels[fit])
    tried = _judged(float(np.exp(found.x)), fitted, logits[rest], labels[rest])
    if tried.helps:
        return tried
    return replace(_judged(1.0, fitted, logits[rest], labels[rest]), reason=refused(tried).reason)


def _judged(
    temperature: float, fitted: int, logits: NDArray[np.float32], labels: NDArray[np.int64]
) -> Calibration:
    """Judge `temperature`, which was fitted on `fitted` samples, on other samples."""
    right = logits.argmax(axis=1) == labels
    raw = probabilities(logits, 1.0).max(axis=1)
    probability = probabilities(logits, temperature).max(axis=1)
    sure = probability >= SURE
    return Calibration(
        temperature,
        fitted,
        len(right),
        calibration(raw, right)[1],
        calibration(probability, right)[1],
        _percent(sure),
        _percent(right[sure]),
        _percent(right[~sure]),
    )


def _percent(flags: NDArray[np.bool_]) -> float:
    return float(100 * flags.mean()) if len(flags) else -1.0


@dataclass(frozen=True)
class Bin:
    """Predictions of about equal confidence. Confidence and accuracy are in percent."""

    samples: int
    confidence: float
    accuracy: float


def calibration(confidence: NDArray[Any], right: NDArray[np.bool_]) -> tuple[list[Bin], float]:
    """Return the bins of equal width that have samples, and the expected calibration error.

    That is the mean distance of accuracy and confidence over the bins, weighted by samples, in
    percent (Guo et al. 2017, arXiv:1706.04599).

    Args:
        confidence: Probabilities of the predictions [samples].
        right: Whether each is right, bool [samples].
    """
    places = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    bins = []
    for place in range(BINS):
        held = places == place
        if held.any():
            mean_confidence = 100 * float(confidence[held].mean())
            accuracy = 100 * float(right[held].mean())
            bins.append(Bin(int(held.sum()), mean_confidence, accuracy))
    distance = sum(each.samples * abs(each.accuracy - each.confidence) for each in bins)
    return bins, distance / max(1, len(right))
