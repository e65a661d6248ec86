"""The mistakes of a validation: samples, classes, and no more images than people look at."""

import numpy as np
import torch

from wds_train.dataset.manifest import ClassInfo
from wds_train.evaluation.per_class import by_class, most_confused
from wds_train.loader.batch import Batch, Unreadable
from wds_train.models.mistakes import MISTAKES, Findings

CLASSES = tuple(ClassInfo(f"id{i}", f"name{i}") for i in range(3))


def batch(labels: list[int], first: int = 0, unreadable: tuple[int, ...] = ()) -> Batch:
    ids = np.arange(first, first + len(labels))
    images = torch.arange(first, first + len(labels), dtype=torch.uint8)[
        :, None, None, None
    ].expand(-1, 4, 4, 3)
    named = [Unreadable(sample, "shard", "key", "cause") for sample in unreadable]
    return Batch(0, ids, ids, images, torch.tensor(labels), named)


def test_mistakes_are_those_of_readable_samples_with_their_images() -> None:
    findings = Findings()
    findings.add(torch.eye(3)[[0, 2, 1, 0]] * 9, batch([0, 1, 1, 2], first=5, unreadable=(8,)))
    (mistake,) = findings.mistakes
    assert (mistake.sample, mistake.label, mistake.taken_for, mistake.image.max()) == (6, 1, 2, 6)
    assert 0.99 < mistake.confidence < 1
    labels, predicted = findings.labels, findings.predicted
    assert predicted.tolist() == [0, 2, 1, -1]
    assert [row["top1"] for row in by_class(labels, predicted, CLASSES)] == [100, 50, 0]
    assert most_confused(labels, predicted, CLASSES) == [
        {"class": "name1 (id1)", "taken_for": "name2 (id2)", "samples": 1}
    ]


def test_images_are_kept_of_the_first_mistakes_alone() -> None:
    findings = Findings()
    for first in range(0, 200, 40):
        findings.add(torch.eye(3)[[1] * 40], batch([0] * 40, first))
    assert [mistake.sample for mistake in findings.mistakes] == list(range(MISTAKES))
    assert len(findings.predicted) == 200
