"""What the best checkpoint gets right and wrong, found out at the time of the report on a part of the validation split."""

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
from wds_train.evaluation.calibrate import Bin, calibrated, calibration, loaded
from wds_train.evaluation.evaluate import View, refuse_other_classes, score, spread
from wds_train.evaluation.per_class import describe_member, report_of, title_of
from wds_train.models.calibration import Calibration, probabilities
from wds_train.models.scoring import EVAL_BATCH
from wds_train.models.weights import Weights
from wds_train.storage.base import Store
from wds_train.tracking.contact_sheet import thumbnail

LARGEST_MATRIX = 20  # classes
MISTAKES = 24  # images shown
SIDE = 112  # pixels of each


@dataclass(frozen=True)
class Mistake:
    jpeg: bytes
    truth: str
    taken_for: str
    confidence: float
    key: str


@dataclass(frozen=True)
class Findings:
    """`report` as `wds-train eval --json` has it, of `samples` out of `total`; `confusion` int64 [classes, classes], a row for
    each true class, of no more classes than a person can read. Confidences are those that all commands give, by the
    `calibration` of the weights; `calibration_error` is the expected one (ECE) on these samples, in percent.
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


def find(store: Store, manifest: RunManifest, most: int, *, workers: int, device: torch.device) -> Findings:
    """Evaluate the best weights of the run at `store` on at most `most` images. `WdsTrainError` where that cannot be done."""
    choice, weights = from_newest(store, manifest, lambda newest: _best(store, newest))
    dataset = Dataset.open(str(manifest.dataset.get("url", "")))
    if dataset.fingerprint != manifest.dataset.get("fingerprint"):
        raise DataError(
            f"{dataset.store.url} is another dataset now than the run was trained on; its fingerprint differs"
        )
    refuse_other_classes(weights, dataset)
    whole = dataset.split("val")
    split = spread(whole, most)
    view = View.of(weights.recipe, None)
    batch = min(weights.recipe.batch, EVAL_BATCH)
    scored = score([weights], [view], split, batch, workers=workers, device=device, keep_logits=True)
    # Not before the loader's workers are forked: this computes, with threads that they would not survive.
    weights = calibrated(weights, manifest, choice, device)
    confidence = probabilities(scored.logits, weights.calibration.temperature).max(axis=1)

    labels, classes = split.index.label[:].astype(np.int64), dataset.manifest.classes
    titles, readable = _titles(classes), scored.predicted >= 0
    bins, error = calibration(confidence[readable], scored.predicted[readable] == labels[readable])
    wrong = np.flatnonzero(readable & (scored.predicted != labels))
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    mistakes = [
        Mistake(
            _jpeg(split, sample),
            titles[labels[sample]],
            titles[scored.predicted[sample]],
            float(confidence[sample]),
            split.index.key_of(sample),
        )
        for sample in surest.tolist()
    ]
    return Findings(
        len(split),
        len(whole),
        describe_member(weights, view, best=True),
        report_of(scored, split, classes),
        titles,
        _confusion(labels[readable], scored.predicted[readable], len(classes)),
        weights.calibration,
        bins,
        error,
        mistakes,
    )


def _confusion(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64] | None:
    """How often each class was predicted for each; None where they are more than a person can read."""
    if classes > LARGEST_MATRIX:
        return None
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def _best(store: Store, manifest: RunManifest) -> tuple[Choice, Weights]:
    choice = choose(manifest)
    return choice, loaded(store, manifest, choice)


def _titles(classes: Sequence[ClassInfo]) -> list[str]:
    """The first of each class's names, which ImageNet's have several of, or all, and its id, where two would be the same."""
    first = [entry.name.split(",")[0] for entry in classes]
    times = Counter(first)
    return [name if times[name] == 1 else title_of(entry) for name, entry in zip(first, classes, strict=True)]


def _jpeg(split: SplitReader, sample: int) -> bytes:
    sink = io.BytesIO()
    thumbnail(split, sample, SIDE).save(sink, "JPEG", quality=80)
    return sink.getvalue()
