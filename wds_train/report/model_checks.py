"""Evaluate the best checkpoint for the report, on a part of the validation split.

`wds-train report` calls `find`, and `class_section.py` shows its findings.
"""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wds_train.checkpoint.restore import from_newest
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.checkpoint.weight_choice import Choice, choose
from wds_train.dataset.manifest import ClassInfo
from wds_train.dataset.reader import Dataset, SplitReader
from wds_train.errors import DataError
from wds_train.evaluation.calibrate import Bin, bin_confidence, calibrate_weights, load_weights
from wds_train.evaluation.evaluate import View, refuse_other_classes, score, spread
from wds_train.evaluation.per_class import describe_member, report_of, title_of
from wds_train.models.calibration import Calibration, probabilities
from wds_train.models.scoring import EVAL_BATCH
from wds_train.models.weights import Weights
from wds_train.storage.base import Store
from wds_train.tracking.contact_sheet import thumbnail

LARGEST_MATRIX = 20  # classes: a larger matrix does not fit the page
MISTAKES = 24  # images shown, of a few KB each in the page
SIDE = 112  # pixels of each


@dataclass(frozen=True)
class Mistake:
    """A validation image that the model takes for another class.

    Attributes:
        jpeg: A thumbnail.
        truth: The name of its class.
        taken_for: The name of the class that the model predicts.
        confidence: The calibrated probability of that, 0 to 1.
        key: The sample's key.
    """

    jpeg: bytes
    truth: str
    taken_for: str
    confidence: float
    key: str


@dataclass(frozen=True)
class Findings:
    """The result of the evaluation. Confidences are those of all commands.

    Attributes:
        samples: Samples that were evaluated.
        total: Samples of the split.
        member: The weights and the view, as `wds-train eval --json` has them.
        report: The accuracy, as `wds-train eval --json` has it.
        titles: Names of the classes.
        confusion: int64 [classes, classes], a row for each true class; None for too many classes.
        calibration: That of the weights.
        bins: Accuracy by confidence.
        calibration_error: The expected one (ECE) on these samples, in percent.
        mistakes: The most confident ones.
    """

    samples: int
    total: int
    member: dict[str, Any]
    report: dict[str, Any]
    titles: list[str]
    confusion: NDArray[np.int64] | None
    calibration: Calibration
    bins: list[Bin]
    calibration_error: float
    mistakes: list[Mistake]


def find(
    store: Store, manifest: RunManifest, most: int, *, workers: int, device: torch.device
) -> Findings:
    """Evaluate the best weights of a run.

    Args:
        store: The run's.
        manifest: The run's.
        most: The most images to evaluate, evenly taken of the split.
        workers: Loader processes.
        device: Where the model computes.

    Returns:
        The findings, whose confidences are calibrated.

    Raises:
        WdsTrainError: The weights or the dataset cannot be used.
    """
    # The weights, and the dataset that they were trained on.
    choice, weights = from_newest(store, manifest, lambda newest: _best(store, newest))
    dataset = Dataset.open(str(manifest.dataset.get("url", "")))
    if dataset.fingerprint != manifest.dataset.get("fingerprint"):
        raise DataError(
            f"{dataset.store.url} is another dataset now than the run was trained on; "
            "its fingerprint differs"
        )
    refuse_other_classes(weights, dataset)

    # A part of the split is scored as `wds-train eval` scores the whole.
    whole = dataset.split("val")
    split = spread(whole, most)
    view = View.of(weights.recipe, None)
    batch = min(weights.recipe.batch, EVAL_BATCH)
    scored = score(
        [weights], [view], split, batch, workers=workers, device=device, keep_logits=True
    )
    # Not before the loader's workers are forked: they would not survive this process's threads.
    weights = calibrate_weights(weights, manifest, choice, device)
    confidence = probabilities(scored.logits, weights.calibration.temperature).max(axis=1)

    # An unreadable image has the prediction -1. It says nothing of the model's confidence.
    labels = split.index.label[:].astype(np.int64)
    predicted = scored.predicted
    classes = dataset.manifest.classes
    titles = _titles(classes)
    readable = predicted >= 0
    bins, error = bin_confidence(confidence[readable], predicted[readable] == labels[readable])
    return Findings(
        len(split),
        len(whole),
        describe_member(weights, view, best=True),
        report_of(scored, split, classes),
        titles,
        _confusion(labels[readable], predicted[readable], len(classes)),
        weights.calibration,
        bins,
        error,
        _surest_mistakes(split, titles, labels, predicted, confidence),
    )


def _surest_mistakes(
    split: SplitReader,
    titles: Sequence[str],
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    confidence: NDArray[Any],
) -> list[Mistake]:
    """Return the most confident mistakes, the surest first."""
    # A stable sort: equal confidences keep the split's order, in every report.
    wrong = np.flatnonzero((predicted >= 0) & (predicted != labels))
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    mistakes = []
    for sample in surest.tolist():
        mistake = Mistake(
            jpeg=_jpeg(split, sample),
            truth=titles[labels[sample]],
            taken_for=titles[predicted[sample]],
            confidence=float(confidence[sample]),
            key=split.index.key_of(sample),
        )
        mistakes.append(mistake)
    return mistakes


def _confusion(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int
) -> NDArray[np.int64] | None:
    """Count how often each class was predicted for each; None for too many classes to read."""
    # With more classes, the page lists the most confused pairs alone.
    if classes > LARGEST_MATRIX:
        return None
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def _best(store: Store, manifest: RunManifest) -> tuple[Choice, Weights]:
    choice = choose(manifest)
    return choice, load_weights(store, manifest, choice)


def _titles(classes: Sequence[ClassInfo]) -> list[str]:
    """Return the first name of each class, of which ImageNet's have several.

    If two are the same, it is all names, and the id.
    """
    # ImageNet has two classes "crane", and two "maillot".
    first = [entry.name.split(",")[0] for entry in classes]
    times = Counter(first)
    titles = []
    for name, entry in zip(first, classes, strict=True):
        title = name
        if times[name] > 1:
            title = title_of(entry)
        titles.append(title)
    return titles


def _jpeg(split: SplitReader, sample: int) -> bytes:
    sink = io.BytesIO()
    thumbnail(split, sample, SIDE).save(sink, "JPEG", quality=80)
    return sink.getvalue()
