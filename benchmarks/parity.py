"""Does it learn as well as timm's own parts? The same recipe through `wds-train train`, and through a plain loop over
timm's ImageFolder, loader, transforms, optimizer, scheduler, Mixup and ModelEmaV2; top-1 of the raw and the EMA weights.

.venv/bin/python -m benchmarks.parity --threads 2             (Imagenette at 128 px, a tar of train/ and val/ folders)
.venv/bin/python -m benchmarks.parity --classes 2 --images-per-class 64 --epochs 2 --seeds 1           (a try)

The two agree in everything that the recipe says, and in nothing that it leaves open: initial weights, order and
augmentation come from other generators, timm resizes through Pillow, and mixes a whole batch at one ratio where we take
eight (docs/training.md). So the means over seeds are compared, not the seeds.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

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

SHARED = Path(os.environ.get("WDS_SHARED", Path(__file__).parents[3] / "shared"))


def main() -> None:
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
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = [
        f"model.name={args.model}",
        f"data.size={args.size}",
        f"data.eval_size={args.size}",
        f"schedule.epochs={args.epochs}",
        f"schedule.warmup_epochs={args.warmup_epochs}",
    ]
    print(
        f"timm {timm.__version__}, PyTorch {torch.__version__}, {args.threads} threads; imagenette {' '.join(settings)}"
    )
    rows = []
    with tempfile.TemporaryDirectory() as name:
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
            rows.append([*ours, *theirs])
            seconds = f"{between - began:12.0f} {time.perf_counter() - between:8.0f}"
            print(
                f"{seed:4d}  " + "  ".join(f"{top:8.2f}" for top in rows[-1]) + seconds, flush=True
            )
    print("\n".join(summary(rows)))


def unpack(images: Path, folder: Path, classes: int | None, per_class: int | None) -> None:
    """The tar's train/CLASS/IMAGE and val/CLASS/IMAGE, without what stands before them."""
    taken: dict[tuple[str, str], int] = {}
    with tarfile.open(images) as tar:
        members = [member for member in tar if member.isfile()]
        kept = sorted({member.name.split("/")[-2] for member in members})[:classes]
        for member in sorted(members, key=lambda member: member.name):
            split, label, file = member.name.split("/")[-3:]
            taken[split, label] = taken.get((split, label), 0) + 1
            if label in kept and (per_class is None or taken[split, label] <= per_class):
                member.name = f"{split}/{label}/{file}"
                tar.extract(member, folder, filter="data")


def wds_train(folder: Path, threads: int, *arguments: object) -> None:
    environment = os.environ | {
        "WDS_HOME": str(folder / "home"),
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, "-m", "wds_train.cli", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")


def train_ours(
    recipe: Recipe, settings: list[str], folder: Path, args: argparse.Namespace
) -> tuple[float, float]:
    """Top-1 of the raw and the EMA weights, percent, after the last epoch."""
    run = folder / f"run{recipe.seed}"
    flags = [part for setting in (*settings, f"seed={recipe.seed}") for part in ("--set", setting)]
    command = [
        "train",
        "--recipe",
        "imagenette",
        "--dataset",
        folder / "data",
        "--run",
        run,
        "--workers",
        args.workers,
    ]
    wds_train(folder, args.threads, *command, *flags)
    result = json.loads((run / "manifest.json").read_text())["result"]
    return result["val/top1"], result["val/top1_ema"]


def train_timm(recipe: Recipe, images: Path, workers: int) -> tuple[float, float]:
    """Top-1 of the plain loop's raw and EMA weights, percent, after the last epoch."""
    torch.manual_seed(recipe.seed)
    np.random.seed(recipe.seed)  # Mixup's
    wanted, schedule = recipe.optimizer, recipe.schedule
    train, val, classes = timm_loaders(recipe, images, workers)
    model = timm.create_model(recipe.model.name, num_classes=classes)
    ema = ModelEmaV2(model)
    optimizer = create_optimizer_v2(
        model,
        opt=wanted.name,
        lr=recipe.peak_lr,
        weight_decay=wanted.weight_decay,
        momentum=wanted.momentum,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=schedule.kind,
        num_epochs=schedule.epochs
        - int(schedule.warmup_epochs),  # timm counts them from the warm-up's end
        warmup_epochs=int(schedule.warmup_epochs),
        warmup_lr=schedule.warmup_start * recipe.peak_lr,
        warmup_prefix=True,
        min_lr=schedule.final_lr * recipe.peak_lr,
        step_on_epochs=False,
        updates_per_epoch=len(train),
    )
    mix = Mixup(
        recipe.mix.mixup,
        recipe.mix.cutmix,
        prob=recipe.mix.prob,
        switch_prob=recipe.mix.switch_prob,
        label_smoothing=recipe.loss.smoothing,
        num_classes=classes,
    )
    loss, step = SoftTargetCrossEntropy(), 0
    for _ in range(schedule.epochs):
        model.train()
        for pixels, labels in train:
            optimizer.zero_grad()
            mixed, targets = mix(pixels, labels)
            loss(model(mixed), targets).backward()
            optimizer.step()
            step += 1
            scheduler.step_update(step)
            ema.decay = min(
                recipe.ema.decay, step / (9 + step)
            )  # the warm-up that ModelEmaV2 lacks
            ema.update(model)
    return top1(model, val), top1(ema.module, val)


def timm_loaders(recipe: Recipe, images: Path, workers: int) -> tuple[Any, Any, int]:
    """timm's loaders of both splits, and the number of classes."""
    data = recipe.data
    folders = {
        split: create_dataset("", root=str(images), split=split, is_training=split == "train")
        for split in ("train", "val")
    }
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
        folders["train"],
        is_training=True,
        scale=data.scale,
        ratio=data.ratio,
        hflip=data.flip,
        color_jitter=None,  # type: ignore[arg-type]
        **both,
    )
    val = create_loader(folders["val"], crop_pct=data.eval_crop, **both)
    return train, val, len(folders["train"].reader.class_to_idx)


@torch.inference_mode()
def top1(model: nn.Module, val: Any) -> float:
    model.eval()
    hits: list[float] = [
        (model(pixels).argmax(dim=1) == labels).sum().item() for pixels, labels in val
    ]
    return 100 * sum(hits) / len(val.dataset)


def summary(rows: list[list[float]]) -> list[str]:
    """Means and standard deviations over seeds, and the differences with their standard errors."""
    columns, n = [*zip(*rows, strict=True)], len(rows)
    means = [statistics.fmean(column) for column in columns]
    spreads = [statistics.stdev(column) if n > 1 else math.nan for column in columns]
    lines = [
        f"{name:4s}  " + "  ".join(f"{each:8.2f}" for each in row)
        for name, row in (("mean", means), ("sd", spreads))
    ]
    for kind, ours, theirs in (("raw", 0, 2), ("EMA", 1, 3)):
        error = math.sqrt((spreads[ours] ** 2 + spreads[theirs] ** 2) / n)
        lines.append(
            f"{kind}: ours - timm = {means[ours] - means[theirs]:+.2f} points, standard error {error:.2f}"
        )
    return lines


if __name__ == "__main__":
    main()
