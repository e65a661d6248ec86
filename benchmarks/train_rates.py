"""`wds-train bench train`: training steps per second on one device, ours and a plain loop's.

The loop is that of timm's benchmark.py, over timm's parts: forward, loss, backward and optimizer
step over one batch of random floats that lies on the device, with autocast. Ours does all that a
training does: uint8 images from the host, normalised; learning rate, loss, EMA. There is no loader:
its rate is that of `wds-train bench loader`, and a training's records hold what it waited for
(time/data_wait).
"""

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from tqdm import tqdm

from benchmarks.host import list_versions, versions_of
from wds_train.config.numbers import positive
from wds_train.config.precision import Precision
from wds_train.config.presets import preset
from wds_train.config.recipe import Recipe
from wds_train.config.settings import with_settings
from wds_train.loader.batch import Batch
from wds_train.loader.pipeline import copy_to_device
from wds_train.models.precision import amp_dtype
from wds_train.training.engine import Trainer

CLASSES = 1000  # as ImageNet has
STEPS_PER_EPOCH = 1000  # of the schedule; no benchmark comes to an epoch's end
WARM_UP = 3  # steps, after which cuDNN has chosen its algorithms

# Does one step of a training; the device may still be at it afterwards.
Step = Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `wds-train bench train` to its parser."""
    parser.add_argument("--recipe", default="standard", metavar="NAME")
    parser.add_argument(
        "--set", action="append", default=[], metavar="K=V", dest="settings", help="as for `train`"
    )
    parser.add_argument(
        "--batch", type=positive, default=256, help="samples per step (default: %(default)s)"
    )
    parser.add_argument(
        "--sizes",
        type=positive,
        nargs="+",
        default=[224, 160],
        help="sides of the images, px (default: 224 160)",
    )
    parser.add_argument(
        "--steps", type=positive, default=20, help="steps a repeat (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also with torch.compile, which takes minutes to begin",
    )
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Run `wds-train bench train` with the parsed flags, and return the exit status."""
    recipe = with_settings(preset(args.recipe), [*args.settings, f"batch={args.batch}"])
    result = bench_train(recipe, args.sizes, args.steps, args.repeats, compiled=args.compile)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(_table(result))
    return 0


def bench_train(
    recipe: Recipe, sizes: list[int], steps: int, repeats: int, *, compiled: bool = False
) -> dict[str, Any]:
    """Measure images per second of every way at every size.

    Args:
        recipe: The model, the batch and the optimizer.
        sizes: Sides of the images, pixels.
        steps: Steps of a repeat.
        repeats: Repeats, in each of which all ways take their turn; their median counts.
        compiled: Measure every way with torch.compile, too.

    Returns:
        The device, the versions, and `rows` with size, way and `img_s`.
    """
    # All ways of one size take turns, so that whatever slows the machine slows all.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for side in sizes:
        ways: dict[str, Step] = {}
        ways |= ways_of(recipe, side, device, compiled=False)
        if compiled:
            ways |= ways_of(recipe, side, device, compiled=True)
        for name, rate in rates(ways, recipe.batch, steps, repeats, device).items():
            rows.append({"size": side, "way": name, "img_s": rate})
    return {
        "device": device_name(device),
        "model": recipe.model.name,
        "batch": recipe.batch,
        "versions": versions_of(("torch", "timm")),
        "rows": rows,
    }


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the number of threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def rates(
    ways: dict[str, Step], batch: int, steps: int, repeats: int, device: torch.device
) -> dict[str, float]:
    """Measure images per second of every way.

    Args:
        ways: The steps, by name.
        batch: Images of a step.
        steps: Steps of a repeat.
        repeats: Repeats, in each of which all ways take their turn; their median counts.
        device: Where the steps run.
    """
    # cuDNN chooses its algorithms, and torch.compile compiles.
    for step in ways.values():
        _seconds(step, WARM_UP, device)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for _ in tqdm(range(repeats), disable=None, leave=False):
        for name, step in ways.items():
            seconds[name].append(_seconds(step, steps, device))
    measured = {}
    for name, each in seconds.items():
        measured[name] = batch * steps / statistics.median(each)
    return measured


