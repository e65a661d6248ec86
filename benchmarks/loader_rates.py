"""`wds-train bench loader`: an epoch from S3 to batches of augmented images.

It compares our loader with others.
Every pass runs in a process of its own, on the same cores, with nothing cached on its side. The
contenders take turns, so that whatever else the machine does slows all of them. Figures are medians
over the repeats; a ratio is the median of the ratios within a repeat.
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
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.decode_rates import read_images
from benchmarks.host import list_versions, machine, versions_of
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
# Folders of the images; what their labels are does not matter.
CLASSES = 10
# The figures of a pass, and their decimals.
FIGURES = {
    "images": 0,  # that came
    # Ranges of ours that took a second request: more than none means that S3 does not answer the
    # addresses that we sign.
    "fallbacks": 0,
    "img_per_s": 0,  # from the request of the first batch to the last
    "open_s": 2,
    "first_batch_s": 2,  # from opening the loader on
    "cpu_ms_per_img": 2,  # user + system, of the process and its workers, from opening the loader
    "workers_pss_mb": 0,  # the most at any moment, of all workers together
    "workers_rss_mb": 0,
}
# Figures of ours alone, in all epochs but the first and the last of STEADY_EPOCHS.
STEADY = ("steady_img_per_s", "steady_cpu_ms_per_img", "server_cpu_ms_per_img")
STEADY_EPOCHS = 5
# Packages that loaders decode, augment and read with.
DECODERS = (
    "torch",
    "torchvision",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
    "numpy",
    "boto3",
)
COMPARED = ("img_per_s", "first_batch_s", "cpu_ms_per_img", "workers_pss_mb")
PEERS = tuple(name for name in CONTENDERS if name != OURS)
PEER_TRIES = 3  # mosaicml-streaming reads a shard before it is whole now and then

# The figures of one pass.
Figures = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `wds-train bench loader` to its parser."""
    add = parser.add_argument

    # The data.
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

    # The loaders.
    add("--workers", type=count, default=2, help="loader processes (%(default)s)")
    add(
        "--cores",
        type=positive,
        default=2,
        help="CPU cores of a loader and its workers (%(default)s)",
    )
    add("--batch", type=positive, default=64, help="images per batch (%(default)s)")
    add("--size", type=positive, default=224, help="side of the crops in pixels (%(default)s)")

    # The measurement.
    add("--repeats", type=positive, default=3, help="passes of every loader (%(default)s)")
    add(
        "--peers",
        action="store_true",
        help=f"also {', '.join(PEERS)}",
    )
    add("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Run `wds-train bench loader` with the parsed flags, and return the exit status.

    Raises:
        UsageError: There are too few cores, or the images cannot be had.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if args.cores > len(allowed):
        raise UsageError(f"--cores {args.cores}: this process may use {len(allowed)}; give fewer")
    if args.dataset and args.images:
        raise UsageError(
            f"--dataset {args.dataset} and --images {args.images} exclude each other; give one"
        )

    # Take the dataset that was given, or make one on a server of its own.
    home = embedded.home()
    home.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=home) as work,
        contextlib.ExitStack() as stack,
    ):
        dataset = args.dataset
        if not dataset:
            images = read_images(args.images)
            made = _own_dataset(images, args.samples, max(1, args.workers), Path(work))
            dataset = stack.enter_context(made)
        copies = f"{dataset}-bench-{secrets.token_hex(4)}"  # fresh, since it is removed in the end
        wanted = Pass(dataset, copies, work, args.workers, args.batch, args.size)
        result = bench_loader(wanted, allowed[: args.cores], args.repeats, peers=args.peers)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(_table(result))
    return 0


