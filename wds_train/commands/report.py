"""`wds-train report`: write a run's report as HTML, Markdown and pictures."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wds_train.checkpoint.find import find_run
from wds_train.commands.flags import (
    add_device,
    add_run,
    add_workers,
    count,
    dollars,
    expand_home,
    resolve_run,
)
from wds_train.errors import UsageError, WdsTrainError

if TYPE_CHECKING:
    from wds_train.report.model_checks import Findings

IMAGES = 2000  # of the validation split: accuracy to about one point, in minutes on a CPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_workers(parser)
    add_device(parser)
    parser.add_argument(
        "--out",
        type=expand_home,
        required=True,
        metavar="DIR",
        help="write report.html, report.md and PNGs there",
    )
    parser.add_argument(
        "--images",
        type=count,
        default=IMAGES,
        metavar="N",
        help="evaluate the best checkpoint on at most N validation images (default: %(default)s)",
    )
    parser.add_argument(
        "--no-images",
        action="store_const",
        const=0,
        dest="images",
        help="do not evaluate, which takes seconds then",
    )
    parser.add_argument(
        "--price",
        type=dollars,
        metavar="USD",
        help="price of an instance hour (default: what each attempt noted)",
    )
    parser.add_argument(
        "--on-demand-price",
        type=dollars,
        metavar="USD",
        help="on-demand price of an instance hour, to compare with",
    )


def run(args: argparse.Namespace) -> int:
    manifest, store = find_run(resolve_run(args.run, args.bucket))
    refuse_file(args.out)

    # These imports take seconds: they come after all that can be refused without them.
    from wds_train.report.page import write
    from wds_train.report.run_data import Account
    from wds_train.report.run_report import NOT_EVALUATED, Prices, report

    findings: Findings | str = NOT_EVALUATED
    if args.images:
        from wds_train.report.model_checks import find
        from wds_train.training.ranks import Ranks

        warn(f"evaluating at most {args.images:,} validation images; --no-images leaves that out")
        device = Ranks(cpu=args.device == "cpu").device
        try:
            findings = find(store, manifest, args.images, workers=args.workers, device=device)
        except WdsTrainError as error:
            findings = f"The model could not be evaluated: {error}."
            warn(findings)
        # A run in progress has gone far on during the evaluation.
        manifest = find_run(store.url)[0]
    account = Account.of(store, manifest, warn)
    prices = Prices(args.price, args.on_demand_price)
    print(write(report(account, prices, findings), args.out, "report"))
    return 0


def refuse_file(folder: Path | None) -> None:
    """Raise `UsageError` if --out names a file."""
    if folder and folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file; give a folder")


def warn(message: str) -> None:
    """Print a line on stderr."""
    print(f"wds-train: {message}", file=sys.stderr)
