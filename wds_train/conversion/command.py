"""Convert a source to a dataset of tar shards: `wds-train shards`."""

import argparse
import contextlib
import logging
import os
import time
from array import array
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace

import numpy as np

from wds_train.console import LOG, Meter, note
from wds_train.conversion.conversion_report import (
    Note,
    judge,
    print_notes,
    report_json,
    say,
    select_left_out,
)
from wds_train.conversion.convert import Conversion
from wds_train.conversion.estimate import print_plan
from wds_train.conversion.executors import make_counts, open_executor, run_tasks, start_fork_server
from wds_train.conversion.image_policy import ImagePolicy
from wds_train.conversion.index_in_place import (
    ANY,
    ANY_TOO,
    Indexed,
    index_in_place,
    repeats_in_place,
    write_dataset,
)
from wds_train.conversion.overlap import refuse_overlap
from wds_train.conversion.pack import WIP, Counts, ShardDone
from wds_train.conversion.repeats import repeat_lines
from wds_train.conversion.shard_plan import Options, Plan
from wds_train.conversion.source_flags import (
    HELD_OUT,
    INDEX,
    add_arguments,
    read_wanted,
    refuse_unmet,
)
from wds_train.conversion.source_summary import (
    Reading,
    describe_reading,
    print_reading,
    print_understood,
)
from wds_train.conversion.sources.detect import name_of, open_source, source_root
from wds_train.conversion.sources.labels import (
    NO_LABEL,
    Classes,
    LabelRules,
    classes_of,
    count_texts,
    parse_class_list,
)
from wds_train.conversion.sources.scan import UNLABELED
from wds_train.conversion.sources.source import Grouping, Source, Understood, Wanted
from wds_train.conversion.sources.spool import Spool
from wds_train.conversion.sources.tars import CLASS_LISTS, tar_classes
from wds_train.dataset.manifest import DatasetManifest
from wds_train.errors import DataError, Interrupted, NotFound, UsageError
from wds_train.files import home
from wds_train.storage.address import announce_embedded, resolve_address
from wds_train.storage.base import Store
from wds_train.storage.open import open_store
from wds_train.storage.proof import prove

__all__ = ["add_arguments", "run"]

MIB = 1 << 20


def run(args: argparse.Namespace) -> int:
    """Run `wds-train shards` with the parsed flags, and return the exit status.

    Raises:
        UsageError: The source or the destination cannot be used as the flags say.
        DataError: The source cannot be read, or holds too many unreadable samples.
    """
    if args.any and args.source != INDEX:
        raise UsageError(
            "--any is of `wds-train shards index`; leave it out: other sources are of images"
        )
    if args.source == INDEX:
        return _index(args)

    # Find the destination, and refuse one that overlaps the source.
    wanted = read_wanted(args)
    if args.processes > 1 and not (args.executor or args.dry_run):
        start_fork_server()
    name = name_of(args.source) if args.dataset is None else args.dataset
    url = resolve_address(name, "datasets", args.bucket)
    announce_embedded(url, name)
    store = open_store(url)
    root = source_root(args.source)
    refuse_overlap(root, store)
    # A Path would raise where it may not look.
    if root is None or os.path.exists(root):  # noqa: PTH110
        note(f"reading {args.source} ...")

    began = time.monotonic()
    with Spool(args.spool or home() / "spool", url, int(args.spool_gb * 1e9)) as spool:
        # Read the source, and see whether it can be used.
        source = _with_group(open_source(args.source, spool, args.form, wanted), args)
        refuse_unmet(wanted, args.source)
        plan = Plan(source, _options(args, source))
        found = source.samples + len(select_left_out(source.notes))
        if LOG.isEnabledFor(logging.INFO):
            print_understood(plan)
        judge(source.notes, found, args.max_bad)
        if args.dry_run:
            print_plan(plan, args.processes)
            return 0

        # Make the shards that are missing, then the dataset.
        conversion = Conversion(plan, store)
        done = conversion.begin(overwrite=args.overwrite, unsafe=args.unsafe_store)
        if done is None:
            say(f"{store.url} is complete already: {_describe(conversion.complete())}")
            return 0
        done = _convert(conversion, done, args)
        notes = list(source.notes)
        for part in done:
            notes += part.notes
        judge(notes, found, args.max_bad)
        made = conversion.finish(done)

    _print_made(conversion, made, notes, time.monotonic() - began)
    return 0


