"""`wds-train compare`: compare runs in the terminal, and with --out on a page."""

import argparse
from pathlib import Path

from wds_train.checkpoint.find import find_run
from wds_train.commands.flags import add_bucket, dollars, resolve_run
from wds_train.commands.report import refuse_file, warn
from wds_train.console import align_columns
from wds_train.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="two or more, each a name, s3://bucket/prefix or a directory",
    )
    add_bucket(parser, "runs/ lives")
    parser.add_argument(
        "--price", type=dollars, metavar="USD", help="price of an instance hour (default: as noted)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write compare.html, compare.md and PNGs there"
    )


def run(args: argparse.Namespace) -> int:
    if len(args.runs) < 2:
        raise UsageError(
            f"compare needs two runs or more, {args.runs[0]} is one; `wds-train report` tells of "
            "one"
        )
    refuse_file(args.out)
    found = [find_run(resolve_run(each, args.bucket)) for each in args.runs]

    # These imports take seconds: they come after all that can be refused without them.
    from wds_train.report.comparison import compare, differences, results
    from wds_train.report.page import write
    from wds_train.report.run_data import Account

    accounts = [Account.of(store, manifest, warn) for manifest, store in found]
    table = results(accounts, args.price)
    for line in align_columns([table.head, *table.rows]):
        print(line)
    print()
    different = differences(accounts)
    if different:
        for line in align_columns([["setting", *table.head[1:]], *different]):
            print(line)
    else:
        print("recipes and datasets are the same")
    if args.out:
        print()
        print(write(compare(accounts, args.price), args.out, "compare"))
    return 0
