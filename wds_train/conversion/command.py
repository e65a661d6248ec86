"""`wds-train shards`: a dataset becomes tar shards on S3, once."""

import argparse
import contextlib
import logging
import os
import sys
import time
from array import array
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace

import numpy as np

from wds_train.console import LOG, Meter, note
from wds_train.conversion.conversion_report import Note, judge, print_notes, report_json, say
from wds_train.conversion.convert import Conversion
from wds_train.conversion.estimate import print_plan
from wds_train.conversion.executors import make_counts, open_executor, run_tasks, start_fork_server
from wds_train.conversion.image_policy import ImagePolicy
from wds_train.conversion.index_in_place import ANY, ANY_TOO, Indexed, index_in_place, repeats_in_place, write_dataset
from wds_train.conversion.overlap import refuse_overlap
from wds_train.conversion.pack import WIP, Counts, ShardDone
from wds_train.conversion.repeats import repeat_lines
from wds_train.conversion.shard_plan import Options, Plan
from wds_train.conversion.source_flags import HELD_OUT, INDEX, add_arguments, read_wanted, refuse_unmet
from wds_train.conversion.source_summary import Reading, describe_reading, print_reading, print_understood
from wds_train.conversion.sources.detect import name_of, open_source, source_root
from wds_train.conversion.sources.labels import NO_LABEL, Classes, LabelRules, classes_of, count_texts, parse_class_list
from wds_train.conversion.sources.scan import UNLABELED
from wds_train.conversion.sources.source import Grouping, Source, Understood
from wds_train.conversion.sources.spool import Spool
from wds_train.conversion.sources.tars import CLASS_LISTS, tar_classes
from wds_train.dataset.manifest import DatasetManifest
from wds_train.errors import DataError, Interrupted, NotFound, UsageError
from wds_train.files import home
from wds_train.storage.address import announced, located
from wds_train.storage.base import Store
from wds_train.storage.open import open_store
from wds_train.storage.proof import prove

__all__ = ["add_arguments", "main", "run"]

MIB = 1 << 20


def run(args: argparse.Namespace) -> int:
    if args.any and args.source != INDEX:
        raise UsageError("--any is of `wds-train shards index`; leave it out: other sources are of images")
    if args.source == INDEX:
        return _index(args)
    wanted = read_wanted(args)
    if args.processes > 1 and not (args.executor or args.dry_run):
        start_fork_server()
    wanted_at = name_of(args.source) if args.dataset is None else args.dataset
    url = announced(located(wanted_at, "datasets", args.bucket), wanted_at)
    store = open_store(url)
    root = source_root(args.source)
    refuse_overlap(root, store)
    if root is None or os.path.exists(root):  # noqa: PTH110 (a Path would raise where it may not look)
        note(f"reading {args.source} ...")
    began = time.monotonic()
    with Spool(args.spool or home() / "spool", url, int(args.spool_gb * 1e9)) as spool:
        source = _with_group(open_source(args.source, spool, args.form, wanted), args)
        refuse_unmet(wanted, args.source)
        plan = Plan(source, _options(args, source))
        met = source.samples + sum(note.what == "left out" for note in source.notes)
        if LOG.isEnabledFor(logging.INFO):
            print_understood(plan)
        judge(source.notes, met, args.max_bad)
        if args.dry_run:
            print_plan(plan, args.processes)
            return 0
        conversion = Conversion(plan, store)
        done = conversion.begin(overwrite=args.overwrite, unsafe=args.unsafe_store)
        if done is None:
            say(f"{store.url} is complete already: {_counts(conversion.complete())}")
            return 0
        done = _convert(conversion, done, args)
        notes = source.notes + [note for part in done for note in part.notes]
        judge(notes, met, args.max_bad)
        made = conversion.finish(done)
    print_notes(notes, made.report.name if made.report else "")
    for line in repeat_lines(conversion.repeats, held_out=bool(plan.options.hold_out)):
        say(line)
    say(f"{store.url}: {_counts(made)}, in {time.monotonic() - began:.0f} s")
    say(f"fingerprint {made.fingerprint}")
    return 0


def _options(args: argparse.Namespace, source: Source) -> Options:
    policy = ImagePolicy(args.resize_shorter, args.quality, args.verify, args.reencode)
    share = args.hold_out
    if share is None:
        share = HELD_OUT if "train" in source.splits and "val" not in source.splits else 0.0
    return Options(args.seed, int(args.shard_mb * MIB), policy, share, args.whole_index, args.group or "")


def _with_group(source: Source, args: argparse.Namespace) -> Source:
    """Return the `source` with what --group says: a column of its table, else a pattern of its paths."""
    if args.group is None:
        return source
    if "val" in source.splits or args.hold_out == 0:
        there = ", ".join(source.splits)
        raise UsageError(
            f"{source.description} has {there}: nothing is held out, so leave --group away; or leave val out: --split val=none"
        )
    if source.grouping is not None:
        return source
    root = source_root(args.source)
    return replace(source, grouping=Grouping(args.group, root=str(root.resolve()) if root else ""))


