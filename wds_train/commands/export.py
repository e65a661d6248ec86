"""`wds-train export`: write a run's weights in a format that other programs read."""

import argparse
from pathlib import Path

from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.run_manifest import RunManifest, name_of
from wds_train.checkpoint.weight_choice import BEST, KINDS, Choice, choose
from wds_train.commands.flags import add_run, count, resolve_run
from wds_train.console import loading
from wds_train.errors import UsageError

# Formats and their suffixes. A model of timm-hub is a folder.
FORMATS = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2", "timm-hub": ""}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--best",
        choices=KINDS,
        default=BEST,
        help="the raw or the EMA weights, of their best epoch (default: those of the higher "
        "top-1, as eval)",
    )
    parser.add_argument(
        "--step", type=count, metavar="N", help="of the checkpoint of this step instead"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="safetensors",
        help="safetensors: for timm and for us (default); onnx and torch-export: with the "
        "normalisation "
        "inside; timm-hub: a folder for timm",
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="PATH",
        help="a file, or the folder of timm-hub (default: RUN's name)",
    )


def run(args: argparse.Namespace) -> int:
    suffix = FORMATS[args.format]
    url = resolve_run(args.run, args.bucket)
    to = args.to or Path(name_of(url) + suffix)
    if suffix and to.suffix != suffix:
        raise UsageError(f"--to {to} must end in {suffix}")
    if not to.parent.is_dir():
        raise UsageError(f"--to {to}: there is no folder {to.parent}; make it first")
    manifest, store = find_run(url)
    choose(manifest, args.best, args.step)
    # These imports take seconds: they come after all that can be refused without them.
    loading()
    import torch

    from wds_train.checkpoint.restore import from_newest
    from wds_train.models.weights import Weights
    from wds_train.serving.calibrated_weights import calibrate_choice
    from wds_train.serving.exporters import WRITERS

    def read_weights(newest: RunManifest) -> tuple[Choice, Weights]:
        choice = choose(newest, args.best, args.step)
        return choice, calibrate_choice(store, newest, choice, torch.device("cpu"))

    choice, weights = from_newest(store, manifest, read_weights)
    call = WRITERS[args.format](weights, to)
    print(f"{to}: {choice}")
    calibration = weights.calibration
    print(f"calibrated: {calibration}" if calibration.used else calibration)
    print(f"load it with {call}")
    return 0
