"""`wds-train bench decode`: from encoded bytes to an augmented uint8 image, on one core.

Our decoder takes turns with Pillow and torchvision on the same images. Other benchmarks use its
images and its reference.
"""

import argparse
import io
import json
import statistics
import tarfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

from benchmarks.host import list_versions, machine, versions_of
from wds_train.dataset.shard import IMAGE_EXTENSIONS
from wds_train.errors import UsageError
from wds_train.images.crop import Box, random_resized_crop
from wds_train.images.decode import ImageInfo, decode_crop, probe
from wds_train.rng import generator, rekeyed

# The crops of ImageNet recipes: side in pixels, share of the area, width / height.
SIZE = 224
SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
REPEATS = 7
# A pass has at least so many images; if there are fewer files, they come again with other crops.
PASS_SAMPLES = 150
REFERENCE = "Pillow + torchvision"
OURS = "wds-train"

Pixels = NDArray[np.uint8]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `wds-train bench decode` to its parser."""
    parser.add_argument(
        "--images",
        type=Path,
        help="a tar or a directory of images (default: scikit-learn's two photos)",
    )
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Run `wds-train bench decode` with the parsed flags, and return the exit status."""
    result = bench_decode(read_images(args.images))
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(_table(result))
    return 0


def read_images(path: Path | None) -> list[bytes]:
    """Read the images that a benchmark works on.

    Args:
        path: A tar or a directory of images. None: scikit-learn's two photos.

    Returns:
        Their encoded bytes, by their order in the tar, or by their paths.

    Raises:
        UsageError: `path` cannot be read, or holds no images.
    """
    if path is None:
        photos = files("sklearn.datasets.images")
        return [photos.joinpath(name).read_bytes() for name in ("china.jpg", "flower.jpg")]
    try:
        images = _read_directory(path) if path.is_dir() else _read_tar(path)
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"--images {path} cannot be read: {error}") from error
    if not images:
        endings = "." + ", .".join(IMAGE_EXTENSIONS)
        raise UsageError(f"--images {path} holds no file named {endings}")
    return images


def fill_pass(images: list[bytes]) -> list[bytes]:
    """Repeat `images`, all of them equally often, until there are at least `PASS_SAMPLES`."""
    return images * -(-PASS_SAMPLES // len(images))


def bench_decode(images: list[bytes]) -> dict[str, Any]:
    """Measure our decoder and the reference in alternating passes.

    Args:
        images: The encoded images.

    Returns:
        The machine, the versions, and medians over the passes: `img_per_s_per_core` of both by
        CPU time, `ratio` (ours to the reference), and `psnr_db` of our pixels.
    """
    # Torchvision would use all cores, and the figures are of one.
    torch.set_num_threads(1)
    images = fill_pass(images)
    seconds = _measure(images)
    rates = {}
    for name, times in seconds.items():
        rates[name] = round(len(images) / statistics.median(times))

    # Compared within a repeat, since whatever else the machine does slows both alike.
    ratios = []
    for theirs, ours in zip(seconds[REFERENCE], seconds[OURS], strict=True):
        ratios.append(theirs / ours)

    psnr = _psnr(images)
    packages = ("pillow", "torchvision", "torch", "simplejpeg")
    return {
        "images": len(images),
        "repeats": REPEATS,
        "machine": machine(),
        "versions": versions_of(packages),
        "img_per_s_per_core": rates,
        "ratio": round(statistics.median(ratios), 3),
        "psnr_db": {"mean": round(float(np.mean(psnr)), 2), "min": round(float(np.min(psnr)), 2)},
    }


def _measure(images: list[bytes]) -> dict[str, list[float]]:
    """Return the CPU seconds of every pass of both ways, which take turns."""
    batch = np.empty((len(images), SIZE, SIZE, 3), np.uint8)
    sizes = [probe(data) for data in images]  # as the index of a dataset has them
    seconds: dict[str, list[float]] = {REFERENCE: [], OURS: []}
    for repeat in range(-1, REPEATS):  # the pass numbered -1 warms up
        started = time.process_time()
        _reference_pass(images, batch, repeat)
        between = time.process_time()
        _our_pass(images, sizes, batch, repeat)
        ended = time.process_time()
        if repeat >= 0:
            seconds[REFERENCE].append(between - started)
            seconds[OURS].append(ended - between)
    return seconds


def _reference_pass(images: list[bytes], batch: Pixels, repeat: int) -> None:
    # Other crops in each pass, as in each epoch of a training.
    torch.manual_seed(repeat)
    transform = Compose(
        [
            RandomResizedCrop(SIZE, SCALE, RATIO, antialias=True),
            RandomHorizontalFlip(),
            PILToTensor(),
        ]
    )
    for data, out in zip(images, batch, strict=True):
        out[...] = transform(Image.open(io.BytesIO(data)).convert("RGB")).permute(1, 2, 0).numpy()


def _our_pass(images: list[bytes], sizes: list[ImageInfo], batch: Pixels, repeat: int) -> None:
    for number, (data, size, out) in enumerate(zip(images, sizes, batch, strict=True)):
        rng = rekeyed("bench", repeat, number)  # as the loader does
        box = random_resized_crop(rng, *size, SCALE, RATIO)
        decode_crop(data, box, out, flip=rng.random() < 0.5)


def _psnr(images: list[bytes]) -> list[float]:
    """Return the PSNR in dB of a crop of every image, compared with Pillow's of the same box."""
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    values = []
    for number, data in enumerate(images):
        box = random_resized_crop(generator("psnr", number), *probe(data), SCALE, RATIO)
        decode_crop(data, box, out)
        values.append(psnr(out, pillow_crop(data, box, SIZE)))
    return values


def pillow_crop(data: bytes, box: Box, size: int) -> Pixels:
    """Crop and resize an image with Pillow, bilinear and anti-aliased: the reference.

    Args:
        data: The encoded image.
        box: Left, top, width and height in the upright image, pixels.
        size: Side of the result, pixels.

    Returns:
        The pixels, uint8 [size, size, 3].
    """
    # The upright image, as decode_crop takes its boxes.
    left, top, width, height = box
    corners = (left, top, left + width, top + height)
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=corners))


def psnr(a: Pixels, b: Pixels) -> float:
    """Return the peak signal-to-noise ratio of two images in dB; 100 if they are equal.

    It is 10 log10(255^2 / mean squared error).
    """
    error = np.mean(np.square(a.astype(np.float64) - b))
    if error == 0:
        return 100.0
    return float(10 * np.log10(255**2 / error))


def _read_directory(path: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(path.rglob("*")) if _is_image(file.name)]


def _read_tar(path: Path) -> list[bytes]:
    images = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            file = tar.extractfile(member)  # None for what is no file
            if file and _is_image(member.name):
                images.append(file.read())
    return images


def _is_image(name: str) -> bool:
    return name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS


def _table(result: dict[str, Any]) -> str:
    rates = result["img_per_s_per_core"]
    psnr_db = result["psnr_db"]
    lines = [
        f"{result['images']} images, {result['repeats']} repeats, medians; {result['machine']}",
        list_versions(result["versions"], "  "),
        f"{'':22}{'img/s per core':>15}{'ratio':>8}{'PSNR mean / min, dB':>22}",
        f"{REFERENCE:22}{rates[REFERENCE]:15d}{1:8.2f}",
        f"{OURS:22}{rates[OURS]:15d}{result['ratio']:8.2f}"
        f"{psnr_db['mean']:15.1f} / {psnr_db['min']:.1f}",
    ]
    return "\n".join(lines)
