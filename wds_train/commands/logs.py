"""`wds-train logs`: the newest lines that the run's instances have written."""

import argparse
from datetime import UTC, datetime

from wds_train.commands.flags import add_region, positive
from wds_train.errors import NotFound


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's name")
    parser.add_argument("--lines", type=positive, default=100, metavar="N", help="(default: %(default)s)")
    add_region(parser)


def run(args: argparse.Namespace) -> int:
    from wds_train.aws.account import Aws, told
    from wds_train.aws.stacks import existing, name_of

    aws = Aws(args.region)
    existing(aws, args.run)
    group, client = f"/wds-train/{name_of(args.run)}", aws.client("logs")
    lines: list[tuple[int, str]] = []
    with told(f"the log group {group}"):
        found = client.describe_log_streams(logGroupName=group, orderBy="LastEventTime", descending=True, limit=5)
        for stream in found["logStreams"]:
            place = {"logGroupName": group, "logStreamName": stream["logStreamName"], "limit": args.lines}
            events = client.get_log_events(**place, startFromHead=False)["events"]
            lines += [(each["timestamp"], f"{stream['logStreamName'][-6:]}  {each['message']}") for each in events]
            if len(lines) >= args.lines:
                break
    if not lines:
        raise NotFound(f"{group} holds no line yet; an instance takes about five minutes to write its first")
    for stamp, line in sorted(lines)[-args.lines :]:
        print(f"{datetime.fromtimestamp(stamp / 1000, UTC):%m-%d %H:%M:%S}  {line}")
    return 0
