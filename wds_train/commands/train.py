"""`wds-train train`: train a new run, or resume one.

A run stores its recipe and dataset. On resume they may be omitted; if given, they must match.
"""

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
from wds_train.checkpoint.resume_checks import (
    check_resume,
    data_of,
    kept_nothing,
    own_dataset,
    own_mixture,
)
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.commands.flags import (
    add_bucket,
    add_device,
    add_workers,
    count,
    dollars,
    parse_share,
    positive,
    resolve_dataset,
    resolve_run,
)
from wds_train.config.numbers import above_zero
from wds_train.config.precision import Precision
from wds_train.config.presets import preset
from wds_train.config.recipe import Recipe
from wds_train.config.settings import describe_followers, parse_settings, with_settings
from wds_train.console import loading, say
from wds_train.dataset.manifest import NAME
from wds_train.dataset.reader import Dataset
from wds_train.environment import PLACE, refuse_bad_numbers
from wds_train.errors import NotFound, UsageError, WdsTrainError
from wds_train.slurm import take_place
from wds_train.storage.address import announce_embedded, make_name, resolve_address
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
        help="a name, s3://bucket/prefix or a directory (default: DATASET-RECIPE); a run that "
        "exists is resumed",
    )
    parser.add_argument("--run", metavar="RUN", help="the same as RUN")
    parser.add_argument(
        "--dataset",
        metavar="DATASET",
        help="a name, s3://bucket/prefix or a directory (default: the run's own)",
    )
    parser.add_argument(
        "--shard", action="store_true", help="DATASET is a folder of images: make its shards first"
    )
    add_bucket(parser, "datasets/ and runs/ live")
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"(default: the run's own; of a new run, {DEFAULT})"
    )
    parser.add_argument(
        "--like", metavar="RUN", help="begin with the recipe, dataset and mixture of another run"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="K=V",
        dest="settings",
        help="change one field of the recipe",
    )
    _add_work(parser)
    parser.add_argument(
        "--init",
        metavar="WEIGHTS",
        help="start from timm:NAME's pretrained weights, or from a file",
    )
    parser.add_argument(
        "--mix",
        type=parse_share,
        action="append",
        default=[],
        metavar="DATASET=SHARE",
        help="take this share of every batch from another dataset of the same classes (0.25, say)",
    )
    _add_storage(parser)


def _add_storage(parser: argparse.ArgumentParser) -> None:
    """Add arguments for the cache and for the commits."""
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="keep the shards on this local disk, so that later epochs do not read S3",
    )
    parser.add_argument(
        "--cache-gb",
        type=above_zero,
        default=200.0,
        metavar="GB",
        help="the most that the cache may hold (default: %(default)s)",
    )
    parser.add_argument(
        "--commit-minutes",
        type=above_zero,
        default=10.0,
        metavar="M",
        help="commit the state this often, and at each epoch's end (default: %(default)s)",
    )
    parser.add_argument(
        "--max-uncommitted-minutes",
        type=above_zero,
        default=60.0,
        metavar="M",
        help="stop when commits have failed for this long (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-every",
        type=count,
        default=0,
        metavar="N",
        help="also keep the checkpoint of every Nth epoch",
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    """Add arguments that may differ from one start of a run to the next."""
    add_workers(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="estimate this training from two of its steps; nothing is written",
    )
    parser.add_argument(
        "--price",
        type=dollars,
        metavar="USD",
        help="price of an instance hour, to show what the training costs",
    )
    parser.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="train in N processes on this machine (default: one for each GPU); for several "
        "machines, use torchrun",
    )
    parser.add_argument(
        "--accumulate",
        type=positive,
        metavar="N",
        help="cut each process's part of a batch into N micro-batches (default: as few as fit "
        "into the GPU's memory)",
    )
    parser.add_argument(
        "--precision", choices=typing.get_args(Precision), default="auto", help="numeric precision"
    )
    add_device(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the model: takes minutes at the start, trains faster",
    )
    _add_safety(parser)


def _add_safety(parser: argparse.ArgumentParser) -> None:
    """Add arguments for runs in use or stopped, unsafe stores, and machines that hang or err."""
    parser.add_argument(
        "--no-wait", action="store_true", help="fail at once when another instance holds the run"
    )
    parser.add_argument(
        "--go-on", action="store_true", help="resume a run that a person stopped in W&B"
    )
    parser.add_argument("--unsafe-store", action="store_true", help=UNSAFE_HELP)
    parser.add_argument(
        "--deterministic", action="store_true", help="bit-exact results on GPUs (slower)"
    )
    parser.add_argument(
        "--hang-minutes",
        type=above_zero,
        metavar="M",
        help="end all processes if one hangs for so long, and name it (default: 10)",
    )
    parser.add_argument(
        "--recheck",
        type=positive,
        default=0,
        metavar="N",
        help="compute every Nth step twice, and stop if the results differ: the machine is faulty "
        "then (default: never)",
    )


