"""What the best checkpoint gets right and wrong, found out at the time of the report on a part of the validation split."""

import dataclasses
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from wds_train.checkpoint.manifest import RunManifest
from wds_train.data.dataset import Dataset, SplitReader
from wds_train.errors import DataError
from wds_train.evaluation.evaluate import View, chosen_weights, refuse_other_classes, score
from wds_train.evaluation.report import describe_member, report_of, title_of
from wds_train.evaluation.scoring import EVAL_BATCH
from wds_train.format.arrow import to_array
from wds_train.format.index import SampleIndex
from wds_train.format.manifest import ClassInfo
from wds_train.rng import Ids
from wds_train.tracking.contact_sheet import thumbnail

BINS = 15  # of confidence
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
class Bin:
    """Predictions of about equal confidence; both figures in percent."""

    samples: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Findings:
    """`report` as `wds-train eval --json` has it, of `samples` out of `total`; `confusion` int64 [classes, classes], a row for
    each true class, of no more classes than a person can read; `calibration_error` is the expected one (ECE), in percent.
    """

    samples: int
    total: int
    member: dict[str, Any]
    report: dict[str, Any]
    titles: list[str]
    confusion: NDArray[np.int64] | None
    bins: list[Bin]
    calibration_error: float
    mistakes: list[Mistake]


def find(run: str, manifest: RunManifest, most: int, *, workers: int, device: torch.device) -> Findings:
    """Evaluate the best checkpoint of the run at `run` on at most `most` images. `WdsTrainError` where that cannot be done."""
    weights = chosen_weights(run, "best", None)
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
    scored = score([weights], [view], split, batch, workers=workers, device=device)
    labels, classes = split.index.label[:].astype(np.int64), dataset.manifest.classes
    titles = _titles(classes)
    readable = scored.predicted >= 0
    confusion = None
    if len(classes) <= LARGEST_MATRIX:
        confusion = np.zeros((len(classes), len(classes)), np.int64)
        np.add.at(confusion, (labels[readable], scored.predicted[readable]), 1)
    bins, error = calibration(scored.confidence[readable], scored.predicted[readable] == labels[readable])
    wrong = np.flatnonzero(readable & (scored.predicted != labels))
    surest = wrong[np.argsort(-scored.confidence[wrong], kind="stable")][:MISTAKES]
    return Findings(
        len(split),
        len(whole),
        describe_member(weights, view, best=True),
        report_of(scored, split, classes),
        titles,
        confusion,
        bins,
        error,
        [
            Mistake(
                _jpeg(split, sample),
                titles[labels[sample]],
                titles[scored.predicted[sample]],
                float(scored.confidence[sample]),
                split.index.key_of(sample),
            )
            for sample in surest.tolist()
        ],
    )


def _titles(classes: Sequence[ClassInfo]) -> list[str]:
    """The first of each class's names, which ImageNet's have several of, or all, and its id, where two would be the same."""
    first = [entry.name.split(",")[0] for entry in classes]
    times = Counter(first)
    return [name if times[name] == 1 else title_of(entry) for name, entry in zip(first, classes, strict=True)]


def spread(split: SplitReader, most: int) -> SplitReader:
    """At most `most` samples of the split, evenly taken: one made by others may be sorted by class."""
    if len(split) <= most:
        return split
    ids: Ids = np.linspace(0, len(split) - 1, most).round().astype(np.int64)
    taken = {
        column.name: getattr(split.index, column.name)[ids]
        for column in dataclasses.fields(SampleIndex)
        if column.name != "key"
    }
    keys = to_array([split.index.key_of(sample) for sample in ids.tolist()], pa.string())
    return replace(split, index=SampleIndex(key=pa.chunked_array([keys]), **taken))


def calibration(confidence: NDArray[np.float32], right: NDArray[np.bool_]) -> tuple[list[Bin], float]:
    """The bins of equal width that hold samples, and the expected calibration error: the mean distance of accuracy and
    confidence over the bins, weighted by samples (Guo et al. 2017, arXiv:1706.04599).
    """
    places = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    bins = [
        Bin(int(held.sum()), 100 * float(confidence[held].mean()), 100 * float(right[held].mean()))
        for place in range(BINS)
        if (held := places == place).any()
    ]
    distance = sum(each.samples * abs(each.accuracy - each.confidence) for each in bins)
    return bins, distance / max(1, len(right))


def _jpeg(split: SplitReader, sample: int) -> bytes:
    sink = io.BytesIO()
    thumbnail(split, sample, SIDE).save(sink, "JPEG", quality=80)
    return sink.getvalue()
