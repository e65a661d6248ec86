"""`wds-train compare`: runs side by side, in the terminal and, with --out, as a page with their curves."""

import argparse
from pathlib import Path

from wds_train.checkpoint.find import find_run
from wds_train.commands.flags import add_bucket, dollars, run_url
from wds_train.commands.report import refuse_file, warn
from wds_train.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="two or more, each a name, s3://bucket/prefix or a directory"
    )
    add_bucket(parser, "runs/ lives")
    parser.add_argument("--price", type=dollars, metavar="USD", help="price of an instance hour (default: as noted)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write compare.html, compare.md and PNGs there")


def run(args: argparse.Namespace) -> int:
    if len(args.runs) < 2:
        raise UsageError(f"compare needs two runs or more, {args.runs[0]} is one; `wds-train report` tells of one")
    refuse_file(args.out)
    found = [find_run(run_url(each, args.bucket)) for each in args.runs]

    from wds_train.report.comparison import compare, differences, lines_of, results
    from wds_train.report.page import Table, write
    from wds_train.report.run_data import Account  # seconds, after what can be said without it

    accounts = [Account.of(store, manifest, warn) for manifest, store in found]
    table = results(accounts, args.price)
    print("\n".join(lines_of(table)))
    if different := differences(accounts):
        print("", *lines_of(Table("", ["setting", *table.head[1:]], different)), sep="\n")
    else:
        print("\nrecipes and datasets are the same")
    if args.out:
        print("", write(compare(accounts, args.price), args.out, "compare"), sep="\n")
    return 0
