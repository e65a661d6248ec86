"""`wds-train shards`: a dataset becomes tar shards on S3, once."""

import argparse
import logging
import os
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from shards.convert import Conversion
from shards.estimate import print_plan
from shards.executors import counted, dask_address, opened, prepare, run_tasks
from shards.images import ImagePolicy
from shards.index_in_place import ANY, ANY_TOO, index_in_place, write_dataset
from shards.overlap import refuse_overlap
from shards.pack import Counts, ShardDone
from shards.plan import Options, Plan
from shards.report import judge, print_notes, report_json, say
from shards.sources.base import Source, Wanted
from shards.sources.labels import classes_of
from shards.sources.open import DIGITS, FORMATS, name_of, open_source, source_root
from shards.sources.spool import Spool
from wds_train.config.numbers import Number, above_zero, positive, whole
from wds_train.errors import DataError, Interrupted, UsageError
from wds_train.format.index import WHOLE_INDEX_SAMPLES
from wds_train.format.manifest import DatasetManifest
from wds_train.home import home
from wds_train.storage.address import announced, located
from wds_train.storage.open import open_store
from wds_train.tracking.console import LOG, Meter, note

MIB = 1 << 20
INDEX = "index"
HELD_OUT = 0.1  # of each class, where a source has no val split
SHARE = Number(float, 0, 1, open=")")
SHOWN = 8  # classes that are named before the work


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help=f"a path, {DIGITS}, hf:ID, torchvision:CLASS, wds:PATH, or {INDEX}: see docs/shards.md",
    )
    add(
        "dataset",
        metavar="DATASET",
        nargs="?",
        help="s3://bucket/prefix, a directory (/... or ./...), or a name below the bucket",
    )
    add("--source", dest="form", choices=sorted(FORMATS), help="the format of SOURCE, when it is not recognised")
    add("--bucket", help="s3://bucket/prefix: a name is then datasets/NAME below it ($WDS_BUCKET)")
    add("--seed", type=whole, default=0, help="of the shuffle over the whole source (%(default)s)")
    add("--shard-mb", type=above_zero, default=128, help="largest shard, in MiB (%(default)s)")
    add(
        "--whole-index",
        type=positive,
        default=WHOLE_INDEX_SAMPLES,
        metavar="SAMPLES",
        help="a split of more samples has an index for each shard, read when needed (%(default)s)",
    )
    add("--resize-shorter", type=positive, metavar="PX", help="encode images anew whose shorter side is longer")
    add("--quality", type=Number(int, 1, 100), default=90, help="of JPEGs that are encoded anew (%(default)s)")
    add("--reencode", action="store_true", help="take BMP, GIF, TIFF and AVIF too, encoded anew as JPEG of --quality")
    add("--image-column", metavar="NAME", help="of a table: the column of the files or images")
    add("--label-column", metavar="NAME", help="of a table: the column of the labels")
    add("--verify", choices=("header", "full"), default="header", help="how images are checked (%(default)s)")
    add(
        "--max-bad",
        type=SHARE,
        default=0.0,
        metavar="SHARE",
        help="share of samples that may be left out (%(default)s)",
    )
    add(
        "--hold-out",
        type=SHARE,
        metavar="SHARE",
        help=f"of each class of train: the val split of a source that has none ({HELD_OUT}; 0 keeps none)",
    )
    add(
        "--processes",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        help="shards made side by side (%(default)s)",
    )
    add(
        "--executor",
        type=dask_address,
        metavar="dask://HOST:PORT",
        help="make the shards on a Dask cluster that sees SOURCE",
    )
    add("--spool", type=Path, help="local folder for images that come as a stream (.wds/spool)")
    add("--spool-gb", type=above_zero, default=50, help="most that it may hold; less means more passes (%(default)s)")
    add("--any", action="store_true", help=f"of {INDEX}: samples that hold anything, images or not; see docs/loader.md")
    add("--overwrite", action="store_true", help="replace a dataset made with other settings")
    add("--dry-run", action="store_true", help="print the plan, its time and its cost, and write nothing")


def run(args: argparse.Namespace) -> int:
    if args.any and args.source != INDEX:
        raise UsageError("--any is of `wds-train shards index`; leave it out: other sources are of images")
    if args.source == INDEX:
        return _index(args)
    if args.processes > 1 and not (args.executor or args.dry_run):
        prepare()
    wanted_at = name_of(args.source) if args.dataset is None else args.dataset
    url = announced(located(wanted_at, "datasets", args.bucket), wanted_at)
    store = open_store(url)
    root = source_root(args.source)
    refuse_overlap(root, store)
    if root is None or os.path.exists(root):  # noqa: PTH110 (a Path would raise where it may not look)
        note(f"reading {args.source} ...")
    began = time.monotonic()
    with Spool(args.spool or home() / "spool", url, int(args.spool_gb * 1e9)) as spool:
        wanted = Wanted(args.image_column, args.label_column, args.reencode)
        source = open_source(args.source, spool, args.form, wanted)
        plan = Plan(source, _options(args, source))
        met = source.samples + sum(note.what == "left out" for note in source.notes)
        judge(source.notes, met, args.max_bad)
        if LOG.isEnabledFor(logging.INFO):
            _print_understood(plan)
        if args.dry_run:
            print_plan(plan, args.processes)
            return 0
        conversion = Conversion(plan, store)
        done = conversion.begin(overwrite=args.overwrite)
        if done is None:
            say(f"{store.url} is complete already: {_counts(conversion.complete())}")
            return 0
        done = _convert(conversion, done, args)
        notes = source.notes + [note for part in done for note in part.notes]
        judge(notes, met, args.max_bad)
        made = conversion.finish(done)
    print_notes(notes, made.report.name if made.report else "")
    say(f"{store.url}: {_counts(made)}, in {time.monotonic() - began:.0f} s")
    say(f"fingerprint {made.fingerprint}")
    return 0


