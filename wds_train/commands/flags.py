"""The arguments that several commands have, and their types. A type says what is wrong with a value; argparse prints it."""

import argparse
import os
from pathlib import Path

from wds_train.checkpoint.run_manifest import name_of
from wds_train.config.numbers import Number, count, positive  # noqa: F401 (for the commands, too)
from wds_train.loader.workers import default_workers
from wds_train.storage.address import announced, located, not_here

FILE = ".safetensors"  # how an exported file's name ends, said without the import of PyTorch
dollars = Number(float, 0)


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Add DATASET, which `dataset_url` makes an address."""
    parser.add_argument("dataset", metavar="DATASET", help="s3://bucket/prefix, a directory (/... or ./...), or a name")
    add_bucket(parser, "datasets/ lives")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add RUN, which `run_url` makes an address."""
    parser.add_argument("run", metavar="RUN", help="a name, or s3://bucket/prefix, or a directory")
    add_bucket(parser, "runs/ lives")


def add_bucket(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--bucket", metavar="s3://B/P", help=f"where {what} ($WDS_BUCKET; else the embedded S3 server)")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers: by default a process per core that this one may use, less one for the work itself."""
    parser.add_argument(
        "--workers", type=count, default=default_workers(), metavar="W", help="loader processes (%(default)s)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """auto is refused by `refuse_unusable_gpu`, where it would mean a GPU's work on the CPU."""
    parser.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: the GPUs, if there are any (default)"
    )


def add_region(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--region", metavar="NAME", help="of AWS (default: AWS_REGION, or the profile's)")


def local_path(text: str) -> Path:
    """The path that `text` names; `~` is the home folder, which no shell replaces in --flag=~/x."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (Path's raises for a user who is not there)


def answered(question: str) -> str:
    """The answer to `question`; "" where there is nobody to ask."""
    try:
        return input(question).strip()
    except EOFError:
        return ""


def dataset_url(dataset: str, bucket: str | None) -> str:
    """The address of `dataset`, which is one already, or the name of one under `bucket`/datasets."""
    return not_here(announced(located(dataset, "datasets", bucket), dataset), dataset)


def run_url(run: str, bucket: str | None) -> str:
    """The address of `run`, which is one already, or the name of one under `bucket`/runs."""
    name_of(run)
    return announced(located(run, "runs", bucket), run)


def run_or_file(text: str, bucket: str | None) -> str:
    """The path of an exported file as it is; else the address of a run."""
    return text if text.endswith(FILE) else run_url(text, bucket)


def share_of(text: str) -> tuple[str, float]:
    url, _, share = text.rpartition("=")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not url or not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not DATASET=SHARE with a share between 0 and 1")
    return url, value
