"""`wds-train bench loader`: an epoch from S3 to batches of augmented images, ours beside its peers.

Every pass runs in a process of its own, on the same cores, with nothing cached on its side, and the contenders take
turns, so that whatever else the machine does slows all of them. Figures are medians over the repeats; a ratio is the
median of the ratios within a repeat.
"""

import argparse
import contextlib
import io
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.decode_rates import machine, read_images
from benchmarks.passes import cause, in_child
from benchmarks.peers import CONTENDERS, OURS, SHARD_BYTES, Pass, missing
from wds_train.config.numbers import count, positive
from wds_train.dataset.reader import Dataset
from wds_train.errors import UsageError, WdsTrainError
from wds_train.storage import embedded
from wds_train.storage.address import EMBEDDED_BUCKET
from wds_train.storage.open import open_store
from wds_train.storage.s3 import S3Store

TAR_OVERHEAD = 2048  # bytes per sample, at most: headers, label, padding
CLASSES = 10
# What is measured, and its decimals.
FIGURES = {
    "images": 0,  # that came
    "fallbacks": 0,  # ranges of ours that took a second request: none, or S3 does not answer the addresses that we sign
    "img_per_s": 0,  # from the request of the first batch to the last
    "open_s": 2,
    "first_batch_s": 2,  # from opening the loader on
    "cpu_ms_per_img": 2,  # user + system, of the process and its workers, from opening the loader on
    "workers_pss_mb": 0,  # the most at any moment, of all workers together
    "workers_rss_mb": 0,
}
STEADY = (
    "steady_img_per_s",
    "steady_cpu_ms_per_img",
    "server_cpu_ms_per_img",
)  # of ours, in all epochs but the first and the last of STEADY_EPOCHS
STEADY_EPOCHS = 5
COMPARED = ("img_per_s", "first_batch_s", "cpu_ms_per_img", "workers_pss_mb")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--dataset",
        metavar="D",
        help="an existing dataset (default: one made of --images, in a server of its own)",
    )
    add(
        "--images",
        type=Path,
        help="a tar or a directory of images (default: scikit-learn's two photos)",
    )
    add(
        "--samples",
        type=positive,
        default=3000,
        help="the images repeat under new keys up to so many (%(default)s)",
    )
    add("--workers", type=count, default=2, help="loader processes (%(default)s)")
    add(
        "--cores",
        type=positive,
        default=2,
        help="CPU cores of a loader and its workers (%(default)s)",
    )
    add("--batch", type=positive, default=64, help="images per batch (%(default)s)")
    add("--size", type=positive, default=224, help="side of the crops in pixels (%(default)s)")
    add("--repeats", type=positive, default=3, help="passes of every loader (%(default)s)")
    add(
        "--peers",
        action="store_true",
        help=f"also {', '.join(name for name in CONTENDERS if name != OURS)}",
    )
    add("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    allowed = sorted(os.sched_getaffinity(0))
    if args.cores > len(allowed):
        raise UsageError(f"--cores {args.cores}: this process may use {len(allowed)}; give fewer")
    if args.dataset and args.images:
        raise UsageError(
            f"--dataset {args.dataset} and --images {args.images} exclude each other; give one"
        )
    home = embedded.home()
    home.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=home) as work,
        contextlib.ExitStack() as stack,
    ):
        dataset = args.dataset or stack.enter_context(
            _own_dataset(read_images(args.images), args.samples, max(1, args.workers), Path(work))
        )
        copies = f"{dataset}-bench-{secrets.token_hex(4)}"  # fresh, since it is removed in the end
        wanted = Pass(dataset, copies, work, args.workers, args.batch, args.size)
        result = bench_loader(wanted, allowed[: args.cores], args.repeats, peers=args.peers)
    print(json.dumps(result, indent=2) if args.json else _table(result))
    return 0