def ways_of(
    recipe: Recipe,
    side: int,
    device: torch.device,
    *,
    compiled: bool,
    precision: Precision = "auto",
) -> dict[str, Step]:
    """Return our step and timm's in both memory layouts, ready to be measured, by name.

    Args:
        recipe: The model, the batch and the optimizer.
        side: Side of the images, pixels.
        device: Where the steps run.
        compiled: Use torch.compile.
        precision: Precision of the arithmetic.
    """
    suffix = ", compiled" if compiled else ""
    ours = _ours(recipe, side, device, compiled=compiled, precision=precision)
    ways = {f"wds-train{suffix}": ours}
    for layout, order in (("NHWC", torch.channels_last), ("NCHW", torch.contiguous_format)):
        step = _timms(recipe, side, device, order, compiled=compiled, precision=precision)
        ways[f"timm's parts, {layout}{suffix}"] = step
    return ways


def random_batch(batch: int, side: int, device: torch.device) -> Batch:
    """Return a batch of noise for step 0, in memory that `device` copies from.

    Args:
        batch: The number of images.
        side: Their side, pixels.
        device: Where a training will use it.
    """
    rng = np.random.default_rng(0)
    ids = np.arange(batch)
    images = torch.from_numpy(rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, CLASSES, batch))
    # As the loader does: only from pinned memory is a copy asynchronous.
    if device.type == "cuda":
        images = images.pin_memory()
        labels = labels.pin_memory()
    return Batch(0, ids, ids, images, labels)


def _ours(
    recipe: Recipe, side: int, device: torch.device, *, compiled: bool, precision: Precision
) -> Step:
    """Return a step of our trainer."""
    data = replace(recipe.data, size=side, start_size=0)
    trainer = Trainer(
        replace(recipe, data=data),
        CLASSES,
        STEPS_PER_EPOCH,
        device,
        compile=compiled,
        precision=precision,
    )
    given = random_batch(recipe.batch, side, device)
    # As a training gets them: every batch is copied from the host, during the step before.
    batches = copy_to_device((replace(given, step=step) for step in itertools.count()), device)
    return lambda: trainer.step(next(batches))


def _timms(
    recipe: Recipe,
    side: int,
    device: torch.device,
    layout: torch.memory_format,
    *,
    compiled: bool,
    precision: Precision,
) -> Step:
    """Return a step of a plain loop over timm's parts."""
    # The same layers as ours: blur-pool and the like are options of the model, not of the loop.
    model = Trainer(recipe, CLASSES, STEPS_PER_EPOCH, device).model.to(memory_format=layout).train()
    optimizer = create_optimizer_v2(
        model, opt=recipe.optimizer.name, lr=0.1, momentum=0.9, weight_decay=1e-4
    )

    # One batch for all steps: neither copies nor normalisation are counted.
    images = torch.randn(recipe.batch, 3, side, side, device=device).to(memory_format=layout)
    labels = torch.randint(0, CLASSES, (recipe.batch,), device=device)
    criterion = torch.nn.CrossEntropyLoss()
    forward = torch.compile(model) if compiled else model
    amp = amp_dtype(device, precision)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, amp, enabled=amp is not None):
            loss = criterion(forward(images), labels)
        loss.backward()
        optimizer.step()

    return step


def _seconds(step: Step, steps: int, device: torch.device) -> float:
    """Return the time of so many steps, until the device has done them."""
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
    versions = list_versions(result["versions"])
    lines = [
        f"{result['model']}, batch {result['batch']}, on {result['device']}; {versions}",
        "",
        f"{'px':>4}  {'':28}  {'img/s':>8}",
    ]
    for row in result["rows"]:
        lines.append(f"{row['size']:4}  {row['way']:28}  {row['img_s']:8,.1f}")
    return "\n".join(lines)
