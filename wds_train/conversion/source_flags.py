"""Define the flags of `wds-train shards`, and read those that are about the source."""

import argparse
import re
from pathlib import Path
from typing import Any

from wds_train.config.numbers import Number, above_zero, positive, whole, with_range
from wds_train.conversion.executors import parse_dask_address
from wds_train.conversion.sources.detect import DIGITS, FORMATS
from wds_train.conversion.sources.labels import LabelRules, read_class_list
from wds_train.conversion.sources.names import NO_SPLIT, SPLITS, SaidSplits
from wds_train.conversion.sources.source import Wanted
from wds_train.conversion.sources.table import NO_COLUMN
from wds_train.dataset.index import WHOLE_INDEX_SAMPLES
from wds_train.dataset.manifest import ClassInfo
from wds_train.errors import UsageError
from wds_train.machine import cores
from wds_train.storage.proof import UNSAFE_HELP

INDEX = "index"
HELD_OUT = 0.1  # of each class, if a source has no val split
SHARE = Number(float, 0, 1, open=")")  # all of it would leave nothing to train on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments and flags of `wds-train shards` to `parser`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help=f"a path, {DIGITS}, hf:ID, torchvision:CLASS, wds:PATH, or {INDEX}: "
        "see docs/shards.md",
    )
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        nargs="?",
        help="s3://bucket/prefix, a directory (/... or ./...), or a name below the bucket",
    )
    parser.add_argument(
        "--bucket", help="s3://bucket/prefix: a name is then datasets/NAME below it ($WDS_BUCKET)"
    )
    _add_reading(parser.add_argument_group("how SOURCE is read"))
    _add_labels(parser.add_argument_group("classes and splits"))
    _add_images(parser.add_argument_group("images"))
    _add_writing(parser.add_argument_group("how DATASET is made"))


def _add_reading(group: "argparse._ArgumentGroup") -> None:
    def add(*names: str, **options: Any) -> None:
        group.add_argument(*names, **with_range(options))

    # The format.
    add(
        "--source",
        dest="form",
        choices=sorted(FORMATS),
        help="the format of SOURCE, when it is not recognised",
    )

    # Tables of labels.
    add(
        "--table",
        type=Path,
        metavar="FILE",
        help="the table that labels the images, where several could, or it lies elsewhere",
    )
    add("--image-column", metavar="NAME", help="of a table: the column of the files or images")
    add("--label-column", metavar="NAME", help="of a table: the column of the labels")
    add(
        "--split-column",
        metavar="NAME",
        help=f"of a table: the column that says train, val or test; {NO_COLUMN} for no column",
    )

    # Splits by other names.
    add(
        "--split",
        action="append",
        default=[],
        metavar="WORD=SPLIT",
        help=f"what a folder, file or cell called WORD is: {', '.join(SPLITS)}, "
        f"or {NO_SPLIT} to leave it out; may be repeated",
    )


def _add_labels(group: "argparse._ArgumentGroup") -> None:
    def add(*names: str, **options: Any) -> None:
        group.add_argument(*names, **with_range(options))

    # Classes, and what is none.
    add(
        "--classes",
        type=Path,
        metavar="FILE",
        help="the classes in their order: a name a line, JSON, a dataset's manifest.json, "
        "or what inspect --json prints",
    )
    add(
        "--class-level",
        type=positive,
        metavar="N",
        help="the folders N levels below SOURCE, or below a split's folder, name the classes",
    )
    add(
        "--label-case",
        choices=("fold", "keep"),
        default="",
        help="labels that differ in case or blanks only: one class (fold), or several (keep)",
    )
    add(
        "--no-label",
        action="append",
        default=[],
        metavar="TEXT",
        help="a label that says there is none, such as -100 or NA; may be repeated",
    )

    # A val split, if there is none.
    add(
        "--hold-out",
        type=SHARE,
        metavar="SHARE",
        help="of each class of train: the val split of a source that has none "
        f"({HELD_OUT}; 0 keeps none)",
    )
    add(
        "--group",
        metavar="COLUMN|REGEX",
        help="hold out whole groups: a table's column (patient_id), "
        "or a pattern of paths whose first group names them",
    )
    add(
        "--any",
        action="store_true",
        help=f"of {INDEX}: samples that hold anything, images or not; see docs/loader.md",
    )


def _add_images(group: "argparse._ArgumentGroup") -> None:
    def add(*names: str, **options: Any) -> None:
        group.add_argument(*names, **with_range(options))

    # Encoding.
    add(
        "--resize-shorter",
        type=positive,
        metavar="PX",
        help="encode images again whose shorter side is longer",
    )
    add(
        "--quality",
        type=Number(int, 1, 100),
        default=90,
        help="of JPEGs that are encoded again (%(default)s)",
    )
    add(
        "--reencode",
        action="store_true",
        help="take BMP, GIF, TIFF and AVIF too, encoded again as JPEG of --quality",
    )

    # Checks.
    add(
        "--verify",
        choices=("header", "full"),
        default="header",
        help="how images are checked (%(default)s)",
    )
    add(
        "--max-bad",
        type=SHARE,
        default=0.0,
        metavar="SHARE",
        help="share of samples that may be left out (%(default)s)",
    )