def bench_loader(wanted: Pass, cores: list[int], repeats: int, *, peers: bool) -> dict[str, Any]:
    """Measure passes over an existing dataset.

    Args:
        wanted: The dataset, where the peers' copies go, and the loader's settings.
        cores: Numbers of the cores that a loader and its workers may use.
        repeats: How many passes of every loader are measured.
        peers: Measure the other loaders, too.

    Returns:
        Machine and versions, `loaders` and `ours_to_peer` with medians, `bound`, and `skipped`: why
        a peer has no figures.

    Raises:
        WdsTrainError: A pass of ours failed.
    """
    environment = _environment(wanted.dataset)

    # Find the loaders that take part.
    skipped: dict[str, str] = {}
    passes: dict[str, list[Figures]] = {OURS: []}
    if peers:
        skipped = _missing_peers()
        for name in PEERS:
            if name not in skipped:
                passes[name] = []

    # Run all of them in turns; the first writes the copies that peers read.
    floors: list[Figures] = []
    steady: list[Figures] = []
    try:
        _copy_for_all(passes, skipped, wanted, cores, environment)
        for repeat in range(repeats):
            turn = f"pass {repeat + 1} of {repeats}"
            _say(f"bound: {turn}")
            floors += _floors(wanted, cores, environment)
            many = replace(wanted, epochs=STEADY_EPOCHS)
            steady.append(in_child("measure", OURS, many, cores, environment))
            for name, figures in passes.items():
                if name in skipped:
                    continue
                _say(f"{name}: {turn}")
                try:
                    figures.append(one_pass("measure", name, wanted, cores, environment))
                except WdsTrainError as error:
                    _skip(skipped, name, error)
    finally:
        _remove(wanted.copies)

    # A peer that failed in a later turn has no figures: its passes do not match ours.
    done = {name: figures for name, figures in passes.items() if name not in skipped}
    bound = _bound(floors, steady, len(cores))
    description = _description(wanted, cores, repeats)
    return description | _summary(done) | {"bound": bound, "skipped": skipped}


def _missing_peers() -> dict[str, str]:
    """Return why peers that are not installed are skipped."""
    skipped = {}
    for name in PEERS:
        modules = missing(name)
        if modules:
            listed = ", ".join(modules)
            skipped[name] = f"not installed: no module {listed}; `make bench-peers` installs it"
    return skipped


def _copy_for_all(
    names: Iterable[str],
    skipped: dict[str, str],
    wanted: Pass,
    cores: list[int],
    environment: dict[str, str],
) -> None:
    """Write the copies that peers read. Peers whose copy fails are added to `skipped`."""
    for name in names:
        _say(f"{name}: copy")
        try:
            one_pass("copy", name, wanted, cores, environment)
        except WdsTrainError as error:
            _skip(skipped, name, error)


def _skip(skipped: dict[str, str], name: str, error: WdsTrainError) -> None:
    """Note why a peer is skipped. Ours may not fail: without it nothing can be compared."""
    if name == OURS:
        raise error
    skipped[name] = str(error)


def _floors(wanted: Pass, cores: list[int], environment: dict[str, str]) -> list[Figures]:
    """Measure the floor on every core at the same time.

    Cores share caches: one alone would decode faster than any can in a real pass.
    """

    def measure(core: int) -> Figures:
        return in_child("floor", OURS, wanted, [core], environment)

    with ThreadPoolExecutor(len(cores)) as pool:
        return list(pool.map(measure, cores))


def one_pass(
    task: str, name: str, wanted: Pass, cores: list[int], environment: dict[str, str]
) -> Figures:
    """Return the figures of `in_child`, which is tried up to three times for a peer.

    Args:
        task: "copy" or "measure".
        name: The loader.
        wanted: The dataset and the loader's settings.
        cores: Numbers of the cores that the pass may use.
        environment: The environment of its process.

    Raises:
        WdsTrainError: The last try failed.
    """
    if name != OURS:
        for _ in range(PEER_TRIES - 1):
            try:
                return in_child(task, name, wanted, cores, environment)
            except WdsTrainError as error:
                _say(f"{name} failed ({error}); again")
    return in_child(task, name, wanted, cores, environment)


