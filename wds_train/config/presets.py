"""Recipes to begin with, each headed by its source, hardware, hours, cost and expected accuracy.

(p): published in the named source. (i): inferred, from a roofline model of a GPU that is never kept
waiting for data, and spot prices of late 2025. (m): measured by this project. The EMA's decay is
ours where the source has none.
"""

from dataclasses import dataclass, replace

from wds_train.config.recipe import (
    DataRecipe,
    EmaRecipe,
    LossRecipe,
    MixRecipe,
    ModelRecipe,
    OptimizerRecipe,
    Recipe,
    ScheduleRecipe,
)
from wds_train.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Preset:
    """A recipe, with what is known of its trainings.

    Attributes:
        recipe: The recipe.
        source: Its source: a paper, or somebody's configuration.
        expected: The expected top-1, and how it is evaluated.
        hours: GPU-hours, and the cost at spot prices.
    """

    recipe: Recipe
    source: str
    expected: str
    hours: str


# FFCV's configurations differ from each other in the epochs alone.
_FFCV = Recipe(
    name="quick",
    batch=1024,
    model=ModelRecipe(blur_pool=True),
    data=DataRecipe(size=192, start_size=160, eval_size=256, eval_flip=True),
    optimizer=OptimizerRecipe(name="momentum", lr=1.7, lr_batch=4096, weight_decay=1e-4),
    schedule=ScheduleRecipe(kind="linear", epochs=16, warmup_epochs=2, warmup_start=1e-4),
    ema=EmaRecipe(decay=0.9985),
)

