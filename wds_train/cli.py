"""The command line: `wds-train COMMAND`. Errors end as one line on stderr and an exit code."""

import argparse
import os
import re
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from wds_train.config.numbers import with_range
from wds_train.console import add_level, set_level
from wds_train.dotenv import read_dotenv
from wds_train.environment import SETTINGS, refuse_bad_numbers
from wds_train.errors import Interrupted, UsageError, WdsTrainError, did_you_mean, tell

LEAVE_SECONDS = 2.0
LONG = ("shards", "verify", "train", "eval")  # commands that have --quiet and --verbose


class Command(NamedTuple):
    """A command, as two functions of a module.

    `add_arguments(parser)` adds its arguments. `run(args)` does the work and returns the exit code.
    """

    module: str
    help: str
    run: str = "run"
    add_arguments: str = "add_arguments"


COMMANDS = {
    "shards": Command(
        "wds_train.conversion.command", "convert images to tar shards, index and manifest"
    ),
    "datasets": Command(
        "wds_train.commands.listings",
        "list the datasets of the bucket",
        "list_datasets",
        "add_list_arguments",
    ),
    "inspect": Command("wds_train.commands.inspect", "show the contents of a dataset"),
    "verify": Command("wds_train.commands.verify", "re-read every byte of a dataset or a run"),
    "order": Command("wds_train.commands.order", "print the samples of an epoch in training order"),
    "train": Command("wds_train.commands.train", "train a new run, or resume one"),
    "recipes": Command("wds_train.commands.recipes", "list the recipes, or print one in full"),
    "plan": Command(
        "wds_train.commands.plan",
        "estimate hours, dollars and the bottleneck of a training, by instance",
    ),
    "launch": Command(
        "wds_train.commands.launch",
        "train on AWS spot instances, to the end or to a limit of hours or dollars",
    ),
    "stop": Command(
        "wds_train.commands.cloud",
        "commit a run's state and end its instance",
        "stop",
        "add_stop_arguments",
    ),
    "destroy": Command(
        "wds_train.commands.cloud",
        "delete a run's stack; the bucket stays",
        "destroy",
        "add_destroy_arguments",
    ),
    "leftovers": Command(
        "wds_train.commands.cloud",
        "list our AWS resources that still cost money",
        "list_leftovers",
        "add_leftovers_arguments",
    ),
    "rehearse": Command(
        "wds_train.commands.rehearse",
        "simulate a spot interruption, timed: notice, commit, replacement",
    ),
    "logs": Command(
        "wds_train.commands.cloud",
        "print the newest log lines of a run's instances",
        "print_logs",
        "add_logs_arguments",
    ),
    "eval": Command(
        "wds_train.commands.eval",
        "measure the accuracy of a run or an exported file, or of several together",
    ),
    "runs": Command(
        "wds_train.commands.listings",
        "list the runs of the bucket",
        "list_runs",
        "add_list_arguments",
    ),
    "predict": Command(
        "wds_train.commands.predict", "classify images with a run or an exported model"
    ),
    "status": Command("wds_train.commands.status", "show a run's progress, owner and cost"),
    "report": Command(
        "wds_train.commands.report", "write a run's page, as HTML, Markdown and pictures"
    ),
    "compare": Command("wds_train.commands.compare", "compare runs: recipes, results, curves"),
    "checkpoints": Command(
        "wds_train.commands.checkpoints",
        "list a run's checkpoints",
        "list_checkpoints",
        "add_list_arguments",
    ),
    "rollback": Command(
        "wds_train.commands.checkpoints",
        "make an older checkpoint the newest",
        "roll_back",
        "add_rollback_arguments",
    ),
    "export": Command(
        "wds_train.commands.export", "write a run's weights for timm, onnxruntime or torch.export"
    ),
    "demo": Command("wds_train.commands.demo", "try a model in the browser"),
    "publish": Command(
        "wds_train.commands.publish", "write a run's model repository and its public demo page"
    ),
    "check-store": Command(
        "wds_train.commands.check_store", "test whether an S3 server does all that is needed"
    ),
    "wandb": Command(
        "wds_train.commands.wandb",
        "complete a run's page in Weights & Biases from its metrics on S3",
    ),
    "bench": Command("wds_train.commands.bench", "measure the speed of the parts"),
}


class Parser(argparse.ArgumentParser):
    """A parser whose every complaint is one sentence, and whose help says the range of each number.

    The parsers of its commands are of this class, too.
    """

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument, with the range of its number in the help."""
        return super().add_argument(*names, **with_range(options))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse as argparse does, but let each command itself refuse an unknown argument.

        The command can then name the argument that was probably meant.
        """
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = re.findall(r"(?<!\S)--[a-z][a-z-]*", self.format_help())
            name = unknown[0].partition("=")[0]
            self.error(f"there is no argument {unknown[0]!r}{did_you_mean(name, known)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError` rather than exit."""
        raise UsageError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words of the command line. Default: those of this process.

    Returns:
        The exit code: 0 done, 75 interrupted (run it again), 1 failed, 2 wrong usage.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        read_dotenv()  # before the parsers, which take defaults from the environment
        refuse_bad_numbers(SETTINGS)  # before any work, though hours may pass until one is used
        args = parser(arguments).parse_args(arguments)
        args.arguments = arguments
        set_level(args)
        return args.run_command(args)
    except WdsTrainError as error:
        tell(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("wds-train: stopped at once; what was committed before stands", file=sys.stderr)
        return Interrupted.exit_code
    except BrokenPipeError:
        # The reader (`| head`) has gone. That is no error, and Python must not complain at its
        # exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def entry() -> NoReturn:
    """Run the process `wds-train`.

    After a training it ends within LEAVE_SECONDS: Python's own exit would wait for threads that
    still wait for a store or for W&B.
    """
    _open_closed_streams()
    code = main()
    if sys.argv[1:2] == ["train"]:
        from wds_train.training.stop_request import leave

        last = threading.Timer(LEAVE_SECONDS, leave, [code])
        last.daemon = True
        last.start()
    sys.exit(code)


def _open_closed_streams() -> None:
    """Open stdin, stdout and stderr, if a supervisor started this process without one of them.

    Otherwise connections and files would get their numbers, and messages would be written into
    them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            mode = "w" if number else "r"
            # It stays open as long as the process.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123


def parser(arguments: Sequence[str]) -> Parser:
    """Return the parser of the command that `arguments` name.

    The modules of other commands are not imported: some take seconds.

    Raises:
        UsageError: There is no such command.
    """
    whole = Parser(prog="wds-train", description=__doc__)
    named = arguments[0] if arguments else None
    if named is not None and not named.startswith("-") and named not in COMMANDS:
        whole.error(f"there is no command {named!r}{did_you_mean(named, COMMANDS)}")
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.help)
        if name == named:
            module = import_module(command.module)
            getattr(module, command.add_arguments)(one)
            if name in LONG:
                add_level(one)
            one.set_defaults(run_command=getattr(module, command.run))
    return whole


if __name__ == "__main__":
    entry()
