"""`wds-train stop`, `destroy`, `logs` and `leftovers`: look after what runs on AWS.

`launch` starts it, and is in a file of its own.
"""

import argparse
from datetime import UTC, datetime

from wds_train.commands.flags import add_region, ask, positive
from wds_train.errors import NotFound, UsageError

LOG_STREAMS = 5  # the newest log streams of a run, one per instance


def add_stop_arguments(parser: argparse.ArgumentParser) -> None:
    _add_name(parser)
    add_region(parser)


def stop(args: argparse.Namespace) -> int:
    """Let the run's instance commit and end. `launch` resumes the run."""
    from wds_train.aws import stacks
    from wds_train.aws.account import Aws

    stacks.stop(Aws(args.region), args.run)
    print(
        f"the group of {args.run} is set to none: its instance commits and goes within two "
        "minutes; "
        "launch again to go on"
    )
    return 0


def add_destroy_arguments(parser: argparse.ArgumentParser) -> None:
    _add_name(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_region(parser)


def destroy(args: argparse.Namespace) -> int:
    """Delete the run's stack. The bucket stays, and with it the run."""
    from wds_train.aws import stacks
    from wds_train.aws.account import Aws

    aws = Aws(args.region)
    stack = stacks.find_existing(aws, args.run)
    print(f"stack {stack['StackName']}: {stack['StackStatus']}")
    for line in stacks.machines(aws, args.run):
        print(line)
    question = "type the run's name to delete its stack (the bucket stays): "
    if not args.yes and ask(question) != args.run:
        raise UsageError("nothing was deleted; type the run's name when asked, or give --yes")
    stacks.destroy(aws, args.run)
    bucket = stacks.parameters(stack).get("Bucket", "")
    print(f"deleted; the bucket s3://{bucket} and all that it holds stay")
    return 0


def add_logs_arguments(parser: argparse.ArgumentParser) -> None:
    _add_name(parser)
    parser.add_argument(
        "--lines", type=positive, default=100, metavar="N", help="(default: %(default)s)"
    )
    add_region(parser)


def print_logs(args: argparse.Namespace) -> int:
    """Print the newest lines that the run's instances have written."""
    from wds_train.aws.account import Aws, translate_errors
    from wds_train.aws.stacks import find_existing, name_of

    aws = Aws(args.region)
    find_existing(aws, args.run)
    group = f"/wds-train/{name_of(args.run)}"
    client = aws.client("logs")
    lines: list[tuple[int, str]] = []
    with translate_errors(f"the log group {group}"):
        found = client.describe_log_streams(
            logGroupName=group, orderBy="LastEventTime", descending=True, limit=LOG_STREAMS
        )
        for stream in found["logStreams"]:
            name = stream["logStreamName"]
            answer = client.get_log_events(
                logGroupName=group, logStreamName=name, limit=args.lines, startFromHead=False
            )
            for event in answer["events"]:
                lines.append((event["timestamp"], f"{name[-6:]}  {event['message']}"))
            if len(lines) >= args.lines:
                break
    if not lines:
        raise NotFound(
            f"{group} holds no line yet; an instance takes about five minutes to write its first"
        )
    for milliseconds, line in sorted(lines)[-args.lines :]:
        print(f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%m-%d %H:%M:%S}  {line}")
    return 0


def add_leftovers_arguments(parser: argparse.ArgumentParser) -> None:
    add_region(parser)


def list_leftovers(args: argparse.Namespace) -> int:
    """Print all that carries our tag in a region and still costs money."""
    from wds_train.aws.account import Aws
    from wds_train.aws.resources import leftovers

    aws = Aws(args.region)
    found = leftovers(aws)
    print("\n".join(found) if found else f"nothing of ours costs money in {aws.region}")
    return 0


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's name")