_ALL = (
    # For ImageNet, from hours to days.
    Preset(
        _FFCV,
        source="FFCV's rn50 configuration, 16 epochs (libffcv/ffcv-imagenet)",
        expected="73.8 % at 256 px with the mirror image (p)",
        hours="A10G 4.5 h, $1.8-2.5; H100 .8 h (i)",
    ),
    Preset(
        replace(_FFCV, name="standard", schedule=replace(_FFCV.schedule, epochs=40)),
        source="FFCV's rn50 configuration, 40 epochs (libffcv/ffcv-imagenet)",
        expected="77.2 % at 256 px with the mirror image (p); ~76.5 % at 224 px (i)",
        hours="A10G 11 h, $4.3-6.3; H100 2.0 h (i)",
    ),
    Preset(
        Recipe(
            name="strong",
            batch=2048,
            model=ModelRecipe(name="resnet50d"),
            data=DataRecipe(size=160, eval_crop=0.95, auto_augment="rand-m6-mstd0.5-inc1"),
            optimizer=OptimizerRecipe(name="lamb", lr=8e-3, lr_batch=2048, weight_decay=0.02),
            # 1e-4 to 8e-3 to 1e-6, the cosine beneath the warm-up, as timm's scheduler has it.
            schedule=ScheduleRecipe(
                epochs=100,
                warmup_epochs=5,
                warmup_start=0.0125,
                warmup_prefix=False,
                final_lr=1.25e-4,
            ),
            mix=MixRecipe(mixup=0.1, cutmix=1.0),
            loss=LossRecipe(kind="bce", smoothing=0.0, bce_threshold=0.2),
            ema=EmaRecipe(decay=0.998),
        ),
        source="A3 of `ResNet strikes back` (arXiv:2110.00476) with timm's resnet50d",
        expected="78.74 % at 224 px (p: timm's resnet50d.a3)",
        hours="A10G 26 h, $9-15; H100 4.7 h (i)",
    ),
    Preset(
        Recipe(
            name="max",
            batch=1024,
            data=DataRecipe(
                size=176, eval_crop=224 / 232, auto_augment="trivial", erasing=0.1, repeats=4
            ),
            optimizer=OptimizerRecipe(name="momentum", lr=0.5, lr_batch=1024, weight_decay=2e-5),
            schedule=ScheduleRecipe(epochs=600, warmup_epochs=5, warmup_start=0.01),
            mix=MixRecipe(mixup=0.2, cutmix=1.0),
            # The source's .99998 is per sample-normalised step: 1 - 2e-5 * 1024 * 32 / 600 for each
            # update.
            ema=EmaRecipe(decay=0.99891, every=32),
        ),
        source="torchvision's ResNet50 weights V2 (pytorch/vision, references/classification)",
        expected="80.85 % at 224 px (p)",
        hours="A10G 169 h, $61-100; H100 30 h (i)",
    ),
    # For ImageNet, as others trained before.
    Preset(
        Recipe(
            name="seed",
            batch=128,
            model=ModelRecipe(drop_path=0.1),
            data=DataRecipe(color_jitter=(0.4, 0.4, 0.4, 0.1), erasing=0.25),
            optimizer=OptimizerRecipe(lr=0.1),
            schedule=ScheduleRecipe(epochs=130, warmup_epochs=5),
            mix=MixRecipe(mixup=0.4, cutmix=1.0),
            ema=EmaRecipe(decay=0.9999),
        ),
        source=(
            "an earlier project's run of 118 of 130 epochs; its warm-up and drop path rate are "
            "not known"
        ),
        expected="73.05 % at 224 px (p)",
        hours="A10G ~4 days, ~$35 as it was run (p)",
    ),
    Preset(
        Recipe(
            name="onecycle",
            batch=512,
            optimizer=OptimizerRecipe(name="adamw", lr=0.002, weight_decay=0.01),
            # OneCycle's div 25, final div 1e4, pct .3
            schedule=ScheduleRecipe(
                kind="onecycle",
                epochs=30,
                warmup_epochs=9,
                warmup_start=1 / 25,
                final_lr=1 / (25 * 1e4),
            ),
            ema=EmaRecipe(decay=0.999),
        ),
        source=(
            "OneCycle (arXiv:1708.07120) as earlier projects set it; they name no optimizer. "
            "Batches of 128, 4 at a time"
        ),
        expected="not measured",
        hours="A10G 14 h (i)",
    ),
    Preset(
        Recipe(
            name="step",
            batch=256,
            optimizer=OptimizerRecipe(name="momentum", lr=0.1, lr_batch=256, weight_decay=1e-4),
            schedule=ScheduleRecipe(kind="step", epochs=90, warmup_epochs=0, step_epochs=(30, 60)),
            loss=LossRecipe(smoothing=0.0),
            ema=EmaRecipe(decay=0.9998),
        ),
        source=(
            "He et al. 2015 (arXiv:1512.03385), in the 90 epochs of Goyal et al. 2017 "
            "(arXiv:1706.02677)"
        ),
        expected="75-76 % at 224 px (p)",
        hours="A10G 41 h, $15-24; H100 7.3 h (i)",
    ),
    # For smaller datasets, and first tries.
    Preset(
        Recipe(
            name="imagenette",
            batch=64,
            model=ModelRecipe(blur_pool=True, deep_stem=True),
            data=DataRecipe(size=128, eval_size=128, eval_crop=1.0, scale=(0.35, 1.0)),
            optimizer=OptimizerRecipe(lr=0.1, weight_decay=5e-4),
            schedule=ScheduleRecipe(epochs=20, warmup_epochs=1, flat=0.5),
            ema=EmaRecipe(decay=0.998),
        ),
        source=(
            "our own, of the ingredients of the leaderboard of github.com/fastai/imagenette: "
            "batches of 64 and mixup from 80 epochs on alone (2020-01-train.md), MaxBlurPool, "
            "XResNet's stem; a flat rate before the cosine (forums.fast.ai/t/53453). For 80 "
            "epochs: --set mix.mixup=0.2 --set mix.cutmix=1 --set mix.prob=0.5"
        ),
        expected=(
            "not measured; the public leaderboard has 91.6 % after 20 epochs, 87.4 % after 5 (p)"
        ),
        hours="not measured",
    ),
    Preset(
        Recipe(
            name="finetune",
            batch=32,
            model=ModelRecipe(init="timm:"),
            data=DataRecipe(scale=(0.35, 1.0), auto_augment="rand-m6-mstd0.5-inc1", as_init=True),
            optimizer=OptimizerRecipe(name="adamw", lr=5e-4, lr_batch=32, weight_decay=0.05),
            schedule=ScheduleRecipe(epochs=20, warmup_epochs=1, patience=6),
            ema=EmaRecipe(decay=0.99),
        ),
        source=(
            "our own. One rate for all layers: layer_decay .75 was 1.5 and 1.2 points lower (m: "
            "300 Imagenette images of five classes at 64 px, 8 epochs, from a resnet18 of the "
            "other five; 64.3 and 64.1 against 65.7 and 65.3 %, lr 1e-3)"
        ),
        expected="not measured from timm's weights",
        hours="not measured",
    ),
    Preset(
        Recipe(
            name="small",
            batch=32,
            model=ModelRecipe(name="resnet18"),
            data=DataRecipe(
                size=128,
                eval_size=128,
                eval_crop=1.0,
                scale=(0.35, 1.0),
                auto_augment="rand-m6-mstd0.5-inc1",
            ),
            optimizer=OptimizerRecipe(name="adamw", lr=1e-3, lr_batch=32, weight_decay=0.05),
            schedule=ScheduleRecipe(epochs=60, warmup_epochs=3, patience=15),
            ema=EmaRecipe(decay=0.99),
        ),
        source=(
            "our own, for hundreds to thousands of images and no pretrained weights; where there "
            "are some, `finetune`"
        ),
        expected="not measured",
        hours="not measured",
    ),
    Preset(
        Recipe(
            name="digits",
            batch=64,
            data=DataRecipe(
                size=32,
                eval_size=32,
                eval_crop=1.0,
                scale=(0.7, 1.0),
                flip=0.0,
                mean=(0.3,) * 3,
                std=(0.35,) * 3,
            ),
            optimizer=OptimizerRecipe(name="adamw", lr=0.002, weight_decay=0.05),
            schedule=ScheduleRecipe(epochs=10, warmup_epochs=1),
            ema=EmaRecipe(decay=0.98),
        ),
        source=(
            "our own, for scikit-learn's 1,797 handwritten digits at 32 px: a first try without a "
            "download"
        ),
        expected="98.9-99.2 % on the 360 held-out images (m: seeds 0, 1, 2)",
        hours="one CPU thread, 3.4 minutes (m)",
    ),
)

# The presets by name, in the order in which `wds-train recipes` lists them.
PRESETS = {each.recipe.name: each for each in _ALL}


def preset(name: str) -> Recipe:
    """Return the recipe of a preset.

    Raises:
        UsageError: There is no preset of that name. The message has the most similar names.
    """
    # Without a similar name, all of them: they fit in a line.
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS, 2) or f"; there are {', '.join(PRESETS)}"
        raise UsageError(f"there is no recipe {name!r}{hint}")
    return PRESETS[name].recipe
