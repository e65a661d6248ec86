"""`wds-train wandb`: a run's page in Weights & Biases, made anew or completed from what is on S3."""

import argparse
import os

from wds_train.checkpoint.find import find_run
from wds_train.commands.arguments import add_run, run_url
from wds_train.errors import RunError, UsageError
from wds_train.tracking.console import loading

FINISH_SECONDS = 300.0  # for W&B to take everything


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)


def run(args: argparse.Namespace) -> int:
    loading()
    from wds_train.checkpoint.read import from_newest
    from wds_train.checkpoint.run import Run
    from wds_train.tracking.board import Board, one_line, send, usual_mode

    mode = usual_mode()
    if mode == "disabled":
        raise UsageError("WANDB_MODE is disabled; unset it")
    manifest, store = find_run(run_url(args.run, args.bucket))
    history = from_newest(store, manifest, lambda newest: Run(store, newest, "", leads=False).history())
    try:
        board = Board.open(manifest, mode, {}, finish_timeout=FINISH_SECONDS)
        where = board.where
        send(board, history)
        board.finish(manifest, store.url)
    except Exception as error:
        raise RunError(f"W&B failed ({one_line(error)}); nothing is lost: try again") from error
    steps = len({row.get("step") for row in history})
    if mode == "offline":
        remedy = "unset WANDB_MODE" if os.environ.get("WANDB_MODE") else "log in (`wandb login`, or set WANDB_API_KEY)"
        print(
            f"{store.url}: nothing was sent, the {steps} steps that have metrics are in {where}; {remedy}, and type this again"
        )
    else:
        print(f"{store.url}: sent {board.sent} of the {steps} steps that have metrics, the others were there; {where}")
    return 0
