"""`wds-train train`: train, or go on with a run, which supplies all that it was begun with."""

import argparse
import os
import shlex
import sys
import typing
from dataclasses import dataclass, replace
from pathlib import Path

from wds_train.checkpoint.clock import Clock
from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.resume_checks import check_resume, data_of, kept_nothing, own_dataset, own_mixture
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.commands.flags import (
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
from wds_train.config.recipe import Recipe
from wds_train.config.settings import following, parsed, with_settings
from wds_train.console import loading, say
from wds_train.dataset.manifest import NAME
from wds_train.dataset.reader import Dataset
from wds_train.environment import PLACE, refuse_bad_numbers
from wds_train.errors import NotFound, UsageError, WdsTrainError
from wds_train.slurm import take_place
from wds_train.storage.address import announced, located, name_from
from wds_train.storage.open import open_store
from wds_train.storage.proof import UNSAFE_HELP
from wds_train.training.stop_request import StopRequest

if typing.TYPE_CHECKING:
    from wds_train.training.options import TrainOptions

DEFAULT = "digits"  # the recipe, and its dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        metavar="RUN",
        help="a name, s3://bucket/prefix or a directory (default: DATASET-RECIPE); one that exists goes on as it began",
    )
    parser.add_argument("--run", metavar="RUN", help="the same")
    parser.add_argument(
        "--dataset", metavar="DATASET", help="a name, s3://bucket/prefix or a directory (default: the run's own)"
    )
    parser.add_argument("--shard", action="store_true", help="DATASET is a folder of images: make its shards first")
    add_bucket(parser, "datasets/ and runs/ live")
    parser.add_argument("--recipe", metavar="NAME", help=f"(default: the run's own; of a new run, {DEFAULT})")
    parser.add_argument("--like", metavar="RUN", help="begin with the recipe, dataset and mixture of another run")
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
    parser.add_argument("--unsafe-store", action="store_true", help=UNSAFE_HELP)
    parser.add_argument("--deterministic", action="store_true", help="on a GPU: bit-equal, more slowly")
    parser.add_argument(
        "--hang-minutes",
        type=above_zero,
        metavar="M",
        help="end all processes, and name the one that hangs, where it has not got on for so long (default: 10)",
    )
    parser.add_argument(
        "--recheck",
        type=positive,
        default=0,
        metavar="N",
        help="compute every Nth step twice, and end where the two differ: this machine computes wrongly (default: none)",
    )


def run(args: argparse.Namespace) -> int:
    refuse_bad_numbers(PLACE)
    if not args.dry_run and (taken := take_place(args.processes)):
        say(taken)
    dataset = _sharded(args) if args.shard else args.dataset  # before `listen`: a conversion stops in its own way
    clock = Clock()  # a conversion is no part of what the run is paid for
    stop = StopRequest().listen()
    meant = _meant(args, dataset)
    if args.dry_run and meant.own and meant.own.status == "done":
        print(f"nothing would be trained: run {meant.run} is done")
        return 0
    _set_before_imports()
    if "LOCAL_RANK" not in os.environ:  # else another process has said so
        loading()
    from torch.cuda import device_count  # seconds, after what can be said without it

    from wds_train.training.dry_run import estimate
    from wds_train.training.local_ranks import launch
    from wds_train.training.ranks import refuse_unusable_gpu
    from wds_train.training.recheck import refuse_unrepeatable
    from wds_train.training.run_training import train

    cpu = args.device == "cpu"
    if not cpu:
        refuse_unusable_gpu()
    if args.recheck and not args.deterministic:
        refuse_unrepeatable(cpu=cpu)
    processes = 1 if args.dry_run else args.processes or (1 if cpu else device_count())
    if "RANK" not in os.environ and processes > 1:
        return launch([*args.arguments, "--dataset", meant.dataset, "--run", meant.run], processes)
    for line in meant.followed if os.environ.get("RANK", "0") == "0" else ():
        say(f"set      {line}; --set it for another")
    options = _options(args, meant)
    if args.dry_run:
        print("\n".join([*estimate(options), f"nothing was written: without --dry-run, this {_next(meant.own)}"]))
        return 0
    train(options, stop, clock)
    return 0


def _options(args: argparse.Namespace, meant: "Meant") -> "TrainOptions":
    """How to train what is meant."""
    from wds_train.models.pretrained import as_init
    from wds_train.training.options import TrainOptions

    return TrainOptions(
        meant.dataset,
        meant.run,
        as_init(meant.recipe, meant.settings),
        args.workers,
        mix=meant.mix,
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
        cpu=args.device == "cpu",
        price=args.price,
        recheck=args.recheck,
        hang_minutes=args.hang_minutes,
        go_on=args.go_on,
        unsafe_store=args.unsafe_store,
    )


def _set_before_imports() -> None:
    """Set what PyTorch and Hugging Face's hub read when they are imported."""
    # Images that grow ask for other sizes all the time, which would fragment the GPU's memory.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # in a log, one endless line