def bench_loader(wanted: Pass, cores: list[int], repeats: int, *, peers: bool) -> dict[str, Any]:
    """Passes over an existing dataset, summed up. A peer that is not installed, or fails, is named under `skipped`."""
    environment = _environment(wanted.dataset)
    skipped = {
        name: f"not installed: no module {', '.join(lacking)}; `make bench-peers` installs it"
        for name in CONTENDERS
        if (lacking := missing(name)) and peers
    }
    floors, steady = list[dict[str, float]](), list[dict[str, float]]()
    passes: dict[str, list[dict[str, float]]] = {
        name: [] for name in CONTENDERS if name == OURS or (peers and name not in skipped)
    }
    try:
        for repeat in range(-1, repeats):  # the turn numbered -1 writes the copies
            if repeat >= 0:
                _say(f"bound: pass {repeat + 1} of {repeats}")
                floors += _floors(wanted, cores, environment)
                steady.append(
                    in_child(
                        "measure", OURS, replace(wanted, epochs=STEADY_EPOCHS), cores, environment
                    )
                )
            for name in [name for name in passes if name not in skipped]:
                _say(f"{name}: " + ("copy" if repeat < 0 else f"pass {repeat + 1} of {repeats}"))
                try:
                    figures = one_pass(
                        "copy" if repeat < 0 else "measure", name, wanted, cores, environment
                    )
                except WdsTrainError as error:
                    if name == OURS:
                        raise
                    skipped[name] = str(error)
                else:
                    passes[name] += [figures] if repeat >= 0 else []
    finally:
        _remove(wanted.copies)
    done = {name: figures for name, figures in passes.items() if name not in skipped}
    bound = _bound(floors, steady, len(cores))
    return (
        _description(wanted, cores, repeats) | _summary(done) | {"bound": bound, "skipped": skipped}
    )


def _floors(wanted: Pass, cores: list[int], environment: dict[str, str]) -> list[dict[str, float]]:
    """One of every core, at the same time: cores share caches, and one alone decodes faster."""
    with ThreadPoolExecutor(len(cores)) as pool:
        return list(
            pool.map(lambda core: in_child("floor", OURS, wanted, [core], environment), cores)
        )


def one_pass(
    task: str, name: str, wanted: Pass, cores: list[int], environment: dict[str, str]
) -> dict[str, float]:
    """The figures of `in_child`, which is tried up to three times for a peer: mosaicml-streaming reads a shard before
    it is whole now and then.
    """
    for _ in range(0 if name == OURS else 2):
        try:
            return in_child(task, name, wanted, cores, environment)
        except WdsTrainError as error:
            _say(f"{name} failed ({error}); again")
    return in_child(task, name, wanted, cores, environment)


def _description(wanted: Pass, cores: list[int], repeats: int) -> dict[str, Any]:
    split = Dataset.open(wanted.dataset).split("train")
    names = [
        *CONTENDERS,
        "torch",
        "torchvision",
        "pillow",
        "simplejpeg",
        "opencv-python-headless",
        "numpy",
        "boto3",
    ]
    return {
        "machine": machine(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": {
            name: version(name) for name in names if not (name in CONTENDERS and missing(name))
        },
        "dataset": wanted.dataset,
        "samples": len(split),
        "shards": len(split.shard_names),
        "mean_kb": round(float(split.index.data_length[:].mean()) / 1e3, 1),
        "workers": wanted.workers,
        "cores": len(cores),
        "batch": wanted.batch,
        "size": wanted.side,
        "repeats": repeats,
    }


