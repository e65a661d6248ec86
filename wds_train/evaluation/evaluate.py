"""Score a model, or several together, on a split of a dataset.

Every member of an ensemble sees the samples at its own size and normalisation. Batches are those of
the training's validation, so that the same weights give the same numbers. `wds-train eval`, the
report, the calibration and the card of a published model take their scores from here.
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
    """The part of an image that a member sees.

    Attributes:
        side: The side of the model's input, pixels.
        crop: The share of the image's shorter side that is decoded, its central square.
        decoded: The side to which that square is resized, pixels. With more than `side`, the model
            sees several crops out of it.
        flip: The model sees the mirror images, too.
    """

    side: int
    crop: float
    decoded: int
    flip: bool

    @classmethod
    def of(
        cls, recipe: Recipe, tta: str | None, size: int | None = None, crop: float | None = None
    ) -> "View":
        """Return the view of a recipe's validation, with the changes that a person asks for.

        Args:
            recipe: The recipe of the training.
            tta: The views to average: none, flip or crops. Default: the recipe's.
            size: The side of the images, pixels. Default: the recipe's.
            crop: The share of the shorter side. Default: the recipe's.

        Raises:
            UsageError: Size or crop cannot work.
        """
        changes = []
        if size is not None:
            changes.append(f"data.eval_size={size}")
        if crop is not None:
            changes.append(f"data.eval_crop={crop}")
        data = with_settings(recipe, changes).data
        flip = data.eval_flip
        if tta is not None:
            flip = tta != "none"
        if tta != "crops":
            return cls(data.eval_size, data.eval_crop, data.eval_size, flip)

        # Where the recipe's crop leaves a margin, the crops come out of the whole square at the
        # same scale. Otherwise the square is enlarged.
        decoded = math.ceil(data.eval_size / min(data.eval_crop, CROPS_SHARE))
        share = min(1.0, data.eval_crop * decoded / data.eval_size)
        return cls(data.eval_size, share, decoded, flip)

    @property
    def transform(self) -> EvalTransform:
        """The transform that decodes it. Members with equal ones share a loader."""
        return EvalTransform(self.decoded, self.crop)


@dataclass(frozen=True)
class SplitScores:
    """The result of a pass over a split.

    Attributes:
        totals: The sum of all `scoring.sums`, float64 [4].
        predicted: The predicted classes, int64 [samples]; -1 for samples that cannot be read.
        logits: float32 [samples, classes]; [samples, 0] if they were not to be kept.
        unreadable: The samples that cannot be read.
    """

    totals: torch.Tensor
    predicted: NDArray[np.int64]
    logits: NDArray[np.float32]
    unreadable: list[Unreadable]


def choose_weights(source: str, kind: str, step: int | None) -> Weights:
    """Load the weights to evaluate.

    Args:
        source: An exported file, or the address of a run.
        kind: "raw", "ema", or BEST for whichever scored higher.
        step: The checkpoint's step. Default: that of the highest score.

    Raises:
        UsageError: The file or the run has no such weights.
        WdsTrainError: There is no such file or run, or its weights cannot be used.
    """
    if source.endswith(SUFFIX):
        weights = Weights.read(Path(source))
        if kind not in (BEST, weights.kind) or step not in (None, weights.step):
            raise UsageError(
                f"{source} holds the {weights.kind} weights of step {weights.step} alone; leave "
                "out --weights and --step"
            )
        return weights
    manifest, store = find_run(source)
    # A run in training replaces checkpoints while they are read.
    return from_newest(
        store, manifest, lambda newest: weights_of(store, newest, choose(newest, kind, step))
    )


def spread(split: SplitReader, most: int) -> SplitReader:
    """Return a part of a split, evenly taken.

    The first samples would not do: a split that others made may be sorted by class.

    Args:
        split: The split.
        most: The most samples to take.
    """
    if len(split) <= most:
        return split
    ids: Ids = np.linspace(0, len(split) - 1, most).round().astype(np.int64)
    columns = {}
    for column in dataclasses.fields(SampleIndex):
        if column.name != "key":
            columns[column.name] = getattr(split.index, column.name)[ids]
    # Keys are text, which NumPy does not index.
    keys = to_array(list(map(split.index.key_of, ids.tolist())), pa.string())
    return replace(split, index=SampleIndex(key=pa.chunked_array([keys]), **columns))


def refuse_other_classes(weights: Weights, dataset: Dataset) -> None:
    """Raise `UsageError` unless the dataset has the classes of the model, in the same order.

    Otherwise each prediction would be compared with the label of another class.
    """
    ours = [entry.id for entry in weights.classes]
    theirs = [entry.id for entry in dataset.manifest.classes]
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        difference = f"knows {len(ours)} classes, the dataset has {len(theirs)}"
    else:
        label = _first_difference(ours, theirs)
        difference = f"has {ours[label]!r} as class {label}, the dataset {theirs[label]!r}"
    raise UsageError(
        f"the model of {weights.run} cannot be evaluated on {dataset.store.url}: it {difference}; "
        "use a dataset of the classes that it was trained on, or make its shards again with that "
        "list: wds-train shards ... --classes FILE"
    )


def _first_difference(ours: list[str], theirs: list[str]) -> int:
    """Return the first place at which two lists of equal length differ."""
    for place, pair in enumerate(zip(ours, theirs, strict=True)):
        if pair[0] != pair[1]:
            return place
    raise AssertionError("the lists are equal")


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
) -> SplitScores:
    """Score models together on a split, in one pass.

    Args:
        chosen: The weights of the models. The probabilities of several are averaged.
        views: The view of each model. Models with the same pixels share a loader.
        split: The split.
        batch: The samples of a batch.
        workers: The loader processes of all loaders; 0 to read in this process, which has to be so
            once PyTorch has threads.
        device: Where the models compute.
        seen: Called with the number of samples of each batch.
        keep_logits: Return the logits, too.

    Raises:
        DataError: The split has no samples.
        UsageError: A model cannot take images of its view's size.
    """
    limit_threads()
    if not len(split):
        raise DataError(f"the split {split.name!r} of {split.store.url} has no samples")

    # One loader for each transform. They fork before PyTorch has threads, which a fork does not
    # survive: so the models come after.
    transforms = {view.transform for view in views}
    if workers:
        workers = max(1, workers // len(transforms))
    plan = EvalPlan(len(split), batch)
    pinned = device.type == "cuda"
    loaders = {}
    for transform in transforms:
        loaders[transform] = Pipeline(split, plan, transform, workers, pinned=pinned)
    for loader in loaders.values():
        loader.start()
    members = [Member(weights, view, device) for weights, view in zip(chosen, views, strict=True)]

    classes = len(chosen[0].classes) if keep_logits else 0
    tally = _Tally(len(split), classes, device)
    for batches in _read_together(loaders):
        logits = []
        for member in members:
            logits.append(member.logits(batches[member.view.transform].images))
        joint = _mean_probabilities(logits)
        seen(tally.add(list(batches.values()), joint))
    return tally.result()


class _Tally:
    """The sums of a pass over a split, batch by batch.

    Args:
        samples: The samples of the split.
        classes: The classes whose logits are kept; 0 to keep none.
        device: The device of the logits.
    """

    def __init__(self, samples: int, classes: int, device: torch.device) -> None:
        self._totals = torch.zeros(4, dtype=torch.float64, device=device)
        self._predicted = np.empty(samples, np.int64)
        self._logits = np.empty((samples, classes), np.float32)
        self._keeps_logits = classes > 0
        self._times = np.zeros(samples, np.int64)
        self._unreadable: list[Unreadable] = []

    def add(self, batches: list[Batch], logits: torch.Tensor) -> int:
        """Add a batch.

        Args:
            batches: The same samples, as each loader read them.
            logits: The logits of all members together, [n, classes].

        Returns:
            The number of its samples.
        """
        # A sample counts as unreadable, once, if it was so for one of the loaders.
        unreadable: dict[int, Unreadable] = {}
        for each in batches:
            for entry in each.unreadable:
                unreadable[entry.sample] = entry
        batch = replace(batches[0], unreadable=list(unreadable.values()))

        self._totals += sums(logits, batch)
        self._predicted[batch.ids] = logits.argmax(dim=1).cpu().numpy()
        if self._keeps_logits:
            self._logits[batch.ids] = logits.cpu().numpy()
        self._predicted[list(unreadable)] = -1
        self._times[batch.ids] += 1
        self._unreadable += batch.unreadable
        return len(batch.ids)

    def result(self) -> SplitScores:
        """Return the scores, once every sample was added."""
        others = np.flatnonzero(self._times != 1)
        assert not len(others), f"samples {others[:5]} did not come exactly once"
        return SplitScores(self._totals, self._predicted, self._logits, self._unreadable)


def _read_together(loaders: dict[EvalTransform, Pipeline]) -> Iterator[dict[EvalTransform, Batch]]:
    """Yield each batch as all of the loaders read it, by their transforms."""
    for batches in zip(*loaders.values(), strict=True):
        yield dict(zip(loaders, batches, strict=True))


class Member:
    """One model with its own view of the images.

    Args:
        weights: The trained model.
        view: The view of the images.
        device: Where the model computes.

    Raises:
        UsageError: The model cannot take images of this size.
    """

    def __init__(self, weights: Weights, view: View, device: torch.device) -> None:
        self.view = view
        recipe = weights.recipe
        self._model = create_model(recipe.model, len(weights.classes), recipe.seed, device).eval()
        self._normalise = Normaliser(recipe.data, device)
        self._predictor = Predictor(device, side=view.side, flip=view.flip)
        self._model.load_state_dict(weights.tensors)
        refuse_sizes(self._model, recipe.model.name, {"--size": view.side})

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of images, float32 [n, classes].

        Args:
            images: uint8 [n, side, side, 3], made by `view.transform`.
        """
        return self._predictor.logits(self._model, self._normalise(images))


def _mean_probabilities(logits: list[torch.Tensor]) -> torch.Tensor:
    """Return the logarithm of the mean of the members' probabilities.

    The logits of a single member stay as they are, to the last bit: they are those of the training.

    Args:
        logits: Those of each member, [n, classes].
    """
    if len(logits) == 1:
        return logits[0]
    # Through logarithms, as the probability of an unlikely class would be rounded to 0.
    shares = torch.stack([each.log_softmax(dim=1) for each in logits])
    return torch.logsumexp(shares, dim=0) - math.log(len(logits))
