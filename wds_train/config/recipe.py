"""Recipes: everything that decides a training's outcome except the data.

They are frozen, typed, and kept in the run's manifest. `--set section.field=value` changes one
field (`settings.py`). `presets.py` has the recipes to begin with.

A field that is added needs a default that changes nothing: the manifests of older runs do not have
it.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from wds_train.errors import RunError, UsageError
from wds_train.schema import typed


def _check(part: Any, section: str, *rules: tuple[str, bool, str]) -> None:
    """Raise `UsageError` if a field breaks its rule.

    Args:
        part: The part of the recipe that has the field.
        section: The prefix of its name in settings, such as "model.".
        rules: For each rule the field, True if it holds, and what the value must be, in words.
    """
    for name, holds, rule in rules:
        if not holds:
            raise UsageError(
                f"{section}{name} = {getattr(part, name)!r} cannot work: it must be {rule}"
            )


@dataclass(frozen=True)
class ModelRecipe:
    """The model, its layer options and its first weights."""

    # The network, and where it starts.
    name: str = "resnet50"
    """A timm model name."""
    init: str = ""
    """Weights to start from: `timm:NAME`, timm's pretrained ones (`timm:` those of `name`), a file
    of `wds-train export`, or a safetensors file of timm's weights for `name`. Empty: random.
    """
    # Changes of its layers.
    drop_path: float = 0.0
    """Stochastic depth rate of the last block (timm scales it down towards the first)."""
    blur_pool: bool = False
    """Blur before subsampling (Zhang 2019, arXiv:1904.11486); ResNets only, as the next two."""
    deep_stem: bool = False
    """ResNet-D's stem of three convolutions, and average pooling in shortcuts (He et al. 2018,
    arXiv:1812.01187).
    """
    squeeze_excite: bool = False
    """Squeeze-and-excitation in every block (Hu et al. 2017, arXiv:1709.01507)."""

    def __post_init__(self) -> None:
        _check(self, "model.", ("drop_path", 0 <= self.drop_path < 1, "in [0, 1)"))

    def layers(self) -> dict[str, dict[str, Any]]:
        """Return the layer options that are on, each with its arguments for timm's `create_model`.

        They are those of timm/models/resnet.py for resnetblur50, resnet50d and seresnet50.
        `aa_layer` is the name of a class of timm.layers, because a recipe must fit into JSON.
        """
        # By their arguments, not by the models' names: so that options can be combined.
        known: dict[str, dict[str, Any]] = {
            "blur_pool": {"aa_layer": "BlurPool2d"},
            "deep_stem": {"stem_width": 32, "stem_type": "deep", "avg_down": True},
            "squeeze_excite": {"block_args": {"attn_layer": "se"}},
        }
        chosen = {}
        for name, arguments in known.items():
            if getattr(self, name):
                chosen[name] = arguments
        return chosen

    def timm_arguments(self) -> dict[str, Any]:
        """Return the arguments for timm's `create_model` of all layer options together."""
        together: dict[str, Any] = {}
        for arguments in self.layers().values():
            together |= arguments
        return together