def _summary(passes: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    def median(values: Iterable[float], digits: int) -> float:
        return round(statistics.median(values), digits or None)

    loaders = {
        name: {
            key: median((one[key] for one in figures), digits) for key, digits in FIGURES.items()
        }
        | {
            "img_per_s_range": [
                round(pick(one["img_per_s"] for one in figures)) for pick in (min, max)
            ]
        }
        for name, figures in passes.items()
    }
    ratios = {
        name: {
            key: median((o[key] / t[key] for o, t in zip(passes[OURS], figures, strict=True)), 3)
            for key in COMPARED
        }
        for name, figures in passes.items()
        if name != OURS
    }
    return {"loaders": loaders, "ours_to_peer": ratios}


def _bound(
    floors: list[dict[str, float]], steady: list[dict[str, float]], cores: int
) -> dict[str, float]:
    """What decoding, checksums and the server, if it is on the same cores, take of a CPU, in ms an image; the rate that this
    allows, and what ours makes of it while it runs steadily; medians.
    """
    columns = {
        name: statistics.median(one[name] for one in floors)
        for name in ("decode_ms", "checksum_ms")
    }
    columns |= {name: statistics.median(one[name] for one in steady) for name in STEADY}
    decode, checksum, img_per_s, cpu, server = columns.values()
    bound = 1e3 * cores / (decode + checksum + server)
    return {name: round(value, 3) for name, value in columns.items()} | {
        "img_per_s": round(bound),
        "share_reached": round(img_per_s / bound, 3),
        "own_to_decode": round((cpu - decode) / decode, 3),
    }


def _bound_line(bound: dict[str, float], cores: int) -> str:
    return (
        f"bound: decoding {bound['decode_ms']:.2f} + checksum {bound['checksum_ms']:.2f} + server "
        f"{bound['server_cpu_ms_per_img']:.2f} ms of CPU an image, on {cores} cores {bound['img_per_s']} img/s; {OURS}, once it "
        f"runs steadily: {bound['steady_img_per_s']:.0f} img/s, {bound['share_reached']:.0%} of it, "
        f"{bound['steady_cpu_ms_per_img']:.2f} ms, its own cost {bound['own_to_decode']:.2f} of decoding"
    )


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['samples']} images of {result['mean_kb']} KB in {result['shards']} shards, crops of {result['size']}, "
        f"batches of {result['batch']}, {result['workers']} workers on {result['cores']} cores, "
        f"medians of {result['repeats']} passes",
        f"{result['machine']}; Python {result['python']}, "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
        "",
        "| | img/s (range) | first batch s | CPU ms/img | workers MB (PSS) | ours : it, img/s | CPU |",
        "|-|-|-|-|-|-|-|",
    ]
    for name, one in result["loaders"].items():
        low, high = one["img_per_s_range"]
        ratio = result["ours_to_peer"].get(name)
        lines.append(
            f"| {name} | {one['img_per_s']} ({low}-{high}) | {one['first_batch_s']} | {one['cpu_ms_per_img']} "
            f"| {one['workers_pss_mb']} | "
            + (f"{ratio['img_per_s']:.2f} | {ratio['cpu_ms_per_img']:.2f} |" if ratio else "| |")
        )
    lines += ["", _bound_line(result["bound"], result["cores"])]
    if fallen := result["loaders"][OURS]["fallbacks"]:
        lines.append(
            f"{fallen} ranges of {OURS} a pass took a second request: S3 did not answer their signed address"
        )
    return "\n".join(lines + [f"skipped {name}: {why}" for name, why in result["skipped"].items()])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _own_dataset(images: list[bytes], samples: int, workers: int, folder: Path) -> Iterator[str]:
    """The URL of a dataset of `samples` samples on an S3 server of its own, both of which live in `folder`."""
    before = os.environ.get("WDS_HOME")
    os.environ["WDS_HOME"] = str(
        folder
    )  # where the embedded server's data go, for the children too
    try:
        embedded.ensure_running()
        _make_dataset(images, samples, workers, folder / "images", f"s3://{EMBEDDED_BUCKET}/bench")
        yield f"s3://{EMBEDDED_BUCKET}/bench"
    finally:
        embedded.stop()
        os.environ.pop("WDS_HOME")
        os.environ |= {"WDS_HOME": before} if before is not None else {}


def _make_dataset(images: list[bytes], samples: int, workers: int, folder: Path, url: str) -> None:
    """Shard `images` as `wds-train shards` does, under new keys until there are `samples`. Every worker gets the same
    number of shards: webdataset's workers share whole shards, and one with fewer would idle.
    """
    folder.mkdir()
    paths: list[Path] = []
    for number in range(samples):
        path = (
            folder
            / f"class{number % CLASSES}"
            / f"{number:06d}.{_format(images[number % len(images)])}"
        )
        path.parent.mkdir(exist_ok=True)
        paths.append(path)
        if number < len(images):
            path.write_bytes(images[number])
        else:
            path.hardlink_to(paths[number % len(images)])
    sizes = [len(images[number % len(images)]) + TAR_OVERHEAD for number in range(samples)]
    shards = workers * -(-sum(sizes) // (workers * SHARD_BYTES))
    largest = sum(sizes) / shards + max(
        sizes
    )  # a shard ends before the sample that would exceed it
    command = [
        sys.executable,
        "-m",
        "wds_train.cli",
        "shards",
        str(folder),
        url,
        "--source",
        "imagefolder",
    ]
    command += ["--hold-out", "0", "--shard-mb", str(largest / (1 << 20))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WdsTrainError(f"the images cannot be sharded: {cause(done.stderr)}")


def _format(image: bytes) -> str:
    return (Image.open(io.BytesIO(image)).format or "").lower()


def _environment(dataset: str) -> dict[str, str]:
    """This process's environment; for the embedded server, which the peers do not know, the settings that lead to it."""
    store = open_store(dataset)
    if not (isinstance(store, S3Store) and store.bucket == EMBEDDED_BUCKET):
        return dict(os.environ)
    endpoint = embedded.ensure_running()
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
        "AWS_ENDPOINT_URL": endpoint.url,
        "S3_ENDPOINT_URL": endpoint.url,  # mosaicml-streaming
        "AWS_ACCESS_KEY_ID": endpoint.access_key,
        "AWS_SECRET_ACCESS_KEY": endpoint.secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _remove(url: str) -> None:
    store = open_store(url)
    for entry in store.list():
        store.delete(entry.key)
