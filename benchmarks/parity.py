"""Does it learn as well as timm's own parts? Top-1 of the raw and the EMA weights of both.

The same recipe goes through `wds-train train`, and through a plain loop over timm's ImageFolder,
loader, transforms, optimizer, scheduler, Mixup and ModelEmaV2.

The default is Imagenette at 128 px, a tar of train/ and val/ folders; the second is a try:

    .venv/bin/python -m benchmarks.parity --threads 2
    .venv/bin/python -m benchmarks.parity --classes 2 --images-per-class 64 --epochs 2 --seeds 1

The two agree in everything that the recipe says, and in nothing that it leaves open: initial
weights, order and augmentation come from other generators, timm resizes through Pillow, and mixes a
whole batch at one ratio where we take eight (docs/training.md). So the means over seeds are
compared, not the seeds.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.data import Mixup, create_dataset, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV2
from torch import nn

from wds_train.config.numbers import Number, count, positive
from wds_train.config.presets import preset
from wds_train.config.recipe import Recipe
from wds_train.config.settings import with_settings

# The default images are in a folder next to the repository.
SHARED = Path(os.environ.get("WDS_SHARED", Path(__file__).parents[3] / "shared"))


class Top1(NamedTuple):
    """Top-1 after the last epoch, percent, of the raw and the EMA weights."""

    raw: float
    ema: float


def main() -> None:
    """Train with both for every seed, and print the scores and their means."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)

    # The flags, as changes to the preset.
    settings = [
        f"model.name={args.model}",
        f"data.size={args.size}",
        f"data.eval_size={args.size}",
        f"schedule.epochs={args.epochs}",
        f"schedule.warmup_epochs={args.warmup_epochs}",
    ]
    print(
        f"timm {timm.__version__}, PyTorch {torch.__version__}, {args.threads} threads; "
        f"imagenette {' '.join(settings)}"
    )
    rows = []
    with tempfile.TemporaryDirectory() as name:
        # Both read the same images: timm the folder, we the dataset that is made of it.
        folder = Path(name)
        unpack(args.images, folder / "images", args.classes, args.images_per_class)
        wds_train(folder, args.threads, "shards", folder / "images", folder / "data")

        print("seed  ours raw  ours EMA  timm raw  timm EMA   seconds: ours, timm", flush=True)
        for seed in range(args.seeds):
            recipe = with_settings(preset("imagenette"), [*settings, f"seed={seed}"])
            began = time.perf_counter()
            ours = train_ours(recipe, settings, folder, args)
            between = time.perf_counter()
            theirs = train_timm(recipe, folder / "images", args.workers)
            ended = time.perf_counter()
            rows.append([*ours, *theirs])
            seconds = f"{between - began:12.0f} {ended - between:8.0f}"
            print(f"{seed:4d}  {columns(rows[-1])}{seconds}", flush=True)
    print("\n".join(summary(rows)))


def parse_arguments() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, default=SHARED / "data" / "imagenette128.tar", metavar="TAR")
    add("--model", default="resnet18")
    add(
        "--size", type=positive, default=64, help="pixels, in training and validation (%(default)s)"
    )
    add("--epochs", type=positive, default=5)
    add("--warmup-epochs", type=Number(float, 0), default=1.0)
    add("--seeds", type=positive, default=3, help="how many (%(default)s)")
    add("--threads", type=positive, default=2, help="of PyTorch (%(default)s)")
    add("--workers", type=count, default=1, help="loader processes (%(default)s)")
    add("--classes", type=positive, help="only the first so many")
    add("--images-per-class", type=positive, help="only so many, in each split")
    return parser.parse_args()


def unpack(images: Path, folder: Path, classes: int | None, per_class: int | None) -> None:
    """Extract a tar's train/CLASS/IMAGE and val/CLASS/IMAGE, without what stands before them.

    Args:
        images: The tar.
        folder: Where the images go.
        classes: Take the first so many classes by name. None: all.
        per_class: Take so many images of each class in each split. None: all.
    """
    taken: Counter[tuple[str, str]] = Counter()
    with tarfile.open(images) as tar:
        members = []
        labels = set()
        for member in tar:
            if member.isfile():
                members.append(member)
                labels.add(member.name.split("/")[-2])
        kept = sorted(labels)[:classes]
        for member in sorted(members, key=lambda member: member.name):
            split, label, file = member.name.split("/")[-3:]
            taken[split, label] += 1
            if label in kept and (per_class is None or taken[split, label] <= per_class):
                member.name = f"{split}/{label}/{file}"
                tar.extract(member, folder, filter="data")


