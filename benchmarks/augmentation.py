"""What a policy costs: CPU time per image of a 224 crop, on one core, beside decoding, cropping and resizing it.

.venv/bin/python -m benchmarks.augmentation [--images TAR_OR_DIRECTORY]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.decode_rates import PASS_SAMPLES, RATIO, SCALE, SIZE, machine, read_images
from wds_train.config.recipe import DataRecipe
from wds_train.images.crop import random_resized_crop
from wds_train.images.decode import decode_crop, probe
from wds_train.images.policies import apply, policies
from wds_train.rng import rekeyed

REPEATS = 5
JITTER = (0.4, 0.4, 0.4)
POLICIES = [
    DataRecipe(auto_augment="rand-m6-mstd0.5-inc1"),
    DataRecipe(auto_augment="rand-m9-mstd0.5-inc1"),
    DataRecipe(auto_augment="original"),
    DataRecipe(auto_augment="3a"),
    DataRecipe(auto_augment="trivial"),
    DataRecipe(color_jitter=(*JITTER, 0.0)),
    DataRecipe(color_jitter=(*JITTER, 0.1)),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path)
    images = read_images(parser.parse_args().images)
    images *= -(-PASS_SAMPLES // len(images))
    torch.set_num_threads(1)
    batch = np.empty((len(images), SIZE, SIZE, 3), np.uint8)
    sizes = [probe(data) for data in images]

    def decoding(number: int, _: int) -> None:
        box = random_resized_crop(rekeyed("bench", number), *sizes[number], SCALE, RATIO)
        decode_crop(images[number], box, batch[number])

    def policy(data: DataRecipe) -> Callable[[int, int], None]:
        return lambda number, repeat: apply(
            policies(data, SIZE), batch[number].copy(), "bench", repeat, number
        )

    ways = {
        "decode, crop, resize": decoding,
        "key the generators, Pillow and back": policy_of_nothing(batch),
    }
    ways |= {f"{data.auto_augment or data.color_jitter}": policy(data) for data in POLICIES}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-1, REPEATS):  # the pass numbered -1 warms up
        for name, way in ways.items():
            began = time.process_time()
            for number in range(len(images)):
                way(number, repeat)
            if repeat >= 0:
                spent[name].append(1000 * (time.process_time() - began) / len(images))
    print(
        f"{len(images)} images, {REPEATS} passes in turns; {machine()}; ms of CPU an image, median (range)"
    )
    for name, times in spent.items():
        print(f"{name:40}{statistics.median(times):6.2f}  ({min(times):.2f}-{max(times):.2f})")


def policy_of_nothing(batch: np.ndarray) -> Callable[[int, int], None]:
    return lambda number, repeat: apply(
        (lambda image: image,), batch[number].copy(), "bench", repeat, number
    )


if __name__ == "__main__":
    main()