def run(args: argparse.Namespace) -> int:
    refuse_bad_numbers(PLACE)
    if not args.dry_run:
        taken = take_place(args.processes)
        if taken:
            say(taken)

    # Before `listen`, since a conversion stops in its own way, and before the clock: its time is
    # not the run's.
    dataset = _make_shards(args) if args.shard else args.dataset
    clock = Clock()
    stop = StopRequest().listen()
    job = _resolve_job(args, dataset)
    if args.dry_run and job.own and job.own.status == "done":
        print(f"nothing would be trained: run {job.run} is done")
        return 0

    # These imports take seconds: they come after all that can be refused without them.
    _set_before_imports()
    if "LOCAL_RANK" not in os.environ:  # else another process has said so
        loading()
    from torch.cuda import device_count

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

    # This process starts the others, one for each GPU.
    processes = _count_processes(args, 1 if cpu else device_count())
    if "RANK" not in os.environ and processes > 1:
        return launch([*args.arguments, "--dataset", job.dataset, "--run", job.run], processes)

    if os.environ.get("RANK", "0") == "0":
        for line in job.followed:
            say(f"set      {line}; --set it for another")
    options = _options(args, job)
    if args.dry_run:
        for line in estimate(options):
            print(line)
        begins = f"goes on at step {job.own.step}" if job.own else "begins"
        print(f"nothing was written: without --dry-run, this {begins}")
        return 0
    train(options, stop, clock)
    return 0


def _count_processes(args: argparse.Namespace, devices: int) -> int:
    """Return the number of processes that train on this machine."""
    if args.dry_run:
        return 1
    return args.processes or devices


