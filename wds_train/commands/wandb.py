"""`wds-train wandb`: make or complete a run's page in Weights & Biases from its metrics on S3."""

import argparse
import os
from typing import Any

from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.commands.flags import add_run, resolve_run
from wds_train.console import loading, say
from wds_train.errors import RunError, UsageError

FINISH_SECONDS = 300.0  # for W&B to take everything


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    for name in ("project", "entity"):
        parser.add_argument(
            f"--{name}",
            metavar="NAME",
            help=f"move the run's page to this {name} of W&B; the page before stays as it is",
        )


def run(args: argparse.Namespace) -> int:
    loading()
    from wds_train.checkpoint.manifest_changes import amend
    from wds_train.checkpoint.restore import from_newest
    from wds_train.checkpoint.run import Run
    from wds_train.tracking.wandb_board import one_line, send, usual_mode
    from wds_train.tracking.wandb_page import PageError, RunPage

    mode = usual_mode()
    if mode == "disabled":
        raise UsageError("WANDB_MODE is disabled; unset it")
    manifest, store = find_run(resolve_run(args.run, args.bucket))

    def read_history(newest: RunManifest) -> list[dict[str, Any]]:
        return Run(store, newest, "", leads=False).history()

    history = from_newest(store, manifest, read_history)
    page = RunPage(manifest, store.url, lambda change: amend(store, change, say), say)
    page.settle(args.project, args.entity)
    try:
        board = page.open(mode, {}, finish_timeout=FINISH_SECONDS)
        where = board.where
        send(board, history)
        board.finish(manifest, store.url)
    except PageError as error:
        raise RunError(f"{error}; nothing is lost: try again") from error
    except Exception as error:
        raise RunError(f"W&B failed ({one_line(error)}); nothing is lost: try again") from error
    steps = len({row.get("step") for row in history})
    if mode == "offline":
        remedy = "log in (`wandb login`, or set WANDB_API_KEY)"
        if os.environ.get("WANDB_MODE"):
            remedy = "unset WANDB_MODE"
        print(
            f"{store.url}: nothing was sent, the {steps} steps that have metrics are in {where}; "
            f"{remedy}, and type this again"
        )
        return 0
    print(
        f"{store.url}: sent {board.sent} of the {steps} steps that have metrics, the others were "
        f"there; {where}"
    )
    return 0
