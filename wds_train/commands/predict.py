"""`wds-train predict`: what a model sees in images."""

import argparse
import sys

from wds_train.commands.flags import add_bucket, add_device, run_or_file
from wds_train.console import Meter, loading, note


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_FILE", help="a run as elsewhere, or a file of `wds-train export`")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="a file, a folder, s3://bucket/key or prefix, or http(s)://..."
    )
    add_bucket(parser, "runs/ lives")
    add_device(parser)
    parser.add_argument(
        "--tta",
        choices=["none", "flip", "crops"],
        help="average the logits of the image and its mirror image, or of five crops and theirs",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a JSON object a line")
    form.add_argument("--csv", action="store_true", help="a row an image")


def run(args: argparse.Namespace) -> int:
    loading()
    from wds_train.evaluation.per_class import describe_weights
    from wds_train.serving.calibrated import prepared
    from wds_train.serving.classify import Classifier
    from wds_train.serving.photos import photos
    from wds_train.serving.prediction import Prediction, class_names, csv_header
    from wds_train.training.ranks import Ranks, refuse_unusable_gpu

    if args.device == "auto":
        refuse_unusable_gpu()
    device = Ranks(cpu=args.device == "cpu").device
    images = list(photos(args.images))
    weights = prepared(run_or_file(args.model, args.bucket), device)
    names, bad = class_names(weights.classes), 0
    if not (args.json or args.csv):
        note(f"by the {describe_weights(weights)}")
    if args.csv:
        print(csv_header(len(weights.classes)))
    with Meter(0, len(images)) as meter:
        for photo, answer in Classifier(weights, args.tta, device).logits(images):
            found = Prediction.of(photo.name, answer, weights)
            meter.print(found.to_json() if args.json else found.to_csv() if args.csv else found.to_lines(names))
            meter.add(images=1)
            bad += bool(found.error)
    if bad:
        print(f"wds-train: {bad:,} of {len(images):,} images could not be used", file=sys.stderr)
    return int(bad > 0)