def _convert(conversion: Conversion, done: list[ShardDone], args: argparse.Namespace) -> list[ShardDone]:
    """All shards: those `done`, and the rest, made now."""
    finished = {(part.split, part.number) for part in done}
    missing = sum(map(len, conversion.plan.parts.values())) - len(finished)
    if finished:
        note(f"{len(finished)} of {len(finished) + missing} shards are finished already")
    plan, processes = conversion.plan, min(args.processes, missing)
    size = sum(plan.size(split, number) for split, parts in plan.parts.items() for number in range(len(parts)))
    counts = make_counts(0 if args.executor else processes)
    try:
        with (
            open_executor(args.executor, processes, counts) as (executor, at_once),
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
    wanted = read_wanted(args)
    _refuse_unheeded(args)
    if not args.dry_run:  # before the hours that reading may take
        prove(store, WIP, say, unsafe=args.unsafe_store)
    note(f"reading the tars of {store.url} ...")
    splits, notes = index_in_place(store, None if args.any else ImagePolicy(verify=args.verify), wanted.splits)
    refuse_unmet(wanted, store.url)
    samples = sum(len(found.rows) for found in splits.values())
    left_out = sum(note.what == "left out" for note in notes)
    if not samples + left_out:
        raise DataError(f"the tars of {store.url} hold no samples with an image and a label; {ANY_TOO}")
    judge(notes, samples + left_out, args.max_bad)
    print_notes(notes)
    counts = count_texts(row["label"] for found in splits.values() for row in found.rows)
    if args.any:
        classes = classes_of(counts, store.url, wanted.labels)
    else:
        rules, listed = _listed_classes(store, wanted.labels)
        classes = tar_classes(counts, store.url, rules, listed)
    for split, found in splits.items():
        _number_labels(found, classes)
        notes += [Note(split, key, "ignored", UNLABELED) for key in _drop_unlabeled(found)]
    reading = _read_tars(store.url, splits, classes, notes)
    print_reading(reading)
    if args.dry_run:
        return 0
    twice = None if args.any else repeats_in_place(splits, classes.infos)
    extra: dict[str, object] = {"understood": describe_reading(reading)}
    if twice is not None:
        extra["repeats"] = asdict(twice)
    report = report_json(notes, 0, extra)
    policy = {ANY: True} if args.any else {}
    made = write_dataset(store, splits, classes.infos, policy, report, overwrite=args.overwrite)
    for line in repeat_lines(twice, held_out=False) if twice else []:
        say(line)
    say(f"{store.url}: {_counts(made)}\nfingerprint {made.fingerprint}")
    return 0


def _refuse_unheeded(args: argparse.Namespace) -> None:
    """Raise `UsageError` for flags that mean nothing where tars are indexed: they would be dropped in silence."""
    given = {
        "--table": args.table,
        "--image-column": args.image_column,
        "--label-column": args.label_column,
        "--split-column": args.split_column,
        "--class-level": args.class_level,
        "--source": args.form,
        "--hold-out": args.hold_out,
        "--group": args.group,
        "--resize-shorter": args.resize_shorter,
        "--reencode": args.reencode or None,
    }
    unheeded = [flag for flag, value in given.items() if value is not None]
    if unheeded:
        raise UsageError(
            f"{unheeded[0]} says nothing of tars that stay as they are; leave it out, or convert them: wds-train shards wds:PATH"
        )


def _listed_classes(store: Store, rules: LabelRules) -> tuple[LabelRules, str]:
    """Return the `rules` with the list of classes that lies beside the tars, if a person gave none; and its name."""
    for name in () if rules.classes else CLASS_LISTS:
        with contextlib.suppress(NotFound):
            return replace(rules, classes=parse_class_list(store.read(name), f"{store.url}/{name}")), name
    return rules, ""


def _read_tars(url: str, splits: dict[str, Indexed], classes: Classes, notes: list[Note]) -> Reading:
    """Return how tars that stay where they are were read; their labels are numbers already."""
    counts = {
        split: np.bincount([row["label"] for row in found.rows], minlength=len(classes.infos))
        for split, found in splits.items()
    }
    said = [*classes.said, *(note.cause for note in notes if note.what == "kept" and not note.split)]
    holds_anything = [entry.id for entry in classes.infos] == [ANY]
    labels = "none: samples may hold anything" if holds_anything else "the members .cls, .json and their like"
    understood = Understood("WebDataset tars, indexed in place", labels, said)
    return Reading(f"the tars of {url}", classes.infos, counts, notes, understood)


def _number_labels(found: Indexed, classes: Classes) -> None:
    """Put each label's number in the place of its text."""
    for row in found.rows:
        row["label"] = classes.numbers[row["label"]]


def _drop_unlabeled(found: Indexed) -> list[str]:
    """Leave the samples without a label out of the index; return their keys."""
    dropped = [row["key"] for row in found.rows if row["label"] == NO_LABEL]
    if dropped:
        kept = [number for number, row in enumerate(found.rows) if row["label"] != NO_LABEL]
        found.digests = array("Q", (found.digests[number] for number in kept))
        found.rows = [found.rows[number] for number in kept]
        samples = Counter(row["shard"] for row in found.rows)
        found.shards = [replace(shard, samples=samples[number]) for number, shard in enumerate(found.shards)]
    return dropped


def main() -> int:
    from wds_train.cli import main as wds_train  # which imports this module

    return wds_train(["shards", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
