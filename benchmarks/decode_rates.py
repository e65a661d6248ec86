"""`wds-train bench decode`: from encoded bytes to an augmented uint8 image, on one core, against Pillow and torchvision."""

import argparse
import io
import json
import platform
import statistics
import tarfile
import time
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

from wds_train.dataset.shard import IMAGE_EXTENSIONS
from wds_train.errors import UsageError
from wds_train.images.crop import Box, random_resized_crop
from wds_train.images.decode import ImageInfo, decode_crop, probe
from wds_train.rng import generator, rekeyed

SIZE, SCALE, RATIO = 224, (0.08, 1.0), (3 / 4, 4 / 3)
REPEATS = 7
PASS_SAMPLES = 150  # at least so many images a pass, fewer files being taken again with other crops
REFERENCE, OURS = "Pillow + torchvision", "wds-train"

Pixels = NDArray[np.uint8]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        type=Path,
        help="a tar or a directory of images (default: scikit-learn's two photos)",
    )
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    result = bench_decode(read_images(args.images))
    print(json.dumps(result, indent=2) if args.json else _table(result))
    return 0


def read_images(path: Path | None) -> list[bytes]:
    """The images in a tar or below a directory; scikit-learn's two photos if `path` is None."""
    if path is None:
        photos = files("sklearn.datasets.images")
        return [photos.joinpath(name).read_bytes() for name in ("china.jpg", "flower.jpg")]
    try:
        images = _read_directory(path) if path.is_dir() else _read_tar(path)
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"--images {path} cannot be read: {error}") from error
    if not images:
        raise UsageError(
            f"--images {path} holds no file named {', '.join('.' + e for e in IMAGE_EXTENSIONS)}"
        )
    return images


def bench_decode(images: list[bytes]) -> dict[str, Any]:
    """CPU time and PSNR of both ways. The passes alternate; all figures are medians over them."""
    torch.set_num_threads(1)
    images = images * -(-PASS_SAMPLES // len(images))
    batch = np.empty((len(images), SIZE, SIZE, 3), np.uint8)
    sizes = [probe(data) for data in images]  # as the index of a dataset has them
    ways = {
        REFERENCE: lambda repeat: _reference_pass(images, batch, repeat),
        OURS: lambda repeat: _our_pass(images, sizes, batch, repeat),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-1, REPEATS):  # the pass numbered -1 warms up
        for name, one_pass in ways.items():
            started = time.process_time()
            one_pass(repeat)
            if repeat >= 0:
                seconds[name].append(time.process_time() - started)
    psnr = _psnr(images)
    return {
        "images": len(images),
        "repeats": REPEATS,
        "machine": machine(),
        "versions": {
            name: version(name) for name in ("pillow", "torchvision", "torch", "simplejpeg")
        },
        "img_per_s_per_core": {
            name: round(len(images) / statistics.median(s)) for name, s in seconds.items()
        },
        "ratio": round(
            statistics.median(
                r / o for r, o in zip(seconds[REFERENCE], seconds[OURS], strict=True)
            ),
            3,
        ),
        "psnr_db": {"mean": round(float(np.mean(psnr)), 2), "min": round(float(np.min(psnr)), 2)},
    }


def _reference_pass(images: list[bytes], batch: Pixels, repeat: int) -> None:
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
        decode_crop(
            data, random_resized_crop(rng, *size, SCALE, RATIO), out, flip=rng.random() < 0.5
        )


def _psnr(images: list[bytes]) -> list[float]:
    """PSNR in dB of every decode_crop against Pillow's anti-aliased resize of the same box of the same image."""
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    values = []
    for number, data in enumerate(images):
        box = random_resized_crop(generator("psnr", number), *probe(data), SCALE, RATIO)
        decode_crop(data, box, out)
        values.append(psnr(out, pillow_crop(data, box, SIZE)))
    return values


def pillow_crop(data: bytes, box: Box, size: int) -> Pixels:
    """The reference: `box` of the upright image, resized by Pillow, bilinear and anti-aliased, to uint8 [size, size, 3]."""
    left, top, width, height = box
    corners = (left, top, left + width, top + height)
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=corners))


def psnr(a: Pixels, b: Pixels) -> float:
    """The peak signal-to-noise ratio, 10 log10(255^2 / mean squared error), in dB; 100 for equal images."""
    error = np.mean(np.square(a.astype(np.float64) - b))
    return 100.0 if error == 0 else float(10 * np.log10(255**2 / error))


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


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(": ")[2]
        for line in cpuinfo.read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0]}, {len(names)} CPUs" if names else platform.processor()


def _table(result: dict[str, Any]) -> str:
    rates, psnr_db = result["img_per_s_per_core"], result["psnr_db"]
    return "\n".join(
        [
            f"{result['images']} images, {result['repeats']} repeats, medians; {result['machine']}",
            "  ".join(f"{name} {number}" for name, number in result["versions"].items()),
            f"{'':22}{'img/s per core':>15}{'ratio':>8}{'PSNR mean / min, dB':>22}",
            f"{REFERENCE:22}{rates[REFERENCE]:15d}{1:8.2f}",
            f"{OURS:22}{rates[OURS]:15d}{result['ratio']:8.2f}{psnr_db['mean']:15.1f} / {psnr_db['min']:.1f}",
        ]
    )
