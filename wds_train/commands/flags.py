"""Arguments that several commands share, and their types.

A type's `ArgumentTypeError` says what is wrong with a value; argparse prints it.
"""

import argparse
import os
from pathlib import Path

from wds_train.checkpoint.run_manifest import name_of
from wds_train.config.numbers import Number, count, positive  # noqa: F401 (for the commands, too)
from wds_train.loader.workers import default_workers
from wds_train.storage.address import announce_embedded, announce_name, resolve_address

FILE = ".safetensors"  # the suffix of an exported file, here so that PyTorch need not be imported
dollars = Number(float, 0)


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Add DATASET and --bucket, for `resolve_dataset`."""
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="s3://bucket/prefix, a directory (/... or ./...), or a name",
    )
    add_bucket(parser, "datasets/ lives")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add RUN and --bucket, for `resolve_run`."""
    parser.add_argument("run", metavar="RUN", help="a name, or s3://bucket/prefix, or a directory")
    add_bucket(parser, "runs/ lives")


def add_bucket(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --bucket.

    Args:
        parser: The command's.
        what: What is there, with its verb: "runs/ lives".
    """
    parser.add_argument(
        "--bucket",
        metavar="s3://B/P",
        help=f"where {what} ($WDS_BUCKET; else the embedded S3 server)",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers. The default leaves one core to this process."""
    parser.add_argument(
        "--workers",
        type=count,
        default=default_workers(),
        metavar="W",
        help="loader processes (%(default)s)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device.

    The command calls `refuse_unusable_gpu` for "auto": work for a GPU must not run on the CPU.
    """
    parser.add_argument(
        "--device",
        choices=("auto", "cpu"),
        default="auto",
        help="auto: the GPUs, if there are any (default)",
    )


def add_region(parser: argparse.ArgumentParser) -> None:
    """Add --region."""
    parser.add_argument(
        "--region", metavar="NAME", help="AWS region (default: AWS_REGION, or the profile's)"
    )


def expand_home(text: str) -> Path:
    """Return the path that `text` names. No shell replaces the `~` in --flag=~/x."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (Path's raises for an unknown user)


def ask(question: str) -> str:
    """Return the answer of the person at the terminal; "" if there is nobody to ask."""
    try:
        return input(question).strip()
    except EOFError:
        return ""


def resolve_dataset(dataset: str, bucket: str | None) -> str:
    """Return the address of a dataset.

    Args:
        dataset: Its address, or its name below `bucket`/datasets.
        bucket: The value of --bucket.
    """
    address = resolve_address(dataset, "datasets", bucket)
    announce_embedded(address, dataset)
    announce_name(address, dataset)
    return address


def resolve_run(run: str, bucket: str | None) -> str:
    """Return the address of a run.

    Args:
        run: Its address, or its name below `bucket`/runs.
        bucket: The value of --bucket.
    """
    name_of(run)  # refuses what cannot be the name of a run
    address = resolve_address(run, "runs", bucket)
    announce_embedded(address, run)
    return address


def resolve_model(text: str, bucket: str | None) -> str:
    """Return the path of an exported file as it is, and else the address of a run."""
    return text if text.endswith(FILE) else resolve_run(text, bucket)


def parse_share(text: str) -> tuple[str, float]:
    """Return the dataset and the share that DATASET=SHARE names."""
    url, _, share = text.rpartition("=")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not url or not 0 < value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not DATASET=SHARE with a share between 0 and 1"
        )
    return url, value
