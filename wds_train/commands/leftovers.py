"""`wds-train leftovers`: all that carries our tag in a region and still costs money."""

import argparse

from wds_train.commands.flags import add_region


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_region(parser)


def run(args: argparse.Namespace) -> int:
    from wds_train.aws.account import Aws
    from wds_train.aws.resources import leftovers

    aws = Aws(args.region)
    found = leftovers(aws)
    print("\n".join(found) if found else f"nothing of ours costs money in {aws.region}")
    return 0
