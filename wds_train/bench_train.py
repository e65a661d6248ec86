"""`wds-train bench train`: training steps per second on one device, ours beside a plain loop over timm's parts.

The loop is that of timm's benchmark.py: forward, loss, backward and optimizer step over one batch of random floats that lies
on the device, with autocast. Ours does all that a training does: uint8 images from the host, normalised; lr, loss, EMA.
No loader: its rate is `wds-train bench loader`'s, and a training's records hold what it waited for (time/data_wait).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from tqdm import tqdm

from wds_train.engine import Trainer
from wds_train.pipeline import Batch
from wds_train.presets import preset
from wds_train.recipe import Recipe, with_settings

CLASSES = 1000
STEPS_PER_EPOCH = 1000
WARM_UP = 3  # steps, after which cuDNN has chosen its algorithms

Step = Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="standard", metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", dest="settings", help="as for `train`")
    parser.add_argument("--batch", type=int, default=256, help="samples per step (default: %(default)s)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[224, 160], help="sides of the images, px (default: 224 160)"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps a repeat (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, which takes minutes to begin")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    recipe = with_settings(preset(args.recipe), [*args.settings, f"batch={args.batch}"])
    result = bench_train(recipe, args.sizes, args.steps, args.repeats, compiled=args.compile)
    print(json.dumps(result, indent=2) if args.json else _table(result))
    return 0


def bench_train(
    recipe: Recipe, sizes: list[int], steps: int, repeats: int, *, compiled: bool = False
) -> dict[str, Any]:
    """Images per second of every way at every size: medians over `repeats`, in each of which all ways take their turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for side in sizes:
        ways = _ways(recipe, side, device, compiled=compiled)
        for step in ways.values():
            _seconds(step, WARM_UP, device)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in tqdm(range(repeats), desc=f"{side} px", disable=None, leave=False):
            for name, step in ways.items():
                seconds[name].append(_seconds(step, steps, device))
        for name, each in seconds.items():
            rows.append({"size": side, "way": name, "img_s": recipe.batch * steps / statistics.median(each)})
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "model": recipe.model.name,
        "batch": recipe.batch,
        "versions": {name: version(name) for name in ("torch", "timm")},
        "rows": rows,
    }


def _ways(recipe: Recipe, side: int, device: torch.device, *, compiled: bool) -> dict[str, Step]:
    ways: dict[str, Step] = {}
    for suffix, compiles in [("", False), (", compiled", True)][: 1 + compiled]:
        ways[f"wds-train{suffix}"] = _ours(recipe, side, device, compiled=compiles)
        for layout, order in (("NHWC", torch.channels_last), ("NCHW", torch.contiguous_format)):
            ways[f"timm's parts, {layout}{suffix}"] = _timms(recipe, side, device, order, compiled=compiles)
    return ways


def _ours(recipe: Recipe, side: int, device: torch.device, *, compiled: bool) -> Step:
    data = replace(recipe.data, size=side, start_size=0)
    trainer = Trainer(replace(recipe, data=data), CLASSES, STEPS_PER_EPOCH, device, compile=compiled)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (recipe.batch, side, side, 3), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, CLASSES, recipe.batch))
    if device.type == "cuda":
        images = images.pin_memory()
    ids = np.arange(recipe.batch)
    return lambda: trainer.step(Batch(trainer.progress.step, ids, ids, images, labels))


def _timms(recipe: Recipe, side: int, device: torch.device, layout: torch.memory_format, *, compiled: bool) -> Step:
    # The same layers as ours: blur-pool and the like are options of the model, not of the loop.
    model = Trainer(recipe, CLASSES, STEPS_PER_EPOCH, device).model.to(memory_format=layout).train()
    optimizer = create_optimizer_v2(model, opt=recipe.optimizer.name, lr=0.1, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(recipe.batch, 3, side, side, device=device).to(memory_format=layout)
    labels = torch.randint(0, CLASSES, (recipe.batch,), device=device)
    loss_of = torch.nn.CrossEntropyLoss()
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
            loss = loss_of(forward(images), labels)
        loss.backward()
        optimizer.step()

    return step


def _seconds(step: Step, steps: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [f"{result['model']}, batch {result['batch']}, on {result['device']}; {versions}", ""]
    lines += [f"{'px':>4}  {'':28}  {'img/s':>8}"]
    lines += [f"{row['size']:4}  {row['way']:28}  {row['img_s']:8,.1f}" for row in result["rows"]]
    return "\n".join(lines)
