"""`wds-train rehearse`: time a spot interruption, simulated here or real on AWS."""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from wds_train.checkpoint.run_manifest import name_of
from wds_train.commands.flags import add_bucket, add_region, ask, resolve_run
from wds_train.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="end the instance of this run on AWS, once (default: a rehearsal here, without AWS)",
    )
    add_bucket(parser, "runs/ lives")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_region(parser)


def run(args: argparse.Namespace) -> int:
    if args.run is None:
        return _rehearse_here()
    return _rehearse_on_aws(args)


def _rehearse_here() -> int:
    from wds_train.aws.local_rehearsal import rehearse
    from wds_train.storage import embedded

    # SIGTERM acts like Ctrl-C: no process that was started here may stay.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="wds-rehearsal-") as folder:
        os.environ["WDS_HOME"] = folder  # the server and the run are deleted with it
        embedded.ensure_running()  # one server for all processes
        try:
            found = rehearse(Path(folder), lambda line: print(line, file=sys.stderr, flush=True))
        finally:
            embedded.stop()
    print(f"notice to commit   {found.commit:5.1f} s, at step {found.step}; AWS gives 120")
    print(f"notice to the end  {found.gone:5.1f} s")
    print(f"start to step {found.step + 1:4} {found.first_step:5.1f} s, of the replacement")
    return 0


def _rehearse_on_aws(args: argparse.Namespace) -> int:
    from wds_train.aws import stacks
    from wds_train.aws.account import Aws
    from wds_train.aws.interruption import instance_of, interrupt

    url = resolve_run(args.run, args.bucket)
    name = name_of(url)
    aws = Aws(args.region)
    stacks.find_existing(aws, name)
    instance = instance_of(aws, name)
    print("\n".join(stacks.machines(aws, name)))
    question = f"type the run's name to have {instance} ended; its group starts another: "
    if not args.yes and ask(question) != name:
        raise UsageError("nothing was ended; type the run's name when asked, or give --yes")
    found = interrupt(aws, url, instance)
    commit = "none" if found.commit is None else f"{found.commit:5.1f} s"
    print(f"request to commit  {commit}, at step {found.step}; the group gives 120")
    print(f"request to claim   {found.claim:5.1f} s, by the replacement")
    print(f"request to steps   {found.first_step:5.1f} s")
    return 0
