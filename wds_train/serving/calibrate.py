"""A temperature for a model's logits, fitted on one half of some validation samples and judged on the other half.

Dividing the logits by it changes no ranking (Guo et al. 2017, arXiv:1706.04599), but what the probabilities say of themselves.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from wds_train.checkpoint.begun import own_dataset
from wds_train.checkpoint.manifest import RunManifest
from wds_train.data.dataset import SplitReader
from wds_train.errors import DataError, WdsTrainError
from wds_train.models.calibration import SURE, Calibration
from wds_train.models.weights import Weights
from wds_train.report.findings import calibration
from wds_train.serving.classify import Classifier, sample
from wds_train.tracking.console import Meter, say

SAMPLES = 1000  # at most: a temperature is one number, and a model on a CPU takes a minute for them
TEMPERATURES = (0.05, 20.0)


def calibrated(weights: Weights, classifier: Classifier, run: RunManifest) -> Weights:
    """`weights`, calibrated on the validation split that `run` was trained with; as they are, and said why, when that is not
    to be had.
    """
    try:
        logits, labels = _scored(classifier, own_dataset(run).split("val"))
    except WdsTrainError as error:
        say(f"the probabilities are not calibrated: {error}")
        return weights
    return replace(weights, calibration=calibrate(logits, labels))


def _scored(classifier: Classifier, split: SplitReader) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The logits [samples, classes] of at most SAMPLES samples, evenly taken from the split, and their labels."""
    chosen = np.unique(np.linspace(0, len(split) - 1, min(SAMPLES, len(split))).round().astype(int))
    found = []
    with Meter(0, len(chosen)) as meter:
        for _, logits in classifier.logits(sample(split, number) for number in chosen.tolist()):
            found.append(logits)
            meter.add(images=1)
    readable = np.array([not isinstance(logits, WdsTrainError) for logits in found], bool)
    if not readable.any():
        raise DataError(f"no sample of {split.store.url}'s validation can be read")
    logits = np.stack([each for each in found if not isinstance(each, WdsTrainError)])
    return logits, split.index.label[chosen[readable]].astype(np.int64)


def calibrate(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Calibration:
    """What `logits` [samples, classes] of samples with `labels` tell: every other sample fits, the rest judges. A temperature
    that makes it worse there, as one of a few samples does, stays 1.
    """
    fit, rest = slice(0, None, 2), slice(1, None, 2)
    if len(labels) < 2:
        return Calibration()

    def loss(log_temperature: float, part: slice) -> float:
        scaled = log_softmax(logits[part] / np.exp(log_temperature), axis=1)
        return -float(scaled[np.arange(len(scaled)), labels[part]].mean())

    found = minimize_scalar(loss, args=(fit,), bounds=np.log(TEMPERATURES), method="bounded")
    temperature = float(np.exp(found.x)) if loss(found.x, rest) < loss(0.0, rest) else 1.0
    right = logits[rest].argmax(axis=1) == labels[rest]
    raw, probability = (probabilities(logits[rest], t).max(axis=1) for t in (1.0, temperature))
    sure = probability >= SURE
    return Calibration(
        temperature,
        len(labels[fit]),
        len(right),
        calibration(raw, right)[1],
        calibration(probability, right)[1],
        _percent(sure),
        _percent(right[sure]),
        _percent(right[~sure]),
    )


def probabilities(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """The softmax of `logits` [samples, classes] at `temperature`."""
    return np.exp(log_softmax(logits.astype(np.float64) / temperature, axis=1))


def _percent(flags: NDArray[np.bool_]) -> float:
    return float(100 * flags.mean()) if len(flags) else -1.0