def _description(wanted: Pass, cores: list[int], repeats: int) -> dict[str, Any]:
    """Describe the machine, the versions, the dataset and the settings."""
    split = Dataset.open(wanted.dataset).split("train")
    return {
        "machine": machine(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": _versions(),
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


def _versions() -> dict[str, str]:
    """Return the versions of the loaders that are installed, and of what they decode with."""
    installed = []
    for name in CONTENDERS:
        if not missing(name):
            installed.append(name)
    return versions_of([*installed, *DECODERS])


def _summary(passes: dict[str, list[Figures]]) -> dict[str, Any]:
    """Return the medians of every loader, and ours relative to each peer's."""
    loaders = {}
    ratios = {}
    for name, figures in passes.items():
        loaders[name] = _medians(figures)
        if name != OURS:
            ratios[name] = _ratios(passes[OURS], figures)
    return {"loaders": loaders, "ours_to_peer": ratios}


def _medians(figures: list[Figures]) -> dict[str, Any]:
    """Return the median of every figure, and the smallest and the largest rate."""
    medians: dict[str, Any] = {}
    for key, digits in FIGURES.items():
        medians[key] = _round(statistics.median(_column(figures, key)), digits)
    rates = _column(figures, "img_per_s")
    medians["img_per_s_range"] = [round(min(rates)), round(max(rates))]
    return medians


def _ratios(ours: list[Figures], theirs: list[Figures]) -> Figures:
    """Return the medians of the ratios within a repeat, ours to the peer's."""
    ratios = {}
    for key in COMPARED:
        within = []
        for one, other in zip(ours, theirs, strict=True):
            within.append(one[key] / other[key])
        ratios[key] = round(statistics.median(within), 3)
    return ratios


def _column(figures: list[Figures], key: str) -> list[float]:
    """Return one figure of all passes."""
    return [one[key] for one in figures]


def _round(value: float, digits: int) -> float:
    # With None, unlike 0, round() returns an int.
    return round(value, digits or None)


def _bound(floors: list[Figures], steady: list[Figures], cores: int) -> Figures:
    """Compare what a pass cannot do without with what ours takes while it runs steadily.

    Args:
        floors: CPU time of decoding and checksums.
        steady: Figures of ours.
        cores: How many cores a pass may use.

    Returns:
        Medians of all, in ms of CPU an image; `img_per_s`, the rate that decoding, checksums and
        the server, if it is on the same cores, allow; `share_reached`, how much of it ours makes;
        `own_to_decode`, the rest of its CPU time relative to decoding.
    """
    medians = {}
    for name in ("decode_ms", "checksum_ms"):
        medians[name] = statistics.median(_column(floors, name))
    for name in STEADY:
        medians[name] = statistics.median(_column(steady, name))
    decode = medians["decode_ms"]
    needed = decode + medians["checksum_ms"] + medians["server_cpu_ms_per_img"]
    img_per_s = 1e3 * cores / needed

    bound = {name: round(value, 3) for name, value in medians.items()}
    bound["img_per_s"] = round(img_per_s)
    bound["share_reached"] = round(medians["steady_img_per_s"] / img_per_s, 3)
    bound["own_to_decode"] = round((medians["steady_cpu_ms_per_img"] - decode) / decode, 3)
    return bound


def _bound_line(bound: Figures, cores: int) -> str:
    return (
        f"bound: decoding {bound['decode_ms']:.2f} + checksum {bound['checksum_ms']:.2f} + server "
        f"{bound['server_cpu_ms_per_img']:.2f} ms of CPU an image, "
        f"on {cores} cores {bound['img_per_s']} img/s; {OURS}, once it "
        f"runs steadily: {bound['steady_img_per_s']:.0f} img/s, {bound['share_reached']:.0%} of it,"
        f" {bound['steady_cpu_ms_per_img']:.2f} ms, "
        f"its own cost {bound['own_to_decode']:.2f} of decoding"
    )


def _table(result: dict[str, Any]) -> str:
    """Return the result as Markdown, with the bound and the skipped peers below."""
    # The head: what was measured, with what.
    versions = list_versions(result["versions"])
    lines = [
        f"{result['samples']} images of {result['mean_kb']} KB in {result['shards']} shards, "
        f"crops of {result['size']}, batches of {result['batch']}, "
        f"{result['workers']} workers on {result['cores']} cores, "
        f"medians of {result['repeats']} passes",
        f"{result['machine']}; Python {result['python']}, {versions}",
        "",
        "| | img/s (range) | first batch s | CPU ms/img | workers MB (PSS) "
        "| ours : it, img/s | CPU |",
        "|-|-|-|-|-|-|-|",
    ]

    # A row for each loader.
    for name, one in result["loaders"].items():
        low, high = one["img_per_s_range"]
        ratios = "| |"
        if name in result["ours_to_peer"]:
            ratio = result["ours_to_peer"][name]
            ratios = f"{ratio['img_per_s']:.2f} | {ratio['cpu_ms_per_img']:.2f} |"
        lines.append(
            f"| {name} | {one['img_per_s']} ({low}-{high}) | {one['first_batch_s']} "
            f"| {one['cpu_ms_per_img']} | {one['workers_pss_mb']} | {ratios}"
        )

    # Below the table: the bound, and what to know of the figures.
    lines += ["", _bound_line(result["bound"], result["cores"])]
    fallbacks = result["loaders"][OURS]["fallbacks"]
    if fallbacks:
        lines.append(
            f"{fallbacks} ranges of {OURS} a pass took a second request: "
            "S3 did not answer their signed address"
        )
    for name, reason in result["skipped"].items():
        lines.append(f"skipped {name}: {reason}")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _own_dataset(images: list[bytes], samples: int, workers: int, folder: Path) -> Iterator[str]:
    """Yield the URL of a dataset of so many samples on an S3 server that lives in `folder`."""
    # The embedded server of the person's own home is left alone.
    before = os.environ.get("WDS_HOME")
    # Where the embedded server's data go, for the children too.
    os.environ["WDS_HOME"] = str(folder)
    try:
        embedded.ensure_running()
        url = f"s3://{EMBEDDED_BUCKET}/bench"
        _make_dataset(images, samples, workers, folder / "images", url)
        yield url
    finally:
        embedded.stop()
        os.environ.pop("WDS_HOME")
        if before is not None:
            os.environ["WDS_HOME"] = before


def _make_dataset(images: list[bytes], samples: int, workers: int, folder: Path, url: str) -> None:
    """Convert images as `wds-train shards` does, under new keys until there are `samples`.

    Every worker gets the same number of shards: webdataset's workers share whole shards, and one
    with fewer would idle.

    Raises:
        WdsTrainError: They cannot be converted.
    """
    sizes = _write_images(images, samples, folder)
    shards = workers * -(-sum(sizes) // (workers * SHARD_BYTES))
    # A shard ends before the sample that would exceed it.
    largest = sum(sizes) / shards + max(sizes)
    command = [sys.executable, "-m", "wds_train.cli", "shards", str(folder), url]
    command += ["--source", "imagefolder", "--hold-out", "0"]
    command += ["--shard-mb", str(largest / (1 << 20))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WdsTrainError(f"the images cannot be sharded: {cause(done.stderr)}")


def _write_images(images: list[bytes], samples: int, folder: Path) -> list[int]:
    """Write `samples` files into class folders, and return what each takes in a tar, bytes."""
    folder.mkdir()
    paths: list[Path] = []
    sizes: list[int] = []
    for number in range(samples):
        image = images[number % len(images)]
        path = folder / f"class{number % CLASSES}" / f"{number:06d}.{_format(image)}"
        path.parent.mkdir(exist_ok=True)
        if number < len(images):
            path.write_bytes(image)
        else:
            path.hardlink_to(paths[number % len(images)])
        paths.append(path)
        sizes.append(len(image) + TAR_OVERHEAD)
    return sizes


def _format(image: bytes) -> str:
    return (Image.open(io.BytesIO(image)).format or "").lower()


def _environment(dataset: str) -> dict[str, str]:
    """Return the environment of a pass.

    Peers do not know the embedded server: if the dataset is there, variables lead them to it.
    """
    store = open_store(dataset)
    if not (isinstance(store, S3Store) and store.bucket == EMBEDDED_BUCKET):
        return dict(os.environ)
    endpoint = embedded.ensure_running()

    # A profile or a token of AWS would be sent to the embedded server, which refuses it.
    environment = {}
    for name, value in os.environ.items():
        if not name.startswith("AWS_"):
            environment[name] = value
    return environment | {
        "AWS_ENDPOINT_URL": endpoint.url,
        "S3_ENDPOINT_URL": endpoint.url,  # mosaicml-streaming
        "AWS_ACCESS_KEY_ID": endpoint.access_key,
        "AWS_SECRET_ACCESS_KEY": endpoint.secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _remove(url: str) -> None:
    """Delete all objects below `url`."""
    store = open_store(url)
    for entry in store.list():
        store.delete(entry.key)