def wds_train(folder: Path, threads: int, *arguments: object) -> None:
    """Run a command line of wds-train, and exit with its output if it fails."""
    # A home of its own, so that settings and caches of the person do not count.
    environment = os.environ | {
        "WDS_HOME": str(folder / "home"),
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, "-m", "wds_train.cli", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")


def train_ours(recipe: Recipe, settings: list[str], folder: Path, args: argparse.Namespace) -> Top1:
    """Train by `wds-train train`.

    Args:
        recipe: The recipe, of which the seed is taken.
        settings: Its changes to the preset, as for `--set`.
        folder: Where the dataset is, and the run goes.
        args: The benchmark's flags.
    """
    run = folder / f"run{recipe.seed}"
    command: list[object] = ["train", "--recipe", "imagenette"]
    command += ["--dataset", folder / "data", "--run", run, "--workers", args.workers]
    for setting in (*settings, f"seed={recipe.seed}"):
        command += ["--set", setting]
    wds_train(folder, args.threads, *command)
    result = json.loads((run / "manifest.json").read_text())["result"]
    return Top1(result["val/top1"], result["val/top1_ema"])


def train_timm(recipe: Recipe, images: Path, workers: int) -> Top1:
    """Train by a plain loop over timm's parts.

    Args:
        recipe: The recipe.
        images: The folder of train/ and val/.
        workers: Loader processes.
    """
    torch.manual_seed(recipe.seed)
    np.random.seed(recipe.seed)  # Mixup's
    train, val, classes = timm_loaders(recipe, images, workers)

    # Model, optimizer and Mixup as the recipe says, by the names that timm has for it.
    model = timm.create_model(recipe.model.name, num_classes=classes)
    ema = ModelEmaV2(model)
    optimizer, scheduler = timm_optimizer(recipe, model, len(train))
    mix = Mixup(
        recipe.mix.mixup,
        recipe.mix.cutmix,
        prob=recipe.mix.prob,
        switch_prob=recipe.mix.switch_prob,
        label_smoothing=recipe.loss.smoothing,
        num_classes=classes,
    )

    # The loop of an epoch goes as in timm's train.py.
    criterion = SoftTargetCrossEntropy()
    step = 0
    for _ in range(recipe.schedule.epochs):
        model.train()
        for pixels, labels in train:
            optimizer.zero_grad()
            mixed, targets = mix(pixels, labels)
            criterion(model(mixed), targets).backward()
            optimizer.step()
            step += 1
            scheduler.step_update(step)
            # The warm-up that ModelEmaV2 lacks: without it the EMA holds the initial weights long.
            ema.decay = min(recipe.ema.decay, step / (9 + step))
            ema.update(model)
    return Top1(top1(model, val), top1(ema.module, val))


def timm_optimizer(recipe: Recipe, model: nn.Module, updates_per_epoch: int) -> tuple[Any, Any]:
    """Return timm's optimizer and scheduler for a recipe."""
    wanted = recipe.optimizer
    optimizer = create_optimizer_v2(
        model,
        opt=wanted.name,
        lr=recipe.peak_lr,
        weight_decay=wanted.weight_decay,
        momentum=wanted.momentum,
    )
    schedule = recipe.schedule
    warmup_epochs = int(schedule.warmup_epochs)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=schedule.kind,
        num_epochs=schedule.epochs - warmup_epochs,  # timm counts them from the warm-up's end
        warmup_epochs=warmup_epochs,
        warmup_lr=schedule.warmup_start * recipe.peak_lr,
        warmup_prefix=True,
        min_lr=schedule.final_lr * recipe.peak_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return optimizer, scheduler


def timm_loaders(recipe: Recipe, images: Path, workers: int) -> tuple[Any, Any, int]:
    """Return timm's loaders of train and val, and the number of classes."""
    data = recipe.data
    root = str(images)
    train_folder = create_dataset("", root=root, split="train", is_training=True)
    val_folder = create_dataset("", root=root, split="val", is_training=False)

    # What both splits have in common.
    both: dict[str, Any] = {
        "input_size": (3, data.size, data.size),
        "batch_size": recipe.batch,
        "interpolation": "bilinear",
        "mean": data.mean,
        "std": data.std,
        "num_workers": workers,
        "use_prefetcher": False,
    }
    train = create_loader(
        train_folder,
        is_training=True,
        scale=data.scale,
        ratio=data.ratio,
        hflip=data.flip,
        color_jitter=None,  # type: ignore[arg-type]
        **both,
    )
    val = create_loader(val_folder, crop_pct=data.eval_crop, **both)
    return train, val, len(train_folder.reader.class_to_idx)


@torch.inference_mode()
def top1(model: nn.Module, val: Any) -> float:
    """Return a model's top-1 over timm's loader `val`, percent."""
    model.eval()
    hits = 0
    for pixels, labels in val:
        hits += int((model(pixels).argmax(dim=1) == labels).sum())
    return 100 * hits / len(val.dataset)


def summary(rows: list[list[float]]) -> list[str]:
    """Return lines with the means, the standard deviations and the differences of both.

    Args:
        rows: For each seed, top-1 of ours raw, ours EMA, timm raw, timm EMA, percent.
    """
    scores = np.array(rows)
    seeds = len(rows)
    means = scores.mean(axis=0)
    spreads = np.full(len(means), math.nan)
    if seeds > 1:
        spreads = scores.std(axis=0, ddof=1)
    lines = [f"mean  {columns(means)}", f"sd    {columns(spreads)}"]
    for kind, ours, theirs in (("raw", 0, 2), ("EMA", 1, 3)):
        error = math.hypot(spreads[ours], spreads[theirs]) / math.sqrt(seeds)
        difference = means[ours] - means[theirs]
        lines.append(f"{kind}: ours - timm = {difference:+.2f} points, standard error {error:.2f}")
    return lines


def columns(scores: Iterable[float]) -> str:
    """Return scores in percent as columns of the table."""
    return "  ".join([f"{score:8.2f}" for score in scores])


if __name__ == "__main__":
    main()
