"""The command line: `wds-train COMMAND`. Errors end as one line on stderr and the exit code of their class."""

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from wds_train.errors import Interrupted, WdsTrainError, tell

LEAVE_SECONDS = 2.0
# Every command is a module with `add_arguments(parser)` and `run(args)`, its exit code.
COMMANDS = {
    "shards": ("shards.make_shards", "convert images to tar shards, index and manifest"),
    "inspect": ("wds_train.commands.inspect", "what a dataset holds"),
    "verify": ("wds_train.commands.verify", "re-read every byte of a dataset or a run"),
    "order": ("wds_train.commands.order", "print the samples of an epoch in training order"),
    "train": ("wds_train.commands.train", "train, or go on with a run"),
    "recipes": ("wds_train.commands.recipes", "list the recipes, or print one in full"),
    "eval": ("wds_train.commands.eval", "the accuracy of a run's weights or of an exported file, alone or together"),
    "predict": ("wds_train.commands.predict", "what a run's model, or an exported file's, sees in images"),
    "status": ("wds_train.commands.status", "how far a run is, who trains it, what it cost"),
    "checkpoints": ("wds_train.commands.checkpoints", "list a run's checkpoints"),
    "rollback": ("wds_train.commands.rollback", "make an older checkpoint the newest"),
    "export": ("wds_train.commands.export", "a run's weights for timm, onnxruntime or torch.export"),
    "demo": ("wds_train.commands.demo", "try a model in the browser"),
    "publish": ("wds_train.commands.publish", "a run as a model repository and a page for everyone"),
    "bench": ("wds_train.commands.bench", "measure what the parts cost"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 done, 75 interrupted (run it again), 1 failed, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        args = _parser(arguments).parse_args(arguments)
        args.arguments = arguments
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
        from wds_train.training.stop import leave

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


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that `arguments` name; the others' modules are not imported, some of which take seconds."""
    parser = argparse.ArgumentParser(prog="wds-train", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in arguments[:1]:
            found = import_module(module)
            found.add_arguments(command)
            command.set_defaults(run_command=found.run)
    return parser


if __name__ == "__main__":
    entry()