@dataclass(frozen=True)
class DataRecipe:
    """Images: sizes, crops, augmentation and normalisation."""

    # Sizes, of training and validation.
    size: int = 224
    """Side of the training images, pixels; with `start_size`, of the last epochs'."""
    start_size: int = 0
    """Side of the first epochs' images, which grows to `size` in steps of 32 during `size_ramp`; 0:
    `size` throughout.
    """
    size_ramp: tuple[float, float] = (0.74, 0.86)
    """Shares of the epochs between which the side grows."""
    eval_size: int = 224
    """Side of the validation images, pixels."""
    eval_crop: float = 0.875
    """Share of the shorter side that validation keeps."""
    eval_flip: bool = False
    """Validate on the mean of the logits of each image and its mirror image."""
    # Augmentation.
    scale: tuple[float, float] = (0.08, 1.0)
    """RandomResizedCrop: smallest and largest area share."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """RandomResizedCrop: smallest and largest aspect ratio, width / height."""
    flip: float = 0.5
    """Probability of a horizontal flip. 0 where left and right differ, as in digits."""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Largest changes of brightness, contrast, saturation (shares) and hue (turns), as
    torchvision's ColorJitter.
    """
    auto_augment: str = ""
    """A policy: timm's `rand-m6-mstd0.5-inc1` (RandAugment) or `original` (AutoAugment), or
    `trivial` (TrivialAugmentWide, of torchvision). Empty: none.
    """
    erasing: float = 0.0
    """Probability that a rectangle of an image is erased, with normal noise (timm's RandomErasing,
    mode `pixel`).
    """
    repeats: int = 1
    """Repeated augmentation (Hoffer et al. 2019, arXiv:1901.09335): how often each sample stands in
    its batch, each time with new augmentation. A pass over the dataset then takes so many epochs.
    """
    # Normalisation.
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean of pixels in [0, 1], ImageNet's by default."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation of pixels in [0, 1]."""
    as_init: bool = False
    """Take the sizes, `eval_crop`, `mean` and `std` from the weights of `model.init`, except those
    that are set.
    """
    # Tolerance.
    max_bad: float = 0.001
    """Share of an epoch's samples that may be unreadable before the run stops."""

    def __post_init__(self) -> None:
        # A side of less than 8 pixels is a slip: no model could learn from such images.
        _check(
            self,
            "data.",
            ("size", self.size >= 8, "at least 8 pixels"),
            (
                "start_size",
                self.start_size == 0 or 8 <= self.start_size <= self.size,
                f"0, or 8 to {self.size}",
            ),
            ("size_ramp", 0 <= self.size_ramp[0] <= self.size_ramp[1] <= 1, "ascending, in [0, 1]"),
            ("eval_size", self.eval_size >= 8, "at least 8 pixels"),
            ("eval_crop", 0 < self.eval_crop <= 1, "in (0, 1]"),
            ("scale", 0 < self.scale[0] <= self.scale[1] <= 1, "ascending, in (0, 1]"),
            ("ratio", 0 < self.ratio[0] <= self.ratio[1], "ascending and positive"),
            ("flip", 0 <= self.flip <= 1, "a probability"),
            (
                "color_jitter",
                min(self.color_jitter) >= 0 and self.color_jitter[3] <= 0.5,
                "0 or more, the hue to .5",
            ),
            ("erasing", 0 <= self.erasing <= 1, "a probability"),
            ("repeats", self.repeats >= 1, "at least 1"),
            ("std", min(self.std) > 0, "positive"),
            ("max_bad", 0 <= self.max_bad <= 1, "a share"),
        )


