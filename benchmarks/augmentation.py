"""The cost of each augmentation policy: CPU time per image of 224 pixels, on one core.

The cost comes on top of decoding, cropping and resizing, which is measured in the same run.

    .venv/bin/python -m benchmarks.augmentation [--images TAR_OR_DIRECTORY]
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.decode_rates import (
    RATIO,
    SCALE,
    SIZE,
    Pixels,
    fill_pass,
    read_images,
)
from benchmarks.host import machine
from wds_train.config.recipe import DataRecipe
from wds_train.images.crop import random_resized_crop
from wds_train.images.decode import decode_crop, probe
from wds_train.images.policies import apply, policies
from wds_train.rng import rekeyed

REPEATS = 5
JITTER = (0.4, 0.4, 0.4)  # brightness, contrast and saturation, as ImageNet recipes set them
# Those of timm and torchvision, then jitter without and with hue, which costs the most.
POLICIES = [
    DataRecipe(auto_augment="rand-m6-mstd0.5-inc1"),
    DataRecipe(auto_augment="rand-m9-mstd0.5-inc1"),
    DataRecipe(auto_augment="original"),
    DataRecipe(auto_augment="3a"),
    DataRecipe(auto_augment="trivial"),
    DataRecipe(color_jitter=(*JITTER, 0.0)),
    DataRecipe(color_jitter=(*JITTER, 0.1)),
]

# Work on one image: called with the image's number and the number of the pass.
Way = Callable[[int, int], None]


def main() -> None:
    """Measure all policies in turns, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path)
    images = fill_pass(read_images(parser.parse_args().images))
    # A policy of torchvision would use all cores, and the figures are of one.
    torch.set_num_threads(1)
    batch = np.empty((len(images), SIZE, SIZE, 3), np.uint8)

    # Decoding comes first: it fills the batch that the policies are applied to.
    ways: dict[str, Way] = {
        "decode, crop, resize": _decoding(images, batch),
        "key the generators, Pillow and back": _no_policy(batch),
    }
    for data in POLICIES:
        ways[f"{data.auto_augment or data.color_jitter}"] = _policy(data, batch)

    spent = _measure(ways, len(images))
    print(
        f"{len(images)} images, {REPEATS} passes in turns; {machine()}; "
        "ms of CPU an image, median (range)"
    )
    for name, times in spent.items():
        print(f"{name:40}{statistics.median(times):6.2f}  ({min(times):.2f}-{max(times):.2f})")


def _measure(ways: dict[str, Way], images: int) -> dict[str, list[float]]:
    """Return the CPU time of every pass of every way, in ms per image."""
    spent: defaultdict[str, list[float]] = defaultdict(list)
    for repeat in range(-1, REPEATS):  # the pass numbered -1 warms up
        for name, way in ways.items():
            began = time.process_time()
            for number in range(images):
                way(number, repeat)
            if repeat >= 0:
                spent[name].append(1000 * (time.process_time() - began) / images)
    return spent


def _decoding(images: list[bytes], batch: Pixels) -> Way:
    """Return what writes a crop of image n into row n of `batch`, the same in every pass."""
    sizes = [probe(data) for data in images]

    def decode(number: int, _: int) -> None:
        box = random_resized_crop(rekeyed("bench", number), *sizes[number], SCALE, RATIO)
        decode_crop(images[number], box, batch[number])

    return decode


def _policy(data: DataRecipe, batch: Pixels) -> Way:
    """Return what applies the policies of `data` to a copy of a row of `batch`."""

    def augment(number: int, repeat: int) -> None:
        apply(policies(data, SIZE), batch[number].copy(), "bench", repeat, number)

    return augment


def _no_policy(batch: Pixels) -> Way:
    """Return what does all that a policy needs around it, and leaves the image as it is."""

    def keep(image: Image.Image) -> Image.Image:
        return image

    def augment(number: int, repeat: int) -> None:
        apply((keep,), batch[number].copy(), "bench", repeat, number)

    return augment


if __name__ == "__main__":
    main()
