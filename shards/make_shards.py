"""`wds-train shards`: a dataset becomes tar shards on S3, once."""

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from shards.convert import Conversion, Options, ShardDone, run_tasks
from shards.images import ImagePolicy
from shards.source import Note
from shards.sources import DIGITS, name_of, open_source
from shards.spool import Spool
from wds_train.devserver import home
from wds_train.errors import DataError, Interrupted, WdsTrainError
from wds_train.manifest import DatasetManifest
from wds_train.store import default_url, open_store

MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=f"{DIGITS!r}, or a folder of images")
    parser.add_argument("dataset", metavar="DATASET", nargs="?", help="s3://bucket/prefix or a local directory")
    parser.add_argument("--bucket", help="s3://bucket/prefix: DATASET is then datasets/NAME below it")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle over the whole source (%(default)s)")
    parser.add_argument("--shard-mb", type=float, default=128, help="largest shard, in MiB (%(default)s)")
    parser.add_argument(
        "--resize-shorter", type=int, metavar="PX", help="encode larger images anew at this shorter side"
    )
    parser.add_argument("--quality", type=int, default=90, help="of what is encoded anew as JPEG (%(default)s)")
    parser.add_argument(
        "--verify", choices=("header", "full"), default="header", help="how images are checked (%(default)s)"
    )
    parser.add_argument(
        "--max-bad", type=float, default=0.0, metavar="SHARE", help="share of samples that may be left out"
    )
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="(%(default)s)")
    parser.add_argument("--spool", type=Path, help="local folder for images that come as a stream (.wds/spool)")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset made with other settings")


def run(args: argparse.Namespace) -> int:
    url = args.dataset or default_url("datasets", name_of(args.source), args.bucket)
    began = time.monotonic()
    with Spool(args.spool or home() / "spool", url) as spool:
        source = open_source(args.source, spool)
        conversion = Conversion(source, open_store(url), _options(args))
        done = conversion.begin(overwrite=args.overwrite)
        if done is None:
            made = conversion.complete()
            print(f"{conversion.store.url} is complete already: {_counts(made)}")
            return 0
        done = _convert(conversion, done, args.processes)
        _judge(conversion, done, args.max_bad)
        made = conversion.finish(done)
    _print_notes(conversion.notes(done))
    print(f"{conversion.store.url}: {_counts(made)}, in {time.monotonic() - began:.0f} s")
    print(f"fingerprint {made.fingerprint}")
    return 0


def _options(args: argparse.Namespace) -> Options:
    return Options(args.seed, int(args.shard_mb * MIB), ImagePolicy(args.resize_shorter, args.quality, args.verify))


def _convert(conversion: Conversion, done: list[ShardDone], processes: int) -> list[ShardDone]:
    """All shards: those `done`, and the rest, made now."""
    finished = {(part.split, part.number) for part in done}
    missing = sum(map(len, conversion.parts.values())) - len(finished)
    if finished:
        print(f"{len(finished)} of {len(finished) + missing} shards are finished already")
    executor = _pool(min(processes, missing)) if min(processes, missing) > 1 else None
    total = conversion.source.samples
    try:
        with tqdm(total=total, unit="img", smoothing=0.05, disable=not sys.stderr.isatty()) as bar:
            bar.update(sum(part.shard.samples for part in done))
            for part in run_tasks(executor, conversion.tasks(finished), 2 * processes):
                done.append(part)
                bar.update(part.shard.samples)
    except BrokenProcessPool as error:
        raise DataError("a worker process died, out of memory perhaps; run again with fewer --processes") from error
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped; {len(done)} shards are finished: run the same command to go on") from error
    finally:
        if executor is not None:
            executor.shutdown(cancel_futures=True)
    return done


def _pool(processes: int) -> Executor:
    # spawn: a fork would inherit the locks of boto3's and pyarrow's threads in whatever state they are.
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_die_with_parent)


def _die_with_parent() -> None:
    """Workers of a killed conversion would wait for tasks for ever, and write beside the next one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _judge(conversion: Conversion, done: list[ShardDone], max_bad: float) -> None:
    bad = [note for note in conversion.notes(done) if note.what == "left out"]
    total = conversion.source.samples + sum(note.what == "left out" for note in conversion.source.notes)
    if len(bad) > max_bad * total:
        _print_notes(bad)
        raise DataError(
            f"{len(bad)} of {total} samples cannot be used, {max_bad:.2%} may; "
            f"repair or remove them, or allow it: --max-bad {len(bad) / total * 1.1:.2g}"
        )


def _print_notes(notes: list[Note], most: int = 20) -> None:
    for note in notes[:most]:
        print(f"{note.what:9} {note.split:6} {note.origin}: {note.cause}")
    if len(notes) > most:
        print(f"... and {len(notes) - most} more")


def _counts(made: DatasetManifest) -> str:
    parts = [f"{name} {split.samples:,} samples in {len(split.shards)} shards" for name, split in made.splits.items()]
    size = sum(split.bytes for split in made.splits.values())
    return f"{', '.join(parts)}, {len(made.classes)} classes, {size / 1e6:,.1f} MB"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make_shards", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except WdsTrainError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