@dataclass(frozen=True)
class OptimizerRecipe:
    """The optimizer and its rates."""

    name: str = "sgd"
    """A timm optimizer name. timm's `sgd` is Nesterov, `momentum` is plain."""
    lr: float = 0.1
    """Peak learning rate."""
    lr_batch: int = 0
    """The global batch that `lr` is for: another batch scales it in proportion. 0: `lr` is taken as
    it is.
    """
    momentum: float = 0.9
    weight_decay: float = 1e-4
    """Not applied to biases and normalisation layers."""
    clip_norm: float = 0.0
    """Largest norm of all gradients together; 0: no limit."""
    layer_decay: float = 1.0
    """Learning rate of each layer, as a share of that of the layer after it (timm's `layer_decay`);
    1: the same for all.
    """

    def __post_init__(self) -> None:
        _check(
            self,
            "optimizer.",
            ("lr", 0 < self.lr < math.inf, "a positive number"),
            ("lr_batch", self.lr_batch >= 0, "a number of samples, or 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("clip_norm", 0 <= self.clip_norm < math.inf, "0 or more"),
            ("layer_decay", 0 < self.layer_decay <= 1, "in (0, 1]"),
        )


@dataclass(frozen=True)
class ScheduleRecipe:
    """The learning rate over the training, and its length."""

    # The length and the form of the curve.
    kind: Literal["cosine", "linear", "step", "onecycle"] = "cosine"
    """The curve of the learning rate after the warm-up. `onecycle` is `cosine` with a warm-up of
    the same shape.
    """
    epochs: int = 90
    # The way up.
    warmup_epochs: float = 5.0
    """Epochs of warm-up to the peak."""
    warmup_start: float = 0.0
    """Learning rate at step 0, as a share of the peak."""
    warmup_prefix: bool = True
    """True if the cosine begins when the warm-up ends; otherwise at step 0, hidden by the warm-up
    until then (timm's default).
    """
    # The way down.
    flat: float = 0.0
    """Share of the training, warm-up included, during which the peak is kept before `cosine` or
    `linear` come down.
    """
    final_lr: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    step_epochs: tuple[float, ...] = ()
    """`step`: the epochs after which the learning rate is multiplied by `step_factor`."""
    step_factor: float = 0.1
    # An early end.
    patience: int = 0
    """End early when neither raw nor EMA top-1 has been higher than ever before for so many epochs;
    0: never.
    """

    def __post_init__(self) -> None:
        _check(
            self,
            "schedule.",
            ("epochs", self.epochs > 0, "at least 1"),
            (
                "warmup_epochs",
                0 <= self.warmup_epochs < self.epochs,
                f"less than schedule.epochs ({self.epochs})",
            ),
            ("warmup_start", 0 <= self.warmup_start <= 1, "a share of the peak"),
            ("flat", 0 <= self.flat < 1, "a share of the training"),
            ("final_lr", 0 <= self.final_lr <= 1, "a share of the peak"),
            ("step_epochs", list(self.step_epochs) == sorted(self.step_epochs), "ascending"),
            ("step_factor", 0 < self.step_factor <= 1, "in (0, 1]"),
            ("patience", self.patience >= 0, "a number of epochs, or 0"),
        )


@dataclass(frozen=True)
class MixRecipe:
    """Mixing of pairs of samples: mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899)."""

    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution; 0 is off."""
    prob: float = 1.0
    """Probability that a group of samples is mixed at all."""
    switch_prob: float = 0.5
    """Probability of CutMix, with both on."""

    def __post_init__(self) -> None:
        _check(
            self,
            "mix.",
            ("mixup", 0 <= self.mixup < math.inf, "0 or more"),
            ("cutmix", 0 <= self.cutmix < math.inf, "0 or more"),
            ("prob", 0 <= self.prob <= 1, "a probability"),
            ("switch_prob", 0 <= self.switch_prob <= 1, "a probability"),
        )


@dataclass(frozen=True)
class LossRecipe:
    """The loss for the labels."""

    kind: Literal["cross_entropy", "bce"] = "cross_entropy"
    """`bce`: a binary cross-entropy per class, averaged over samples and classes
    (arXiv:2110.00476).
    """
    smoothing: float = 0.1
    """Label smoothing."""
    bce_threshold: float = 0.0
    """`bce`: mixed targets above it count as 1, the others as 0; 0: they are taken as they are."""

    def __post_init__(self) -> None:
        _check(
            self,
            "loss.",
            ("smoothing", 0 <= self.smoothing < 1, "in [0, 1)"),
            ("bce_threshold", 0 <= self.bce_threshold < 1, "in [0, 1)"),
        )


@dataclass(frozen=True)
class EmaRecipe:
    """The average of the weights over the training."""

    kind: Literal["ema", "swa"] = "ema"
    """`ema`: an exponential moving average of the weights; `swa`: their plain mean
    (arXiv:1803.05407).
    """
    decay: float = 0.9999
    """`ema`: decay per update, which the warm-up min(decay, (1 + n) / (10 + n)) ends at."""
    every: int = 1
    """Optimizer steps between two updates."""
    swa_start: float = 0.75
    """`swa`: share of the training after which the mean begins; until then it is the weights
    themselves.
    """

    def __post_init__(self) -> None:
        _check(
            self,
            "ema.",
            ("decay", 0 <= self.decay < 1, "in [0, 1)"),
            ("every", self.every >= 1, "at least 1"),
            ("swa_start", 0 <= self.swa_start < 1, "a share of the training"),
        )


@dataclass(frozen=True)
class DistillRecipe:
    """A teacher to learn from as well (Hinton et al. 2015, arXiv:1503.02531)."""

    teacher: str = ""
    """A model to learn from as well: `timm:NAME` with timm's pretrained weights, or a file of
    `wds-train export`.
    """
    weight: float = 0.5
    """Share of the loss that is the teacher's: weight * T^2 * KL(teacher / T || student / T)
    (arXiv:1503.02531).
    """
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check(
            self,
            "distill.",
            ("weight", 0 <= self.weight <= 1, "a share of the loss"),
            ("temperature", 0 < self.temperature < math.inf, "positive"),
        )


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, in sections."""

    name: str
    batch: int = 256
    """Global batch: samples per optimizer step over all ranks."""
    seed: int = 0
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    mix: MixRecipe = field(default_factory=MixRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    ema: EmaRecipe = field(default_factory=EmaRecipe)
    distill: DistillRecipe = field(default_factory=DistillRecipe)

    def __post_init__(self) -> None:
        # What binds two sections is checked here; each section has checked itself.
        mixes = self.mix.mixup > 0 or self.mix.cutmix > 0
        repeats = self.data.repeats
        _check(
            self,
            "",
            ("batch", self.batch > 0, "a positive number of samples"),
            ("batch", not mixes or self.batch % 2 == 0, "even, because mixup pairs samples"),
            ("batch", self.batch % repeats == 0, f"divisible by data.repeats ({repeats})"),
        )

    @property
    def peak_lr(self) -> float:
        """The peak learning rate at this recipe's batch."""
        reference = self.optimizer.lr_batch
        if not reference:
            return self.optimizer.lr
        return self.optimizer.lr * (self.batch / reference)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON holds it: tuples are lists, so that it equals what is read."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Recipe":
        """Return the recipe that `to_dict` gave.

        Args:
            tree: The recipe as JSON holds it. A field that it does not name has been added since,
                and gets its default.

        Raises:
            RunError: A field exists no more, or has a value of another type.
        """
        try:
            return typed(cls, tree, "recipe")
        except (ValueError, UsageError) as error:
            raise RunError(str(error)) from error
