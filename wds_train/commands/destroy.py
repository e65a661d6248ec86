"""`wds-train destroy`: the run's stack is deleted; the bucket, and with it the run, stays."""

import argparse

from wds_train.commands.flags import add_region, answered
from wds_train.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's name")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_region(parser)


def run(args: argparse.Namespace) -> int:
    from wds_train.aws import stacks
    from wds_train.aws.account import Aws

    aws = Aws(args.region)
    stack = stacks.existing(aws, args.run)
    print("\n".join([f"stack {stack['StackName']}: {stack['StackStatus']}", *stacks.machines(aws, args.run)]))
    if not args.yes and answered("type the run's name to delete its stack (the bucket stays): ") != args.run:
        raise UsageError("nothing was deleted; type the run's name when asked, or give --yes")
    stacks.destroy(aws, args.run)
    print(f"deleted; the bucket s3://{stacks.parameters(stack).get('Bucket', '')} and all that it holds stay")
    return 0