def _print_made(
    conversion: Conversion, made: DatasetManifest, notes: list[Note], seconds: float
) -> None:
    """Print what the dataset lacks, what it holds twice, and what it is."""
    print_notes(notes, made.report.name if made.report else "")
    held_out = bool(conversion.plan.options.hold_out)
    for line in repeat_lines(conversion.repeats, held_out=held_out):
        say(line)
    say(f"{conversion.store.url}: {_describe(made)}, in {seconds:.0f} s")
    say(f"fingerprint {made.fingerprint}")


def _options(args: argparse.Namespace, source: Source) -> Options:
    """Return the plan's options; --hold-out depends by default on the source's splits."""
    share = args.hold_out
    if share is None:
        share = 0.0
        if "train" in source.splits and "val" not in source.splits:
            share = HELD_OUT
    return Options(
        seed=args.seed,
        shard_bytes=int(args.shard_mb * MIB),
        policy=ImagePolicy(args.resize_shorter, args.quality, args.verify, args.reencode),
        hold_out=share,
        whole_index=args.whole_index,
        group=args.group or "",
    )


def _with_group(source: Source, args: argparse.Namespace) -> Source:
    """Return the source grouped as --group says: by a column of its table, or a pattern of paths.

    Raises:
        UsageError: Nothing is held out of this source.
    """
    if args.group is None:
        return source
    if "val" in source.splits or args.hold_out == 0:
        there = ", ".join(source.splits)
        raise UsageError(
            f"{source.description} has {there}: nothing is held out, so leave --group away; "
            "or leave val out: --split val=none"
        )
    if source.grouping is not None:
        return source
    # A pattern is of paths below the source, wherever that is.
    place = ""
    root = source_root(args.source)
    if root is not None:
        place = str(root.resolve())
    return replace(source, grouping=Grouping(args.group, root=place))


def _convert(
    conversion: Conversion, done: list[ShardDone], args: argparse.Namespace
) -> list[ShardDone]:
    """Make all shards that are not `done`, and show the progress.

    Returns:
        All shards.

    Raises:
        DataError: A worker process died.
        Interrupted: Ctrl-C was pressed.
    """
    plan = conversion.plan
    finished = {(part.split, part.number) for part in done}

    # Count the shards that are missing, and the bytes of all.
    shards = 0
    size = 0
    for split, parts in plan.parts.items():
        shards += len(parts)
        for number in range(len(parts)):
            size += plan.size(split, number)
    missing = shards - len(finished)
    if finished:
        note(f"{len(finished)} of {shards} shards are finished already")

    # Make them, twice as many in flight as are made at once, so that no process waits for a task.
    processes = min(args.processes, missing)
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
                    if args.executor:  # a cluster's workers add to no counts
                        _count(plan, counts, part)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died, out of memory perhaps; run again with fewer --processes"
        ) from error
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"stopped; {len(done)} shards are finished: run the same command to go on"
        ) from error
    return done


def _count(plan: Plan, counts: Counts, part: ShardDone) -> None:
    """Add a whole shard to the counts."""
    counts.add(plan.size(part.split, part.number), len(plan.parts[part.split][part.number]))


def _describe(made: DatasetManifest) -> str:
    """Return a dataset's splits, classes and size in words."""
    parts = []
    size = 0
    for name, split in made.splits.items():
        plural = "" if len(split.shards) == 1 else "s"
        parts.append(f"{name} {split.samples:,} samples in {len(split.shards)} shard{plural}")
        size += split.bytes
    return f"{', '.join(parts)}, {len(made.classes)} classes, {size / 1e6:,.1f} MB"


def _index(args: argparse.Namespace) -> int:
    """Run `wds-train shards index`: index tars where they are."""
    if args.dataset is None:
        raise UsageError(
            "index needs the address of the tars: wds-train shards index s3://bucket/prefix"
        )
    url = resolve_address(args.dataset, "datasets", args.bucket)
    announce_embedded(url, args.dataset)
    store = open_store(url)
    wanted = read_wanted(args)
    _refuse_unheeded(args)
    if not args.dry_run:  # before the hours that reading may take
        prove(store, WIP, say, unsafe=args.unsafe_store)

    # Read the tars, and see whether they can be used.
    splits, notes = _read_usable(store, wanted, args)

    # Number the classes.
    classes = _find_classes(store, splits, wanted.labels, holds_anything=args.any)
    for split, found in splits.items():
        _number_labels(found, classes)
        for key in _drop_unlabeled(found):
            notes.append(Note(split, key, "ignored", UNLABELED))
    reading = _reading_of_tars(store.url, splits, classes, notes)
    print_reading(reading)
    if args.dry_run:
        return 0

    # Write index, report and manifest.
    lines: list[str] = []
    extra: dict[str, object] = {"understood": describe_reading(reading)}
    image_policy = {ANY: True}
    if not args.any:
        image_policy = {}
        repeats = repeats_in_place(splits, classes.infos)
        extra["repeats"] = asdict(repeats)
        lines = repeat_lines(repeats, held_out=False)
    report = report_json(notes, 0, extra)
    made = write_dataset(
        store, splits, classes.infos, image_policy, report, overwrite=args.overwrite
    )
    for line in lines:
        say(line)
    say(f"{store.url}: {_describe(made)}\nfingerprint {made.fingerprint}")
    return 0


