"""Calibration: a temperature for a model's logits, fitted on validation samples.

One half of the samples fits it, and the other half judges it. Dividing the logits by it changes no
ranking, only how sure the probabilities are (Guo et al. 2017, arXiv:1706.04599). Everything that
shows a probability takes the weights from here, so that all use the same temperature.
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
TEMPERATURES = (0.05, 20.0)  # the least and the greatest that are tried
BATCH = 32  # of images at a time: little memory, wherever a model is used
BINS = 15  # of confidence, as in Guo et al.
RULE = 2  # the version of the method; kept weights of another version are calibrated again
UNREADABLE = Calibration(reason="the validation images of the training could not be read")
LOG = logging.getLogger(__name__)

# Called with the number of images. Its context yields a function that counts those done.
Progress = Callable[[int], AbstractContextManager[Callable[[int], object]]]


@contextlib.contextmanager
def no_progress(_: int) -> Iterator[Callable[[int], object]]:
    """Show no progress."""
    yield lambda _: None


def load_weights(store: Store, run: RunManifest, choice: Choice) -> Weights:
    """Load the chosen weights of a run, calibrated if this machine has calibrated them before.

    Calibrated weights are kept on the disk: to download and calibrate a checkpoint takes longer
    than most of what follows. No thread is started.

    Args:
        store: The run's.
        run: The run's manifest.
        choice: The weights to load.

    Raises:
        RunError: The checkpoint cannot be used.
    """
    # A kept file that cannot be read is as good as none.
    with contextlib.suppress(WdsTrainError):
        return replace(Weights.read(_kept_file(run, choice)), run=store.url)
    return weights_of(store, run, choice)


def calibrate_weights(
    weights: Weights,
    run: RunManifest,
    choice: Choice,
    device: torch.device,
    progress: Progress = no_progress,
) -> Weights:
    """Return weights with their calibration by the run's validation split, or the reason for none.

    They are kept below `home()` for the next time, and replace older ones of the run.

    Args:
        weights: The chosen weights.
        run: The run's manifest.
        choice: The choice that the weights are of.
        device: Where the model computes.
        progress: Shows the progress.
    """
    if weights.calibration != Calibration():
        return weights
    try:
        logits, labels = _score_validation(weights, run, device, progress)
    except WdsTrainError as error:
        LOG.warning("the probabilities are not calibrated: %s", error)
        return replace(weights, calibration=UNREADABLE)
    weights = replace(weights, calibration=calibrate(logits, labels))

    # On a full or read-only disk, the next time takes as long, no more.
    kept = _kept_file(run, choice)
    with contextlib.suppress(OSError, WdsTrainError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        for older in kept.parent.glob(f"{run.run}-{'[0-9a-f]' * 16}-{choice.kind}*{SUFFIX}"):
            older.unlink(missing_ok=True)
        weights.save(kept)
    return weights


def _kept_file(run: RunManifest, choice: Choice) -> Path:
    """Return the file in which this machine keeps the chosen weights.

    It is named by the checkpoint's digest: two runs may have the same name.
    """
    checkpoint = choice.checkpoint.object.sha256[:16]
    return home() / "exports" / f"{run.run}-{checkpoint}-{choice.kind}-{RULE}{SUFFIX}"


def _score_validation(
    weights: Weights, run: RunManifest, device: torch.device, progress: Progress
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Score at most SAMPLES validation samples, evenly spaced.

    Returns:
        float32 logits [samples, classes] and int64 labels [samples] of those that can be read.
    """
    split = spread(own_dataset(run).split("val"), SAMPLES)
    view = View.of(weights.recipe, None)
    with progress(len(split)) as seen:
        # Without loader workers: a forked one would not survive the threads that PyTorch may have
        # by now.
        scores = score(
            [weights], [view], split, BATCH, workers=0, device=device, seen=seen, keep_logits=True
        )
    readable = scores.predicted >= 0
    labels = split.index.label[:].astype(np.int64)
    return scores.logits[readable], labels[readable]


def calibrate(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Calibration:
    """Fit a temperature on every other sample, and judge it on the rest by the printed figure.

    A temperature that does not help is not used. Fewer than NEEDED samples fit none.

    Args:
        logits: float32 [samples, classes].
        labels: int64 [samples].
    """
    if len(labels) < NEEDED:
        return uncalibrated(len(labels))
    # Every other sample, since the split may be sorted by class.
    fit = slice(0, None, 2)
    rest = slice(1, None, 2)

    # By the logarithm of the temperature: to halve it is as large a step as to double it.
    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits[fit] / np.exp(log_temperature), axis=1)
        return -float(scaled[np.arange(len(scaled)), labels[fit]].mean())

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded")
    fitted = len(labels[fit])
    tried = _judge(float(np.exp(found.x)), fitted, logits[rest], labels[rest])
    if tried.helps:
        return tried
    return replace(_judge(1.0, fitted, logits[rest], labels[rest]), reason=refused(tried).reason)


def _judge(
    temperature: float, fitted: int, logits: NDArray[np.float32], labels: NDArray[np.int64]
) -> Calibration:
    """Judge `temperature`, which was fitted on `fitted` samples, on other samples."""
    right = logits.argmax(axis=1) == labels
    raw = probabilities(logits, 1.0).max(axis=1)
    confidence = probabilities(logits, temperature).max(axis=1)
    _, error_raw = bin_confidence(raw, right)
    _, error = bin_confidence(confidence, right)
    sure = confidence >= SURE
    return Calibration(
        temperature=temperature,
        fitted=fitted,
        judged=len(right),
        error_raw=error_raw,
        error=error,
        sure=_percent(sure),
        right_sure=_percent(right[sure]),
        right_unsure=_percent(right[~sure]),
    )


def _percent(flags: NDArray[np.bool_]) -> float:
    """Return the share of True in percent; -1 if there are no flags."""
    if len(flags) == 0:
        return -1.0
    return float(100 * flags.mean())


@dataclass(frozen=True)
class Bin:
    """Predictions of about equal confidence.

    Attributes:
        samples: Their number.
        confidence: The mean probability of the predicted class, in percent.
        accuracy: The share of right ones, in percent.
    """

    samples: int
    confidence: float
    accuracy: float


def bin_confidence(confidence: NDArray[Any], right: NDArray[np.bool_]) -> tuple[list[Bin], float]:
    """Compare confidence and accuracy, in bins of equal width.

    Args:
        confidence: Probabilities of the predictions [samples].
        right: True for the right ones, bool [samples].

    Returns:
        The bins that have samples, and the expected calibration error in percent. That is the mean
        distance of accuracy and confidence over the bins, weighted by samples (Guo et al. 2017,
        arXiv:1706.04599).
    """
    # A probability of 1 belongs to the last bin, not to one behind it.
    places = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    bins = []
    for place in range(BINS):
        held = places == place
        if held.any():
            mean_confidence = 100 * float(confidence[held].mean())
            accuracy = 100 * float(right[held].mean())
            bins.append(Bin(int(held.sum()), mean_confidence, accuracy))

    distances = []
    for each in bins:
        distances.append(each.samples * abs(each.accuracy - each.confidence))
    return bins, sum(distances) / max(1, len(right))
