"""`wds-train train`: train, or go on with a run."""

import argparse
import os
import sys
import typing
from pathlib import Path

from wds_train.commands.arguments import (
    add_bucket,
    add_device,
    add_workers,
    count,
    dataset_url,
    dollars,
    positive,
    run_url,
    share_of,
)
from wds_train.config.numbers import above_zero
from wds_train.config.precision import Precision
from wds_train.config.presets import preset
from wds_train.config.settings import following, with_settings
from wds_train.errors import NotFound
from wds_train.tracking.console import loading
from wds_train.training.stop import StopRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset", metavar="DATASET", help="s3://bucket/prefix or a directory (default: BUCKET/datasets/RECIPE)"
    )
    parser.add_argument(
        "--run", metavar="RUN", help="a name, or s3://bucket/prefix, or a directory (default: the recipe's name)"
    )
    add_bucket(parser, "datasets/ and runs/ live")
    parser.add_argument("--recipe", default="digits", metavar="NAME")
    parser.add_argument(
        "--set", action="append", default=[], metavar="K=V", dest="settings", help="change one field of the recipe"
    )
    _add_work(parser)
    parser.add_argument("--init", metavar="WEIGHTS", help="start from timm:NAME's pretrained weights, or from a file")
    parser.add_argument(
        "--mix",
        type=share_of,
        action="append",
        default=[],
        metavar="DATASET=SHARE",
        help="take this share of every batch from another dataset of the same classes (0.25, say)",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="keep shards' blocks on this local disk, so that later epochs read no S3",
    )
    parser.add_argument(
        "--cache-gb",
        type=above_zero,
        default=200.0,
        metavar="GB",
        help="most that the cache may hold (default: %(default)s)",
    )
    parser.add_argument(
        "--commit-minutes",
        type=above_zero,
        default=10.0,
        metavar="M",
        help="commit the state this often, besides each epoch's end (default: %(default)s)",
    )
    parser.add_argument(
        "--max-uncommitted-minutes",
        type=above_zero,
        default=60.0,
        metavar="M",
        help="stop when commits have failed for this long (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-every", type=count, default=0, metavar="N", help="keep the checkpoint of every Nth epoch, too"
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for how the work is done, which may differ from one start of a run to the next."""
    add_workers(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what this training would take, from two steps of it; nothing is written",
    )
    parser.add_argument(
        "--price", type=dollars, metavar="USD", help="of an instance hour, to show what the training costs"
    )
    parser.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="train in N processes on this machine (default: one for each GPU); for several machines, use torchrun",
    )
    parser.add_argument(
        "--accumulate",
        type=positive,
        metavar="N",
        help="cut each process's part of a batch into N micro-batches (default: as few as fit into the GPU's memory)",
    )
    parser.add_argument("--precision", choices=typing.get_args(Precision), default="auto", help="of the arithmetic")
    add_device(parser)
    parser.add_argument("--compile", action="store_true", help="compile the model: minutes at the start, faster then")
    parser.add_argument("--no-wait", action="store_true", help="fail at once when another instance holds the run")
    parser.add_argument("--go-on", action="store_true", help="go on with a run that a person stopped, in W&B")
    parser.add_argument("--deterministic", action="store_true", help="on a GPU: bit-equal, more slowly")


def run(args: argparse.Namespace) -> int:
    stop = StopRequest().listen()
    settings = args.settings + ([f"model.init={args.init}"] if args.init else [])
    recipe = with_settings(preset(args.recipe), settings)  # before the imports: a typo answers at once
    # Growing images ask for other sizes all the time, which fragments the GPU's memory otherwise. Read by PyTorch's import.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    run = run_url(args.recipe if args.run is None else args.run, args.bucket)
    dataset = _default_dataset(args) if args.dataset is None else dataset_url(args.dataset, args.bucket)
    mix = tuple((dataset_url(each, args.bucket), share) for each, share in args.mix)

    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # in a log, one endless line
    if "LOCAL_RANK" not in os.environ:  # else another process has said so
        loading()
    from torch.cuda import device_count  # seconds, after what can be said without it

    from wds_train.models.pretrained import as_init
    from wds_train.tracking.console import say
    from wds_train.training.estimate import estimate
    from wds_train.training.launch import launch
    from wds_train.training.options import TrainOptions
    from wds_train.training.ranks import refuse_unusable_gpu
    from wds_train.training.train import train

    cpu = args.device == "cpu"
    if not cpu:
        refuse_unusable_gpu()
    processes = 1 if args.dry_run else args.processes or (1 if cpu else device_count())
    if "RANK" not in os.environ and processes > 1:
        return launch([*args.arguments, "--dataset", dataset, "--run", run], processes)
    for line in following(preset(args.recipe), settings) if os.environ.get("RANK", "0") == "0" else ():
        say(f"set      {line}; --set it for another")
    recipe = as_init(recipe, settings)
    options = TrainOptions(
        dataset,
        run,
        recipe,
        args.workers,
        mix=mix,
        cache_dir=args.cache_dir,
        cache_bytes=int(args.cache_gb * 1e9),
        commit_minutes=args.commit_minutes,
        max_uncommitted_minutes=args.max_uncommitted_minutes,
        keep_every=args.keep_every,
        wait=not args.no_wait,
        deterministic=args.deterministic,
        accumulate=args.accumulate,
        precision=args.precision,
        compile=args.compile,
        cpu=cpu,
        price=args.price,
        go_on=args.go_on,
    )
    if args.dry_run:
        print("\n".join(estimate(options)))
        return 0
    train(options, stop)
    return 0


def _default_dataset(args: argparse.Namespace) -> str:
    """The dataset named like the recipe. The digits are made when they are not there yet: they need no download."""
    url = dataset_url(args.recipe, args.bucket)
    if args.recipe == "digits" and not args.dry_run:
        from shards import make_shards
        from wds_train.data.dataset import Dataset

        try:
            Dataset.open(url)
        except NotFound:
            parser = argparse.ArgumentParser()
            make_shards.add_arguments(parser)
            make_shards.run(parser.parse_args(["digits", url]))
    return url
