"""The command line: `wds-train COMMAND`. Errors end as one line on stderr and the exit code of their class."""

import argparse
import os
import re
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from wds_train.config.numbers import with_range
from wds_train.console import add_level, set_level
from wds_train.dotenv import read_dotenv
from wds_train.environment import SETTINGS, refuse_bad_numbers
from wds_train.errors import Interrupted, UsageError, WdsTrainError, did_you_mean, tell

LEAVE_SECONDS = 2.0
LONG = ("shards", "verify", "train", "eval")  # commands that have --quiet and --verbose
# Every command is a module with `add_arguments(parser)` and `run(args)`, its exit code.
COMMANDS = {
    "shards": ("wds_train.conversion.command", "convert images to tar shards, index and manifest"),
    "datasets": ("wds_train.commands.datasets", "list the datasets of the bucket"),
    "inspect": ("wds_train.commands.inspect", "what a dataset holds"),
    "verify": ("wds_train.commands.verify", "re-read every byte of a dataset or a run"),
    "order": ("wds_train.commands.order", "print the samples of an epoch in training order"),
    "train": ("wds_train.commands.train", "train, or go on with a run"),
    "recipes": ("wds_train.commands.recipes", "list the recipes, or print one in full"),
    "plan": ("wds_train.commands.plan", "what a training takes on which instance: hours, dollars, bottleneck"),
    "launch": (
        "wds_train.commands.launch",
        "train on AWS spot instances, to the end or to a limit of hours or dollars",
    ),
    "stop": ("wds_train.commands.stop", "end a run's instance, its state committed"),
    "destroy": ("wds_train.commands.destroy", "delete a run's stack; the bucket stays"),
    "leftovers": ("wds_train.commands.leftovers", "what of ours still costs money on AWS"),
    "rehearse": (
        "wds_train.commands.rehearse",
        "a spot instance's end on this machine, timed: notice, commit, replacement",
    ),
    "logs": ("wds_train.commands.logs", "the newest lines of a run's instances"),
    "eval": ("wds_train.commands.eval", "the accuracy of a run's weights or of an exported file, alone or together"),
    "runs": ("wds_train.commands.runs", "list the runs of the bucket"),
    "predict": ("wds_train.commands.predict", "what a run's model, or an exported file's, sees in images"),
    "status": ("wds_train.commands.status", "how far a run is, who trains it, what it cost"),
    "report": ("wds_train.commands.report", "a run as a page, as Markdown and as pictures"),
    "compare": ("wds_train.commands.compare", "runs side by side: recipes, results, curves"),
    "checkpoints": ("wds_train.commands.checkpoints", "list a run's checkpoints"),
    "rollback": ("wds_train.commands.rollback", "make an older checkpoint the newest"),
    "export": ("wds_train.commands.export", "a run's weights for timm, onnxruntime or torch.export"),
    "demo": ("wds_train.commands.demo", "try a model in the browser"),
    "publish": ("wds_train.commands.publish", "a run as a model repository and a page for everyone"),
    "check-store": ("wds_train.commands.check_store", "what an S3 server does of all that is asked of one"),
    "wandb": ("wds_train.commands.wandb", "complete a run's page in Weights & Biases from what is on S3"),
    "bench": ("wds_train.commands.bench", "measure what the parts cost"),
}


class Parser(argparse.ArgumentParser):
    """A parser, and those of its commands, whose every complaint is one sentence, and whose help says the range of a number."""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        return super().add_argument(*names, **with_range(options))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's, but each command refuses what it does not know itself, and thus can name what it does."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = re.findall(r"(?<!\S)--[a-z][a-z-]*", self.format_help())
            self.error(f"there is no argument {unknown[0]!r}{did_you_mean(unknown[0].partition('=')[0], known)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 done, 75 interrupted (run it again), 1 failed, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        read_dotenv()  # before the parsers, whose defaults are of the environment
        refuse_bad_numbers(SETTINGS)  # before any work, though it may take hours until one is used
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
        # The reader (`| head`) has gone: not an error, and Python must not complain about it while it exits either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def entry() -> NoReturn:
    """The process `wds-train`. After a training it is gone within LEAVE_SECONDS: threads that still wait for a store, or for
    W&B, would hold up Python's own end.
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
    """Where a supervisor started this process without stdin, stdout or stderr, connections and files would get their numbers, and
    messages would be written into them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115, PTH123 (open as long as the process)


def parser(arguments: Sequence[str]) -> Parser:
    """The parser of the command that `arguments` name; the others' modules are not imported, some of which take seconds."""
    whole = Parser(prog="wds-train", description=__doc__)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        whole.error(f"there is no command {arguments[0]!r}{did_you_mean(arguments[0], COMMANDS)}")
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in arguments[:1]:
            found = import_module(module)
            found.add_arguments(command)
            if name in LONG:
                add_level(command)
            command.set_defaults(run_command=found.run)
    return whole


if __name__ == "__main__":
    entry()
