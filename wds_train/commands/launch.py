"""`wds-train launch`: train on AWS spot instances, from nothing.

An interrupted instance is replaced, and the run goes on. Everything stops at a fixed deadline.
"""

import argparse
import math
import os
import re

from wds_train.commands.flags import add_region, dollars
from wds_train.config.numbers import above_zero
from wds_train.config.presets import preset
from wds_train.errors import UsageError
from wds_train.storage.address import BUCKET, NAME

SIZES = ("small", "medium", "large", "huge", "a100")
LONGEST = 24 * 365.0  # hours; a date that no calendar has would fail after the stack is made
PREFIX = re.compile(r"([A-Za-z0-9._-]+/)*")
ARGUMENTS = re.compile(r"[A-Za-z0-9 ._=,:/@+-]*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="a name; the run is BUCKET/runs/RUN")
    bucket = os.environ.get("WDS_BUCKET") or None
    place = "where datasets/, runs/ and code/ live ($WDS_BUCKET)"
    add("--bucket", default=bucket, required=bucket is None, metavar="s3://B/P", help=place)
    add("--recipe", required=True, metavar="NAME")
    add("--dataset", metavar="NAME", help="BUCKET/datasets/NAME (default: the recipe's name)")
    add(
        "--size",
        choices=SIZES,
        default="small",
        help="1 GPU (small, medium), 4 (large), 8 (huge, a100) (%(default)s)",
    )
    add(
        "--max-hours",
        type=above_zero,
        metavar="H",
        help="hard limit: no instance runs longer than this (default: twice the plan's hours)",
    )
    add(
        "--max-usd",
        type=dollars,
        metavar="USD",
        help="hard limit on spending, at the current spot price",
    )
    add(
        "--arguments",
        dest="more",
        default="",
        metavar="TEXT",
        help="more arguments of `wds-train train`",
    )
    add(
        "--wandb-secret",
        default="",
        metavar="ARN",
        help="a secret of Secrets Manager that holds a W&B key",
    )
    add(
        "--create-bucket",
        action="store_true",
        help="make the bucket, for the shards; train nothing yet",
    )
    add("--check", action="store_true", help="only check what would be needed; make nothing")
    add_region(parser)


def run(args: argparse.Namespace) -> int:
    bucket, prefix = _split_address(args.bucket)
    recipe = preset(args.recipe)
    dataset = args.dataset or args.recipe
    _refuse_arguments(args, dataset)

    from wds_train.aws import stacks
    from wds_train.aws.account import Aws
    from wds_train.aws.preflight import Order, preflight

    aws = Aws(args.region)
    url = f"s3://{bucket}/{prefix}datasets/{dataset}"
    order = Order(bucket, prefix, args.run, recipe, url, args.size, args.create_bucket)
    found = preflight(aws, order)
    print("\n".join(found.lines))
    if found.refused:
        raise UsageError("\n".join(["nothing was made, since", *found.refused]))
    hours = 0.0
    if found.has_bucket:
        hours = limit_hours(found.hours, found.price, args.max_hours, args.max_usd)
        cost = f"${hours * found.price:.2f}"
        print(
            f"{'the end':12}{hours:.1f} hours from now at the latest, {cost} at the dearest price"
        )
    if args.check:
        print("nothing was made (--check)")
        return 0

    # What the stack is made with: the parameters of its template.
    values = {
        "Run": args.run,
        "Recipe": args.recipe,
        "Bucket": bucket,
        "Prefix": prefix,
        "Size": args.size,
        "Arguments": f"--dataset {url} {args.more}".strip(),
        "WandbSecret": args.wandb_secret,
        "Image": found.image,
        **stacks.kept_parameters(aws, args.run),
    }
    if args.create_bucket:
        no_code = {"CodeKey": "code/none", "CodeSha256": "0" * 64}
        stacks.make(aws, args.run, values | {"CreateBucket": "yes"} | no_code)
        print(
            f"made; now the images: make shards SOURCE=... DATASET={url}, "
            "and then launch without --create-bucket"
        )
        return 0
    stacks.make(aws, args.run, values | _upload_code(bucket, prefix))
    end = stacks.start(aws, args.run, hours)
    watch = f"make status RUN={args.run} BUCKET={args.bucket}"
    print(f"launched; watch it: {watch}. It ends by {end:%Y-%m-%d %H:%M} UTC")
    return 0


def _refuse_arguments(args: argparse.Namespace, dataset: str) -> None:
    for what, name in (("RUN", args.run), ("--dataset", dataset)):
        if not NAME.fullmatch(name):
            raise UsageError(
                f"{what} {name!r} must be a name below the bucket: "
                "the instance may read and write nothing else"
            )
    if not ARGUMENTS.fullmatch(args.more):
        raise UsageError(
            f"--arguments {args.more!r} may hold letters, digits, blanks and ._=,:/@+- alone"
        )


def limit_hours(
    planned: float | None, price: float, max_hours: float | None, max_usd: float | None
) -> float:
    """Return the hours after which no instance may run.

    Args:
        planned: The hours of the plan; None if it does not know them.
        price: Dollars an hour, of the dearest instance.
        max_hours: The value of --max-hours.
        max_usd: The value of --max-usd.

    Returns:
        The smallest limit given; without one, twice the planned hours.

    Raises:
        UsageError: There is no limit, or one that is none.
    """
    asked = [] if max_hours is None else [max_hours]
    if max_usd is not None:
        if max_usd <= 0:
            raise UsageError(f"--max-usd {max_usd:g} buys no hour; give what the run may cost")
        asked.append(max_usd / price)
    if not asked and planned is None:
        raise UsageError(
            "nothing was made, since the plan does not know the hours; give --max-hours or "
            "--max-usd"
        )
    limit = min(asked, default=math.ceil(2 * (planned or 0)))
    if limit > LONGEST:
        raise UsageError(
            f"nothing was made, since {limit:.3g} hours are over a year, which is no limit; "
            "give fewer with --max-hours"
        )
    if limit < (planned or 0):
        print(
            f"{'note':12}the plan takes {planned:.1f} hours; the limit comes before, and a later "
            "launch goes on"
        )
    return limit


def _upload_code(bucket: str, prefix: str) -> dict[str, str]:
    """Put the code into the bucket, and return the stack's parameters for it."""
    import sys

    from wds_train.aws.bundle import bundle, key_of
    from wds_train.errors import Conflict
    from wds_train.storage.open import open_store

    code, changed = bundle()
    if changed:
        print("changes that are not committed are not launched", file=sys.stderr)
    key, digest = key_of(code)
    try:
        open_store(f"s3://{bucket}/{prefix}".rstrip("/")).write(key, code, if_absent=True)
    except Conflict as error:
        message = f"s3://{bucket}/{prefix}{key} holds other bytes than its name says; delete it"
        raise UsageError(message) from error
    return {"CodeKey": f"{prefix}{key}", "CodeSha256": digest}


def _split_address(address: str) -> tuple[str, str]:
    """Return the bucket and the prefix, which ends in a slash unless it is empty."""
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    if not address.startswith("s3://") or not BUCKET.fullmatch(bucket):
        raise UsageError(
            f"--bucket {address!r} is no s3://BUCKET[/PREFIX], which instances of AWS could reach"
        )
    prefix = prefix.strip("/")
    if prefix:
        prefix += "/"
    if not PREFIX.fullmatch(prefix):
        raise UsageError(
            f"--bucket {address!r} may hold letters, digits and ._- alone, and slashes between"
        )
    return bucket, prefix
