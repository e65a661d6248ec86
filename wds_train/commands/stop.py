"""`wds-train stop`: the run's instance commits, and goes; `launch` goes on."""

import argparse

from wds_train.commands.flags import add_region


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's name")
    add_region(parser)


def run(args: argparse.Namespace) -> int:
    from wds_train.aws import stacks
    from wds_train.aws.account import Aws

    stacks.stop(Aws(args.region), args.run)
    print(
        f"the group of {args.run} is set to none: its instance commits and goes within two minutes; launch again to go on"
    )
    return 0
