"""`wds-train eval`: measure the accuracy of a model, or of several together, on a split.

It also tells the accuracy of each class, and which classes are confused.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.resume_checks import own_dataset
from wds_train.checkpoint.weight_choice import BEST, KINDS
from wds_train.commands.flags import (
    FILE,
    add_bucket,
    add_device,
    add_workers,
    count,
    positive,
    resolve_dataset,
    resolve_model,
)
from wds_train.config.numbers import Number
from wds_train.console import Meter, loading
from wds_train.dataset.reader import Dataset
from wds_train.errors import UsageError, unwritable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN_OR_FILE", help="a run as elsewhere, or a file of `wds-train export`"
    )
    add_bucket(parser, "datasets/ and runs/ live")
    add_workers(parser)
    add_device(parser)
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="B",
        help="samples at a time (default: as in the training)",
    )
    parser.add_argument(
        "--dataset",
        metavar="DATASET",
        help="another dataset than the one that the run was trained on",
    )
    parser.add_argument(
        "--split",
        default="val",
        metavar="NAME",
        help="val (default), or test, which no training or validation reads",
    )
    parser.add_argument(
        "--weights",
        choices=KINDS,
        default=BEST,
        help="of a run: the raw or the EMA weights, of their best epoch (default: those of the "
        "higher top-1)",
    )
    parser.add_argument(
        "--step",
        type=count,
        metavar="N",
        help="of a run: the weights of the checkpoint of this step",
    )
    parser.add_argument(
        "--size",
        type=Number(int, 8),
        metavar="PX",
        help="side of the images (default: the recipe's data.eval_size)",
    )
    parser.add_argument(
        "--crop",
        type=Number(float, 0, 1, open="("),
        metavar="SHARE",
        help="share of the shorter side (default: data.eval_crop)",
    )
    parser.add_argument(
        "--tta",
        choices=["none", "flip", "crops"],
        help="average the logits of the image and its mirror image, or of five crops and their "
        "mirror images (default: flip if the recipe has data.eval_flip)",
    )
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    """Add --ensemble, and the forms of the result."""
    parser.add_argument(
        "--ensemble",
        nargs="+",
        default=[],
        metavar="RUN_OR_FILE",
        help="average the probabilities with those of other models",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, with all classes")
    parser.add_argument("--per-class", type=Path, metavar="FILE.csv", help="write a row per class")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write eval.json and classes.csv there"
    )


def run(args: argparse.Namespace) -> int:
    bucket = args.bucket
    models = [resolve_model(each, bucket) for each in (args.run, *args.ensemble)]
    if args.dataset is None:
        dataset = _open_own_dataset(models)
    else:
        dataset = Dataset.open(resolve_dataset(args.dataset, bucket))
    # These imports take seconds: they come after all that can be refused without them.
    loading()
    from wds_train.evaluation.evaluate import View, choose_weights, refuse_other_classes, score
    from wds_train.evaluation.per_class import (
        describe_member,
        report_lines,
        report_of,
        write_classes,
    )
    from wds_train.models.scoring import EVAL_BATCH
    from wds_train.training.ranks import Ranks, refuse_unusable_gpu

    if args.device == "auto":
        refuse_unusable_gpu()
    device = Ranks(cpu=args.device == "cpu").device
    chosen = [choose_weights(each, args.weights, args.step) for each in models]
    for weights in chosen:
        refuse_other_classes(weights, dataset)
    views = [View.of(weights.recipe, args.tta, args.size, args.crop) for weights in chosen]
    split = dataset.split(args.split)
    batch = args.batch or min(chosen[0].recipe.batch, EVAL_BATCH)
    with Meter(0, len(split)) as meter:
        seen = partial(meter.add, 0)
        scored = score(chosen, views, split, batch, workers=args.workers, device=device, seen=seen)

    members = []
    for name, weights, view in zip(models, chosen, views, strict=True):
        is_best = args.step is None and not name.endswith(FILE)
        members.append(describe_member(weights, view, best=is_best))
    report = {
        "dataset": dataset.store.url,
        "fingerprint": dataset.fingerprint,
        "split": args.split,
        "members": members,
        **report_of(scored, split, dataset.manifest.classes),
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    print(text if args.json else "\n".join(report_lines(report)))

    try:
        if args.per_class:
            write_classes(args.per_class, report["classes"])
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "eval.json").write_text(text + "\n")
            write_classes(args.out / "classes.csv", report["classes"])
    except OSError as error:
        raise unwritable(error.filename, error) from error
    return 0


def _open_own_dataset(models: list[str]) -> Dataset:
    """Open the dataset that the first run among `models` was trained on."""
    runs = [each for each in models if not each.endswith(FILE)]
    if not runs:
        raise UsageError(f"{models[0]} does not say where a dataset is; give one with --dataset")
    manifest, _ = find_run(runs[0])
    return own_dataset(manifest)