def _read_usable(
    store: Store, wanted: Wanted, args: argparse.Namespace
) -> tuple[dict[str, Indexed], list[Note]]:
    """Read the tars of `store`, and print what is odd about them.

    Returns:
        The index of each split, whose labels are still texts, and all notes.

    Raises:
        DataError: There are no samples, or too many of them are unreadable.
    """
    note(f"reading the tars of {store.url} ...")
    policy = None if args.any else ImagePolicy(verify=args.verify)
    splits, notes = index_in_place(store, policy, wanted.splits)
    refuse_unmet(wanted, store.url)
    samples = len(select_left_out(notes))
    for found in splits.values():
        samples += len(found.rows)
    if not samples:
        raise DataError(
            f"the tars of {store.url} hold no samples with an image and a label; {ANY_TOO}"
        )
    judge(notes, samples, args.max_bad)
    print_notes(notes)
    return splits, notes


def _refuse_unheeded(args: argparse.Namespace) -> None:
    """Raise `UsageError` for flags that mean nothing where tars are indexed.

    They would be dropped in silence.
    """
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

    # None is the default of all of them.
    unheeded = [flag for flag, value in given.items() if value is not None]
    if unheeded:
        raise UsageError(
            f"{unheeded[0]} says nothing of tars that stay as they are; leave it out, "
            "or convert them: wds-train shards wds:PATH"
        )


def _find_classes(
    store: Store, splits: dict[str, Indexed], rules: LabelRules, *, holds_anything: bool
) -> Classes:
    """Find the classes of indexed tars, whose labels are still texts."""
    texts = []
    for found in splits.values():
        texts += [row["label"] for row in found.rows]
    counts = count_texts(texts)
    if holds_anything:
        return classes_of(counts, store.url, rules)
    rules, listed = _listed_classes(store, rules)
    return tar_classes(counts, store.url, rules, listed)


def _listed_classes(store: Store, rules: LabelRules) -> tuple[LabelRules, str]:
    """Return the rules with the classes of a list that lies beside the tars, and its name.

    If a person gave classes, or there is no list, the rules stay, and the name is empty.
    """
    if rules.classes:
        return rules, ""
    for name in CLASS_LISTS:
        with contextlib.suppress(NotFound):
            classes = parse_class_list(store.read(name), f"{store.url}/{name}")
            return replace(rules, classes=classes), name
    return rules, ""


def _reading_of_tars(
    url: str, splits: dict[str, Indexed], classes: Classes, notes: list[Note]
) -> Reading:
    """Return how tars that stay where they are were read; their labels are numbers already."""
    counts = {}
    for split, found in splits.items():
        labels = [row["label"] for row in found.rows]
        counts[split] = np.bincount(labels, minlength=len(classes.infos))

    # Remarks on all tars together belong to no split.
    remarks = []
    for entry in notes:
        if entry.what == "kept" and not entry.split:
            remarks.append(entry.cause)
    labels_from = "the members .cls, .json and their like"
    if len(classes.infos) == 1 and classes.infos[0].id == ANY:
        labels_from = "none: samples may hold anything"
    understood = Understood(
        "WebDataset tars, indexed in place", labels_from, [*classes.said, *remarks]
    )
    return Reading(f"the tars of {url}", classes.infos, counts, notes, understood)


def _number_labels(found: Indexed, classes: Classes) -> None:
    """Replace each label's text by its number."""
    for row in found.rows:
        row["label"] = classes.numbers[row["label"]]


def _drop_unlabeled(found: Indexed) -> list[str]:
    """Remove the samples without a label from the index, and return their keys."""
    # Keep the rows with a label, and count them for each tar.
    dropped = []
    rows = []
    digests = array("Q")
    samples = [0] * len(found.shards)
    for row, digest in zip(found.rows, found.digests, strict=True):
        if row["label"] == NO_LABEL:
            dropped.append(row["key"])
        else:
            rows.append(row)
            digests.append(digest)
            samples[row["shard"]] += 1
    if dropped:
        found.rows = rows
        found.digests = digests
        for number, shard in enumerate(found.shards):
            found.shards[number] = replace(shard, samples=samples[number])
    return dropped