@dataclass(frozen=True)
class Meant:
    """What to train: as the arguments say, and where they say nothing, as the run did, or the one that it is to be like."""

    run: str
    recipe: Recipe
    dataset: str
    mix: tuple[tuple[str, float], ...]
    settings: list[str]
    followed: list[str]
    """What the settings change besides, a line each."""
    own: RunManifest | None
    """The run as it stands, if it has begun."""


def _meant(args: argparse.Namespace, dataset: str | None) -> Meant:
    settings = [*args.settings, *([f"model.init={args.init}"] if args.init else [])]
    parsed(settings)  # before a store is asked: a typo answers at once
    wanted = preset(args.recipe or DEFAULT)
    run = _run_url(args, dataset)
    own = _begun(run)
    source = own if args.like is None else find_run(run_url(args.like, args.bucket))[0]
    if source and (args.recipe is None or (args.recipe == source.settings.name and not kept_nothing(source))):
        wanted = source.settings
    elif not (source or dataset) and (name := args.name or args.run):  # which may be mistyped
        _refuse_data(name, run, args)
        if args.recipe is None:
            print(f"there is no run at {run} yet: it begins now, on the {DEFAULT}", file=sys.stderr)
    recipe = with_settings(wanted, settings)
    opened = _dataset(args, dataset, source)
    mix = tuple((dataset_url(each, args.bucket), share) for each, share in args.mix)
    if source and not mix:
        mix = own_mixture(source)
    if own:
        data = data_of(opened, [(Dataset.open(url), share) for url, share in mix])
        check_resume(own, replace(own, recipe=recipe.to_dict(), dataset=data), run)  # refuses what cannot be
    return Meant(run, recipe, opened.store.url, mix, settings, following(wanted, settings), own)


def _next(own: RunManifest | None) -> str:
    return f"goes on at step {own.step}" if own else "begins"


def _refuse_data(name: str, run: str, args: argparse.Namespace) -> None:
    """`UsageError` where RUN, which is no run yet, is rather what to train on: else the training would be one on the digits, and
    its state written into a folder of images.
    """
    if name == (args.recipe or DEFAULT):  # a run that is called like its recipe, as its dataset may be
        return
    folder = Path(name).expanduser()
    try:
        what, meant = f"dataset {Dataset.open(located(name, 'datasets', args.bucket)).store.url}", name
    except WdsTrainError:
        if not (folder.is_dir() and any(folder.iterdir())):
            return
        what, meant = f"folder {folder}", f"{shlex.quote(name)} --shard"
    raise UsageError(
        f"there is no run at {run}, but a {what}; to train on that: wds-train train --dataset {meant} (for a run "
        f"of this name on other data, give --dataset, too)"
    )


def _dataset(args: argparse.Namespace, dataset: str | None, source: RunManifest | None) -> Dataset:
    """What is given, else that of `source`, else the one named like the recipe; the digits are made when they are not there
    yet: they need no download.
    """
    if dataset is not None:
        return Dataset.open(dataset_url(dataset, args.bucket))
    if source:
        return own_dataset(source)
    recipe = args.recipe or DEFAULT
    url = dataset_url(recipe, args.bucket)
    try:
        return Dataset.open(url)
    except NotFound as error:
        if recipe != DEFAULT or args.dry_run:
            raise UsageError(f"no --dataset is given, and none is called like the recipe: {error}") from error
        _convert(DEFAULT, url, args)
        return Dataset.open(url)


def _run_url(args: argparse.Namespace, dataset: str | None) -> str:
    """The address of the run that is named, by RUN or by --run, or the usual one of this dataset and recipe."""
    named = [run_url(each, args.bucket) for each in (args.name, args.run) if each is not None]
    if len({*named}) > 1:
        raise UsageError(f"{named[0]} and {named[1]} are two runs; name one")
    if named:
        return named[0]
    if args.like is not None:
        raise UsageError(f"the new run needs a name: wds-train train NAME --like {shlex.quote(args.like)}")
    recipe = args.recipe or DEFAULT
    name = recipe if dataset is None else name_from(dataset.rstrip("/").rpartition("/")[2])
    return run_url(name if name == recipe else f"{name}-{recipe}", args.bucket)


def _begun(run: str) -> RunManifest | None:
    try:
        return read_run(open_store(run))[0]
    except NotFound:
        return None


def _sharded(args: argparse.Namespace) -> str | None:
    """DATASET; where that is a folder of images, the dataset that is made of it, unless that was done before."""
    if args.dataset is None:
        raise UsageError("--shard needs the folder of the images: --dataset FOLDER")
    folder = Path(args.dataset).expanduser()
    if not folder.is_dir() or (folder / NAME).exists():
        return args.dataset
    url = announced(located(name_from(folder.resolve().name), "datasets", args.bucket), args.dataset)
    if "RANK" in os.environ:
        first = shlex.join(["wds-train", "shards", args.dataset, url])
        raise UsageError(f"--shard is for one process, which starts the others; first: {first}")
    _convert(str(folder.resolve()), url, args)
    return url


def _convert(source: str, url: str, args: argparse.Namespace) -> None:
    from wds_train.conversion import command as make_shards

    parser = argparse.ArgumentParser()
    make_shards.add_arguments(parser)
    make_shards.run(parser.parse_args([source, url, *["--unsafe-store"][: args.unsafe_store]]))
