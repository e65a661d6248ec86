"""The command line: `wds-train COMMAND`. Errors end as one line on stderr and the exit code of their class."""

import argparse
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from wds_train.addresses import announced, located
from wds_train.errors import Interrupted, NotFound, WdsTrainError, tell

LEAVE_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 done, 75 interrupted (run it again), 1 failed, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        args = _parser(arguments).parse_args(arguments)
        args.arguments = arguments
        return args.run_command(args)
    except WdsTrainError as error:
        tell(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("wds-train: stopped at once; what was committed before stands", file=sys.stderr)
        return Interrupted.exit_code
    except BrokenPipeError:
        # The reader (`| head`) has gone: not an error, and Python must not complain about it while it exits either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def entry() -> NoReturn:
    """The process `wds-train`. After a training it is gone within LEAVE_SECONDS: threads that still wait for a store, or for
    W&B, would hold up Python's own end.
    """
    code = main()
    if sys.argv[1:2] == ["train"]:
        from wds_train.spot import leave

        last = threading.Timer(LEAVE_SECONDS, leave, [code])
        last.daemon = True
        last.start()
    sys.exit(code)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that `arguments` name; the others' flags stay out, because some import PyTorch to
    define them, which takes seconds.
    """
    parser = argparse.ArgumentParser(prog="wds-train", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (text, add) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in arguments[:1]:
            add(command)
    return parser


def _add_shards(parser: argparse.ArgumentParser) -> None:
    from shards import make_shards

    make_shards.add_arguments(parser)
    parser.set_defaults(run_command=make_shards.run)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    from wds_train import audit

    _add_dataset(parser)
    audit.add_inspect_arguments(parser)
    parser.set_defaults(run_command=_with_dataset(audit.run_inspect))


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="DATASET_OR_RUN", help="s3://bucket/prefix, a directory, or a name")
    parser.add_argument(
        "--bucket", metavar="s3://B/P", help="where datasets/ and runs/ live ($WDS_BUCKET; else the embedded S3 server)"
    )
    parser.set_defaults(run_command=_verify)


def _verify(args: argparse.Namespace) -> int:
    from wds_train import audit

    meant = {located(args.address, kind, args.bucket): None for kind in ("datasets", "runs")}
    args.addresses = [announced(address, args.address) for address in meant]
    return audit.run_verify(args)


def _add_order(parser: argparse.ArgumentParser) -> None:
    _add_dataset(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epoch", type=int, default=0)
    parser.add_argument(
        "--global-batch", type=_positive, default=256, metavar="B", help="samples per step over all ranks"
    )
    parser.add_argument("--world", type=_positive, default=1, metavar="R", help="ranks to read as")
    parser.add_argument("--workers", type=_count, default=0, metavar="W", help="loader workers per rank")
    parser.add_argument("--from-step", type=_count, default=0, metavar="K", help="first step of the epoch to print")
    parser.add_argument("--steps", type=_count, metavar="N", help="how many steps; all that remain by default")
    parser.set_defaults(run_command=_with_dataset(_order))


def _order(args: argparse.Namespace) -> int:
    from wds_train.dataset import Dataset
    from wds_train.pipeline import stream_order

    lines = stream_order(
        Dataset.open(args.dataset),
        seed=args.seed,
        epoch=args.epoch,
        global_batch=args.global_batch,
        world=args.world,
        workers=args.workers,
        from_step=args.from_step,
        steps=args.steps,
    )
    for line in lines:
        print("\t".join(map(str, line)))
    return 0


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from wds_train import bench, bench_gpu, bench_loader, bench_train

    benches = parser.add_subparsers(metavar="BENCH", required=True)
    decode = benches.add_parser("decode", help="decode, random resized crop and flip, on one core")
    bench.add_arguments(decode)
    decode.set_defaults(run_command=bench.run)
    loader = benches.add_parser("loader", help="an epoch from S3 to augmented batches")
    bench_loader.add_arguments(loader)
    loader.set_defaults(run_command=bench_loader.run)
    train = benches.add_parser("train", help="training steps on one device, beside a plain loop over timm's parts")
    bench_train.add_arguments(train)
    train.set_defaults(run_command=bench_train.run)
    gpu = benches.add_parser("gpu", help="all that needs a GPU: speed, memory, resume, accuracy; a table in the end")
    bench_gpu.add_arguments(gpu)
    gpu.set_defaults(run_command=bench_gpu.run)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset", metavar="DATASET", help="s3://bucket/prefix or a directory (default: BUCKET/datasets/RECIPE)"
    )
    parser.add_argument(
        "--run", metavar="RUN", help="a name, or s3://bucket/prefix, or a directory (default: the recipe's name)"
    )
    parser.add_argument(
        "--bucket", metavar="s3://B/P", help="where datasets/ and runs/ live ($WDS_BUCKET; else the embedded S3 server)"
    )
    parser.add_argument("--recipe", default="digits", metavar="NAME")
    parser.add_argument(
        "--set", action="append", default=[], metavar="K=V", dest="settings", help="change one field of the recipe"
    )
    _add_work(parser)
    parser.add_argument(
        "--init", metavar="WEIGHTS", help="start from timm:NAME's pretrained weights or an exported file"
    )
    parser.add_argument(
        "--mix",
        type=_share,
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
        type=float,
        default=200.0,
        metavar="GB",
        help="most that the cache may hold (default: %(default)s)",
    )
    parser.add_argument(
        "--commit-minutes",
        type=float,
        default=10.0,
        metavar="M",
        help="commit the state this often, besides each epoch's end (default: %(default)s)",
    )
    parser.add_argument(
        "--max-uncommitted-minutes",
        type=float,
        default=60.0,
        metavar="M",
        help="stop when commits have failed for this long (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-every", type=_count, default=0, metavar="N", help="keep the checkpoint of every Nth epoch, too"
    )
    parser.set_defaults(run_command=_train)


def _add_work(parser: argparse.ArgumentParser) -> None:
    """How the work is done, which may differ from one start of a run to the next."""
    parser.add_argument(
        "--workers",
        type=_count,
        default=_default_workers(),
        metavar="W",
        help="loader processes (default: %(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=_positive,
        metavar="N",
        help="train in N processes on this machine (default: one for each GPU); for several machines, use torchrun",
    )
    parser.add_argument(
        "--accumulate",
        type=_positive,
        metavar="N",
        help="cut each process's part of a batch into N micro-batches (default: as few as fit into the GPU's memory)",
    )
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the arithmetic"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: the GPUs, if there are any (default)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the model: minutes at the start, faster then")
    parser.add_argument("--no-wait", action="store_true", help="fail at once when another instance holds the run")
    parser.add_argument("--deterministic", action="store_true", help="on a GPU: bit-equal, more slowly")


def _train(args: argparse.Namespace) -> int:
    from wds_train.presets import preset
    from wds_train.recipe import with_settings
    from wds_train.spot import StopRequest

    stop = StopRequest().listen()
    init = [f"model.init={args.init}"] if args.init else []
    recipe = with_settings(preset(args.recipe), args.settings + init)  # before the imports: a typo answers at once
    # Growing images ask for other sizes all the time, which fragments the GPU's memory otherwise. Read by PyTorch's import.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    dataset = _default_dataset(args) if args.dataset is None else _dataset_url(args.dataset, args.bucket)
    run = _run_url(args.recipe if args.run is None else args.run, args.bucket)
    mix = tuple((_dataset_url(each, args.bucket), share) for each, share in args.mix)

    from torch.cuda import device_count  # seconds, after what can be said without it

    from wds_train.distributed import launch, refuse_unusable_gpu
    from wds_train.train import TrainOptions, train

    cpu = args.device == "cpu"
    if not cpu:
        refuse_unusable_gpu()
    if "RANK" not in os.environ and (processes := args.processes or (1 if cpu else device_count())) > 1:
        return launch([*args.arguments, "--dataset", dataset, "--run", run], processes)
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
    )
    train(options, stop)
    return 0


def _add_run_command(parser: argparse.ArgumentParser, command: str) -> None:
    from wds_train import status

    parser.add_argument("run", metavar="RUN", help="a name, or s3://bucket/prefix, or a directory")
    parser.add_argument(
        "--bucket", metavar="s3://B/P", help="where runs/ lives ($WDS_BUCKET; else the embedded S3 server)"
    )
    add_arguments, run_command = {
        "status": (status.add_status_arguments, status.run_status),
        "checkpoints": (lambda _: None, status.run_checkpoints),
        "rollback": (status.add_rollback_arguments, status.run_rollback),
        "export": (status.add_export_arguments, status.run_export),
    }[command]
    add_arguments(parser)
    parser.set_defaults(run_command=lambda args: run_command(_addressed(args)))


def _add_eval(parser: argparse.ArgumentParser) -> None:
    from wds_train import evaluate

    parser.add_argument("run", metavar="RUN_OR_FILE", help="a run as elsewhere, or a file of `wds-train export`")
    parser.add_argument(
        "--bucket", metavar="s3://B/P", help="where runs/ lives ($WDS_BUCKET; else the embedded S3 server)"
    )
    parser.add_argument("--workers", type=_count, default=_default_workers(), metavar="W", help="loader processes")
    parser.add_argument("--batch", type=_positive, metavar="B", help="samples at a time (default: as in the training)")
    evaluate.add_arguments(parser)
    parser.set_defaults(run_command=_eval)


def _eval(args: argparse.Namespace) -> int:
    from wds_train import evaluate

    args.dataset = _dataset_url(args.dataset, args.bucket)
    args.models = [
        each if each.endswith(evaluate.SUFFIX) else _run_url(each, args.bucket) for each in (args.run, *args.ensemble)
    ]
    return evaluate.run(args)


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    from wds_train import recipes

    recipes.add_arguments(parser)
    parser.set_defaults(run_command=recipes.run)


def _addressed(args: argparse.Namespace) -> argparse.Namespace:
    args.run = _run_url(args.run, args.bucket)
    return args


def _run_url(run: str, bucket: str | None) -> str:
    """`run`, an address already, or the name of one under `bucket`/runs."""
    from wds_train.state import name_of

    name_of(run)
    return announced(located(run, "runs", bucket), run)


def _dataset_url(dataset: str, bucket: str | None) -> str:
    return announced(located(dataset, "datasets", bucket), dataset)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    """The argument DATASET, which is an address once it is parsed together with --bucket."""
    parser.add_argument("dataset", metavar="DATASET", help="s3://bucket/prefix, a directory (/... or ./...), or a name")
    parser.add_argument(
        "--bucket", metavar="s3://B/P", help="where datasets/ lives ($WDS_BUCKET; else the embedded S3 server)"
    )


def _with_dataset(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def located_first(args: argparse.Namespace) -> int:
        args.dataset = _dataset_url(args.dataset, args.bucket)
        return run(args)

    return located_first


def _default_dataset(args: argparse.Namespace) -> str:
    """The dataset named like the recipe. The digits are made when they are not there yet: they need no download."""
    url = _dataset_url(args.recipe, args.bucket)
    if args.recipe == "digits":
        from wds_train.dataset import Dataset

        try:
            Dataset.open(url)
        except NotFound:
            main(["shards", "digits", url])
    return url


def _default_workers() -> int:
    """A process per core that this one may use, less one for the training itself."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, len(os.sched_getaffinity(0)) // ranks - 1))


def _count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _share(text: str) -> tuple[str, float]:
    url, _, share = text.rpartition("=")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not url or not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not DATASET=SHARE with a share between 0 and 1")
    return url, value


def _positive(text: str) -> int:
    return _count(text, least=1)


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "shards": ("convert images to tar shards, index and manifest", _add_shards),
    "inspect": ("what a dataset holds", _add_inspect),
    "verify": ("re-read every byte of a dataset or a run", _add_verify),
    "order": ("print the samples of an epoch in training order", _add_order),
    "train": ("train, or go on with a run", _add_train),
    "recipes": ("list the recipes, or print one in full", _add_recipes),
    "eval": ("the accuracy of a run's weights or of an exported file, alone or together", _add_eval),
    "status": ("how far a run is, who trains it, what it cost", partial(_add_run_command, command="status")),
    "checkpoints": ("list a run's checkpoints", partial(_add_run_command, command="checkpoints")),
    "rollback": ("make an older checkpoint the newest", partial(_add_run_command, command="rollback")),
    "export": ("a run's weights as a file that timm loads", partial(_add_run_command, command="export")),
    "bench": ("measure what the parts cost", _add_bench),
}

if __name__ == "__main__":
    entry()