def _options(args: argparse.Namespace, job: "Job") -> "TrainOptions":
    """Return the options of the training."""
    from wds_train.models.pretrained import as_init
    from wds_train.training.options import TrainOptions

    return TrainOptions(
        job.dataset,
        job.run,
        as_init(job.recipe, job.settings),
        args.workers,
        mix=job.mix,
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
    """Set environment variables that PyTorch and Hugging Face's hub read when they are imported."""
    # Images that grow need ever other sizes, which would fragment the GPU's memory.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one endless line in a log


@dataclass(frozen=True)
class Job:
    """A training to do, as the arguments say, and else as the run itself or the one of --like does.

    Attributes:
        run: The run's address.
        recipe: Its recipe, with the settings.
        dataset: The dataset's address.
        mix: Addresses of other datasets, with their shares of each batch.
        settings: The fields of the recipe that --set and --init change.
        followed: Fields that change because of `settings`, a line each.
        own: The run's manifest, if the run exists.
    """

    run: str
    recipe: Recipe
    dataset: str
    mix: tuple[tuple[str, float], ...]
    settings: list[str]
    followed: list[str]
    own: RunManifest | None


def _resolve_job(args: argparse.Namespace, dataset: str | None) -> Job:
    """Return the training that is meant.

    Args:
        args: The arguments of the command.
        dataset: The value of --dataset, or the address of the shards that were made of it.

    Raises:
        UsageError: The arguments contradict one another, or the run.
    """
    settings = list(args.settings)
    if args.init:
        settings.append(f"model.init={args.init}")
    parse_settings(settings)  # before a store is asked: a typo is answered at once

    # The recipe: the one that is named, or that of the run.
    wanted = preset(args.recipe or DEFAULT)
    run = _resolve_run_to_train(args, dataset)
    own = _read_existing(run)
    source = own
    if args.like is not None:
        source, _ = find_run(resolve_run(args.like, args.bucket))
    name = args.name or args.run
    if source and _keeps_recipe(args.recipe, source):
        wanted = source.settings
    elif name and not source and not dataset:  # the name may be mistyped
        _refuse_data(name, run, args)
        if args.recipe is None:
            print(f"there is no run at {run} yet: it begins now, on the {DEFAULT}", file=sys.stderr)
    recipe = with_settings(wanted, settings)

    # The data, which must be the run's if there is one.
    opened = _open_dataset(args, dataset, source)
    mix = tuple((resolve_dataset(each, args.bucket), share) for each, share in args.mix)
    if source and not mix:
        mix = own_mixture(source)
    if own:
        data = data_of(opened, [(Dataset.open(url), share) for url, share in mix])
        fresh = replace(own, recipe=recipe.to_dict(), dataset=data)
        check_resume(own, fresh, run)  # raises if the run cannot go on so
    return Job(
        run, recipe, opened.store.url, mix, settings, describe_followers(wanted, settings), own
    )


def _keeps_recipe(recipe: str | None, source: RunManifest) -> bool:
    """Return whether the recipe of `source` is used, rather than the preset of that name."""
    if recipe is None:
        return True
    return recipe == source.settings.name and not kept_nothing(source)


def _refuse_data(name: str, run: str, args: argparse.Namespace) -> None:
    """Raise `UsageError` if RUN does not exist, but names a dataset or a folder to train on.

    Otherwise the digits would be trained, and the state be written into a folder of images.
    """
    if name == (args.recipe or DEFAULT):  # a run may be called like its recipe and its dataset
        return
    folder = Path(name).expanduser()
    try:
        address = Dataset.open(resolve_address(name, "datasets", args.bucket)).store.url
        found = f"dataset {address}"
        arguments = name
    except WdsTrainError:
        if not folder.is_dir() or not any(folder.iterdir()):
            return
        found = f"folder {folder}"
        arguments = f"{shlex.quote(name)} --shard"
    raise UsageError(
        f"there is no run at {run}, but a {found}; to train on that: "
        f"wds-train train --dataset {arguments} "
        "(for a run of this name on other data, give --dataset, too)"
    )


def _open_dataset(
    args: argparse.Namespace, dataset: str | None, source: RunManifest | None
) -> Dataset:
    """Open the dataset that is given, else that of `source`, else the one named like the recipe.

    The digits are made if they are not there yet: they need no download.
    """
    if dataset is not None:
        return Dataset.open(resolve_dataset(dataset, args.bucket))
    if source:
        return own_dataset(source)
    recipe = args.recipe or DEFAULT
    url = resolve_dataset(recipe, args.bucket)
    try:
        return Dataset.open(url)
    except NotFound as error:
        if recipe != DEFAULT or args.dry_run:
            raise UsageError(
                f"no --dataset is given, and none is called like the recipe: {error}"
            ) from error
        _convert(DEFAULT, url, args)
        return Dataset.open(url)


def _resolve_run_to_train(args: argparse.Namespace, dataset: str | None) -> str:
    """Return the address of the run, which is named after dataset and recipe by default."""
    named = [resolve_run(each, args.bucket) for each in (args.name, args.run) if each is not None]
    if len(set(named)) > 1:
        raise UsageError(f"{named[0]} and {named[1]} are two runs; name one")
    if named:
        return named[0]
    if args.like is not None:
        raise UsageError(
            f"the new run needs a name: wds-train train NAME --like {shlex.quote(args.like)}"
        )
    recipe = args.recipe or DEFAULT
    name = recipe
    if dataset is not None:
        name = make_name(dataset.rstrip("/").rpartition("/")[2])
    if name != recipe:
        name = f"{name}-{recipe}"
    return resolve_run(name, args.bucket)


def _read_existing(run: str) -> RunManifest | None:
    try:
        return read_run(open_store(run))[0]
    except NotFound:
        return None


def _make_shards(args: argparse.Namespace) -> str | None:
    """Return the dataset of --shard: made of the folder DATASET, unless that is one already."""
    if args.dataset is None:
        raise UsageError("--shard needs the folder of the images: --dataset FOLDER")
    folder = Path(args.dataset).expanduser()
    if not folder.is_dir() or (folder / NAME).exists():
        return args.dataset
    name = make_name(folder.resolve().name)
    url = resolve_address(name, "datasets", args.bucket)
    announce_embedded(url, args.dataset)
    if "RANK" in os.environ:
        first = shlex.join(["wds-train", "shards", args.dataset, url])
        raise UsageError(f"--shard is for one process, which starts the others; first: {first}")
    _convert(str(folder.resolve()), url, args)
    return url


def _convert(source: str, url: str, args: argparse.Namespace) -> None:
    """Run `wds-train shards`."""
    from wds_train.conversion import command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = [source, url]
    if args.unsafe_store:
        words.append("--unsafe-store")
    command.run(parser.parse_args(words))
