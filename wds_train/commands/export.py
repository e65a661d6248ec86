"""`wds-train export`: a run's weights in a format of others."""

import argparse
from pathlib import Path

from wds_train.checkpoint.find import SCORES, choose, find_run
from wds_train.checkpoint.manifest import name_of
from wds_train.commands.arguments import add_run, count, run_url
from wds_train.errors import UsageError
from wds_train.tracking.console import loading

FORMATS = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2", "timm-hub": ""}  # and their suffix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--best", choices=SCORES, default="ema", help="which weights, by default of their best epoch")
    parser.add_argument("--step", type=count, metavar="N", help="of the checkpoint of this step instead")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="safetensors",
        help="safetensors: for timm and for us (default); onnx and torch-export: with the normalisation inside; timm-hub: a "
        "folder for timm",
    )
    parser.add_argument(
        "--to", type=Path, metavar="PATH", help="a file, or the folder of timm-hub (default: RUN's name)"
    )


def run(args: argparse.Namespace) -> int:
    suffix, url = FORMATS[args.format], run_url(args.run, args.bucket)
    to = args.to or Path(name_of(url) + suffix)
    if suffix and to.suffix != suffix:
        raise UsageError(f"--to {to} must end in {suffix}")
    if not to.parent.is_dir():
        raise UsageError(f"--to {to}: there is no folder {to.parent}; make it first")
    manifest, store = find_run(url)
    checkpoint = choose(manifest, args.best, args.step)
    loading()  # after all that can be refused without it
    import torch

    from wds_train.checkpoint.read import weights_of
    from wds_train.serving.calibrate import calibrated
    from wds_train.serving.classify import Classifier
    from wds_train.serving.export import WRITERS

    weights = weights_of(store, manifest, checkpoint, args.best)
    weights = calibrated(weights, Classifier(weights, None, torch.device("cpu")), manifest)
    call = WRITERS[args.format](weights, to)
    scores = ", ".join(f"{name} {value:.2f}" for name, value in weights.metrics.items()) or "not validated"
    print(f"{to}: {weights.kind} weights of step {weights.step} ({scores})")
    if weights.calibration.fitted:
        print(f"calibrated: {weights.calibration}")
    print(f"load it with {call}")
    return 0