def _add_writing(group: "argparse._ArgumentGroup") -> None:
    def add(*names: str, **options: Any) -> None:
        group.add_argument(*names, **with_range(options))

    # The bytes of the dataset.
    add("--seed", type=whole, default=0, help="of the shuffle over the whole source (%(default)s)")
    add("--shard-mb", type=above_zero, default=128, help="largest shard, in MiB (%(default)s)")
    add(
        "--whole-index",
        type=positive,
        default=WHOLE_INDEX_SAMPLES,
        metavar="SAMPLES",
        help="a split of more samples has an index for each shard, read when needed (%(default)s)",
    )

    # Where the work is done.
    add(
        "--processes",
        type=positive,
        default=cores(),
        help="shards made side by side (%(default)s)",
    )
    add(
        "--executor",
        type=parse_dask_address,
        metavar="dask://HOST:PORT",
        help="make the shards on a Dask cluster that sees SOURCE",
    )
    add("--spool", type=Path, help="local folder for images that come as a stream (.wds/spool)")
    add(
        "--spool-gb",
        type=above_zero,
        default=50,
        help="most that it may hold; less means more passes (%(default)s)",
    )

    # The destination.
    add("--overwrite", action="store_true", help="replace a dataset made with other settings")
    add("--unsafe-store", action="store_true", help=UNSAFE_HELP)
    add(
        "--dry-run",
        action="store_true",
        help="print the plan, its time and its cost, and write nothing",
    )


def read_wanted(args: argparse.Namespace) -> Wanted:
    """Return what the flags say of the source.

    Raises:
        UsageError: A flag cannot be understood, or names a file that is not there.
        DataError: --classes names a file that is no list of classes.
    """
    # Files are checked now, rather than after the minutes that reading a source may take.
    table = _given_file("--table", args.table)
    class_list = _given_file("--classes", args.classes)
    classes: tuple[ClassInfo, ...] = ()
    if class_list is not None:
        classes = read_class_list(class_list)
    if table is not None:
        table = table.resolve()
    return Wanted(
        image=args.image_column,
        label=args.label_column,
        split=args.split_column,
        table=table,
        splits=_said_splits(args.split),
        class_level=args.class_level,
        group=_checked_group(args.group),
        labels=LabelRules(classes, args.label_case, frozenset(args.no_label)),
        reencode=args.reencode,
    )


def _given_file(flag: str, path: Path | None) -> Path | None:
    """Return the path that a flag gives, with ~ expanded; None if it was not given.

    Raises:
        UsageError: There is no such file.
    """
    if path is None:
        return None
    file = path.expanduser()
    if not file.is_file():
        raise UsageError(f"{flag} {path} is not there; give the path of a file")
    return file


def _said_splits(said: list[str]) -> SaidSplits:
    """Return what --split WORD=SPLIT says, by word in small letters.

    Raises:
        UsageError: A value cannot be understood, or two contradict each other.
    """
    splits = SaidSplits()
    for text in said:
        # A word may hold an equals sign, a split never does.
        word, equals, split = text.rpartition("=")
        if not equals or not word or split not in (*SPLITS, NO_SPLIT):
            raise UsageError(
                f"--split {text!r} is not WORD=SPLIT, where SPLIT is {', '.join(SPLITS)} "
                f"or {NO_SPLIT}; such as --split holdout=val"
            )
        if splits.setdefault(word.lower(), split) != split:
            raise UsageError(
                f"--split says two things of {word!r}: {splits[word.lower()]} and {split}; "
                "leave one of them out"
            )
    return splits


def refuse_unmet(wanted: Wanted, source: str) -> None:
    """Raise `UsageError` for a --split whose word does not occur in the source: a slip, perhaps.

    Args:
        wanted: What the flags say, after the source was read with it.
        source: The source, for the message.
    """
    unmet = wanted.splits.unmet if isinstance(wanted.splits, SaidSplits) else []
    if unmet:
        word = unmet[0]
        raise UsageError(
            f"--split {word}={wanted.splits[word]}: no folder, file or cell of {source} "
            f"that may be a split is called {word!r}; correct it, or leave it out"
        )


def _checked_group(group: str | None) -> str | None:
    """Return the value of --group, if it can be a column's name or a pattern."""
    if group is None:
        return None
    try:
        re.compile(group)
    except re.error as error:
        raise UsageError(
            f"--group {group!r} is neither a column's name nor a pattern ({error}); "
            "such as --group patient_id, or --group 'patient_(\\d+)'"
        ) from error
    return group
