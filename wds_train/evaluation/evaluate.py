"""The accuracy of a model, or of several together, on a split; by class, and which classes it confuses.

Every member of an ensemble sees the samples at its own size and normalisation; batches are those of the training's
validation, so that the same weights give the same numbers.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.restore import from_newest, weights_of
from wds_train.checkpoint.weight_choice import BEST, choose
from wds_train.config.recipe import Recipe
from wds_train.config.settings import with_settings
from wds_train.dataset.arrow import to_array
from wds_train.dataset.index import SampleIndex
from wds_train.dataset.reader import Dataset, SplitReader
from wds_train.errors import DataError, UsageError
from wds_train.images.normalise import Normaliser
from wds_train.loader.batch import Batch, Unreadable
from wds_train.loader.pipeline import Pipeline
from wds_train.loader.plan import EvalPlan
from wds_train.loader.transform import EvalTransform
from wds_train.loader.workers import limit_threads
from wds_train.models.model import create_model, refuse_sizes
from wds_train.models.scoring import Predictor, sums
from wds_train.models.weights import SUFFIX, Weights
from wds_train.rng import Ids

CROPS_SHARE = 0.875  # --tta crops: most of the large square's side that one crop takes


@dataclass(frozen=True)
class View:
    """What a member sees of an image: `side` pixels of the central `crop` share, or with `decoded` > `side`, crops of
    `side` out of a central square of `decoded`.
    """

    side: int
    crop: float
    decoded: int
    flip: bool

    @classmethod
    def of(
        cls, recipe: Recipe, tta: str | None, size: int | None = None, crop: float | None = None
    ) -> "View":
        """The recipe's, but for what the flags say; `UsageError` when that cannot work."""
        changes = {"data.eval_size": size, "data.eval_crop": crop}
        data = with_settings(
            recipe, [f"{name}={value}" for name, value in changes.items() if value is not None]
        ).data
        flip = data.eval_flip if tta is None else tta != "none"
        if tta != "crops":
            return cls(data.eval_size, data.eval_crop, data.eval_size, flip)
        # Where the recipe's crop leaves a margin, the whole square at the same scale; otherwise an enlarged one.
        decoded = math.ceil(data.eval_size / min(data.eval_crop, CROPS_SHARE))
        return cls(
            data.eval_size, min(1.0, data.eval_crop * decoded / data.eval_size), decoded, flip
        )

    @property
    def transform(self) -> EvalTransform:
        return EvalTransform(self.decoded, self.crop)


@dataclass(frozen=True)
class Scored:
    """What a pass over a split found. `totals` float64 [4], the sum of all `scoring.sums`; `predicted` int64 [samples],
    -1 where a sample could not be read; `logits` float32 [samples, classes], or [samples, 0] where they were not to be kept.
    """

    totals: torch.Tensor
    predicted: NDArray[np.int64]
    logits: NDArray[np.float32]
    unreadable: list[Unreadable]


def chosen_weights(source: str, kind: str, step: int | None) -> Weights:
    """The weights of a file, or those that `choose` takes out of a run."""
    if source.endswith(SUFFIX):
        weights = Weights.read(Path(source))
        if kind not in (BEST, weights.kind) or step not in (None, weights.step):
            raise UsageError(
                f"{source} holds the {weights.kind} weights of step {weights.step} alone; leave out --weights and --step"
            )
        return weights
    manifest, store = find_run(source)
    return from_newest(
        store, manifest, lambda newest: weights_of(store, newest, choose(newest, kind, step))
    )


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


def refuse_other_classes(weights: Weights, dataset: Dataset) -> None:
    ours, theirs = [
        [entry.id for entry in found] for found in (weights.classes, dataset.manifest.classes)
    ]
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        what = f"knows {len(ours)} classes, the dataset has {len(theirs)}"
    else:
        label = next(
            label for label, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]
        )
        what = f"has {ours[label]!r} as class {label}, the dataset {theirs[label]!r}"
    raise UsageError(
        f"the model of {weights.run} cannot be evaluated on {dataset.store.url}: it {what}; use a dataset of the "
        "classes that it was trained on, or make its shards again with that list: wds-train shards ... --classes FILE"
    )


def score(
    chosen: list[Weights],
    views: list[View],
    split: SplitReader,
    batch: int,
    *,
    workers: int,
    device: torch.device,
    seen: Callable[[int], object] = lambda _: None,
    keep_logits: bool = False,
) -> Scored:
    """One pass over the split; members that see the same pixels share a loader. `seen` is told of each batch's samples."""
    limit_threads()
    if not len(split):
        raise DataError(f"the split {split.name!r} of {split.store.url} has no samples")
    transforms = {view.transform for view in views}
    plan, workers = (
        EvalPlan(len(split), batch),
        max(1, workers // len(transforms)) if workers else 0,
    )
    pinned = device.type == "cuda"
    loaders = {
        transform: Pipeline(split, plan, transform, workers, pinned=pinned)
        for transform in transforms
    }
    for loader in loaders.values():
        loader.start()  # before PyTorch has threads, which a fork does not survive
    members = [Member(weights, view, device) for weights, view in zip(chosen, views, strict=True)]
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    predicted, times = np.empty(len(split), np.int64), np.zeros(len(split), np.int64)
    logits = np.empty((len(split), len(chosen[0].classes) if keep_logits else 0), np.float32)
    unreadable: list[Unreadable] = []
    for found in _together(loaders):
        joint = _mean_probabilities(
            [member.logits(found[member.view.transform].images) for member in members]
        )
        named = {entry.sample: entry for each in found.values() for entry in each.unreadable}
        one = replace(next(iter(found.values())), unreadable=list(named.values()))
        totals += sums(joint, one)
        predicted[one.ids] = joint.argmax(dim=1).cpu().numpy()
        if keep_logits:
            logits[one.ids] = joint.cpu().numpy()
        predicted[list(named)] = -1
        times[one.ids] += 1
        unreadable += one.unreadable
        seen(len(one.ids))
    assert (times == 1).all(), f"samples {np.flatnonzero(times != 1)[:5]} did not come exactly once"
    return Scored(totals, predicted, logits, unreadable)


def _together(loaders: dict[EvalTransform, Pipeline]) -> Iterator[dict[EvalTransform, Batch]]:
    for batches in zip(*loaders.values(), strict=True):
        yield dict(zip(loaders, batches, strict=True))


class Member:
    """One model on `device`, and its own view of the images."""

    def __init__(self, weights: Weights, view: View, device: torch.device) -> None:
        self.view, recipe = view, weights.recipe
        self._model = create_model(recipe.model, len(weights.classes), recipe.seed, device).eval()
        self._normalise = Normaliser(recipe.data, device)
        self._predictor = Predictor(device, side=view.side, flip=view.flip)
        self._model.load_state_dict(weights.tensors)
        refuse_sizes(self._model, recipe.model.name, {"--size": view.side})

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """The logits of uint8 images [n, side, side, 3] that `view.transform` made, float32 [n, classes]."""
        return self._predictor.logits(self._model, self._normalise(images))


def _mean_probabilities(logits: list[torch.Tensor]) -> torch.Tensor:
    """The logarithm of the members' mean probability; one member's logits as they are, to the last bit."""
    if len(logits) == 1:
        return logits[0]
    return torch.logsumexp(
        torch.stack([each.log_softmax(dim=1) for each in logits]), dim=0
    ) - math.log(len(logits))
