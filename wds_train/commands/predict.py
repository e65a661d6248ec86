"""`wds-train predict`: classify images with a run or an exported model."""

import argparse
import sys

from wds_train.commands.flags import add_bucket, add_device, resolve_model
from wds_train.console import Meter, loading, note


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="RUN_OR_FILE", help="a run as elsewhere, or a file of `wds-train export`"
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a file, a folder, s3://bucket/key or prefix, or http(s)://...",
    )
    add_bucket(parser, "runs/ lives")
    add_device(parser)
    parser.add_argument(
        "--tta",
        choices=["none", "flip", "crops"],
        help="average the logits of the image and its mirror image, or of five crops and their "
        "mirror images",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object for each image, on a line of its own",
    )
    form.add_argument("--csv", action="store_true", help="print a row for each image")


def run(args: argparse.Namespace) -> int:
    loading()
    from wds_train.evaluation.per_class import describe_weights
    from wds_train.serving.calibrated_weights import load_calibrated
    from wds_train.serving.classify import Classifier
    from wds_train.serving.photos import find_photos
    from wds_train.serving.prediction import Prediction, class_names, csv_header
    from wds_train.training.ranks import Ranks, refuse_unusable_gpu

    if args.device == "auto":
        refuse_unusable_gpu()
    device = Ranks(cpu=args.device == "cpu").device
    images = list(find_photos(args.images))
    weights = load_calibrated(resolve_model(args.model, args.bucket), device)
    names = class_names(weights.classes)
    if not (args.json or args.csv):
        note(f"by the {describe_weights(weights)}")
    if args.csv:
        print(csv_header(len(weights.classes)))
    unreadable = 0
    with Meter(0, len(images)) as meter:
        for photo, answer in Classifier(weights, args.tta, device).logits(images):
            found = Prediction.of(photo.name, answer, weights)
            if args.json:
                text = found.to_json()
            elif args.csv:
                text = found.to_csv()
            else:
                text = found.to_lines(names)
            meter.print(text)
            meter.add(images=1)
            if found.error:
                unreadable += 1
    if unreadable:
        print(
            f"wds-train: {unreadable:,} of {len(images):,} images could not be used",
            file=sys.stderr,
        )
        return 1
    return 0