def _print_understood(plan: Plan) -> None:
    """Print what the source was taken for, before the work: a person sees at once when it is not what it is."""
    source, share = plan.source, plan.options.hold_out
    names = ", ".join(entry.name.partition(",")[0] for entry in source.classes[:SHOWN])
    counts = ", ".join(f"{split} {rows.num_rows:,}" for split, rows in source.splits.items())
    say(
        f"{source.description}: {len(source.classes)} classes ({names}{', ...' if source.classes[SHOWN:] else ''}); {counts}"
    )
    if share:
        say(f"val is {share:.0%} of each class of train, held out; --hold-out sets another share, 0 keeps none")
    elif "val" not in source.splits:
        say("there is no val split, which training needs: --hold-out 0.1 keeps a tenth of each class for one")


def _options(args: argparse.Namespace, source: Source) -> Options:
    policy = ImagePolicy(args.resize_shorter, args.quality, args.verify, args.reencode)
    share = args.hold_out
    if share is None:
        share = HELD_OUT if "train" in source.splits and "val" not in source.splits else 0.0
    return Options(args.seed, int(args.shard_mb * MIB), policy, share, args.whole_index)


def _convert(conversion: Conversion, done: list[ShardDone], args: argparse.Namespace) -> list[ShardDone]:
    """All shards: those `done`, and the rest, made now."""
    finished = {(part.split, part.number) for part in done}
    missing = sum(map(len, conversion.plan.parts.values())) - len(finished)
    if finished:
        note(f"{len(finished)} of {len(finished) + missing} shards are finished already")
    plan, processes = conversion.plan, min(args.processes, missing)
    size = sum(plan.size(split, number) for split, parts in plan.parts.items() for number in range(len(parts)))
    counts = counted(0 if args.executor else processes)
    try:
        with (
            opened(args.executor, processes, counts) as (executor, at_once),
            Meter(size, plan.source.samples) as meter,
            meter.following(lambda: counts.values),
        ):
            for part in done:
                _count(plan, counts, part)
            for tasks in conversion.tasks(finished):
                for part in run_tasks(executor, tasks, 2 * at_once):
                    done.append(part)
                    LOG.debug("uploaded %s, %.1f MB", part.shard.name, part.shard.bytes / 1e6)
                    if args.executor:
                        _count(plan, counts, part)
    except BrokenProcessPool as error:
        raise DataError("a worker process died, out of memory perhaps; run again with fewer --processes") from error
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped; {len(done)} shards are finished: run the same command to go on") from error
    return done


def _count(plan: Plan, counts: Counts, part: ShardDone) -> None:
    counts.add(plan.size(part.split, part.number), len(plan.parts[part.split][part.number]))


def _counts(made: DatasetManifest) -> str:
    parts = [
        f"{name} {split.samples:,} samples in {len(split.shards)} shard{'s' * (len(split.shards) != 1)}"
        for name, split in made.splits.items()
    ]
    size = sum(split.bytes for split in made.splits.values())
    return f"{', '.join(parts)}, {len(made.classes)} classes, {size / 1e6:,.1f} MB"


def _index(args: argparse.Namespace) -> int:
    if args.dataset is None:
        raise UsageError("index needs the address of the tars: wds-train shards index s3://bucket/prefix")
    store = open_store(announced(located(args.dataset, "datasets", args.bucket), args.dataset))
    note(f"reading the tars of {store.url} ...")
    splits, notes = index_in_place(store, None if args.any else ImagePolicy(verify=args.verify))
    samples = sum(len(found.rows) for found in splits.values())
    left_out = sum(note.what == "left out" for note in notes)
    if not samples + left_out:
        raise DataError(f"the tars of {store.url} hold no samples with an image and a label; {ANY_TOO}")
    judge(notes, samples + left_out, args.max_bad)
    print_notes(notes)
    labels = {row["label"] for found in splits.values() for row in found.rows}
    classes, numbers = classes_of(labels, samples, store.url)
    for row in (row for found in splits.values() for row in found.rows):
        row["label"] = numbers[row["label"]]
    if args.dry_run:
        return 0
    made = write_dataset(
        store, splits, classes, {ANY: True} if args.any else {}, report_json(notes, 0), overwrite=args.overwrite
    )
    say(f"{store.url}: {_counts(made)}\nfingerprint {made.fingerprint}")
    return 0


def main() -> int:
    from wds_train.cli import main as wds_train  # which imports this module

    return wds_train(["shards", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
