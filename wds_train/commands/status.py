"""`wds-train status`: show a run's progress, owner and cost."""

import argparse
import contextlib
import json
import shutil
import sys
import time
from dataclasses import asdict
from typing import Any

from wds_train.checkpoint.find import find_run, state_of, where_time_went
from wds_train.checkpoint.goodput import Parts
from wds_train.checkpoint.run_manifest import Checkpoint, RunManifest, Totals, name_of
from wds_train.checkpoint.scores import SCORES, describe_score, every_of, telling
from wds_train.checkpoint.weight_choice import best_weights
from wds_train.commands.flags import add_region, add_run, dollars, resolve_run
from wds_train.console import align_columns
from wds_train.errors import NotFound
from wds_train.report.formatting import describe_goodput
from wds_train.storage.address import is_embedded

WATCH_SECONDS = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument(
        "--watch", action="store_true", help="show it every few seconds, until the run ends"
    )
    parser.add_argument(
        "--price",
        type=dollars,
        metavar="USD",
        help="price of an instance hour, to sum up the cost so far",
    )
    parser.add_argument(
        "--machines",
        action="store_true",
        help="also list its instances on AWS, if its bucket is there",
    )
    add_region(parser)


def run(args: argparse.Namespace) -> int:
    url = resolve_run(args.run, args.bucket)
    machines_wanted = args.machines and url.startswith("s3://") and not is_embedded(url)
    if args.watch:
        with contextlib.suppress(KeyboardInterrupt):
            _watch(url, args.price)
        return 0
    try:
        status = describe(find_run(url)[0], time.time(), args.price)
        lines = _lines(status)
    except NotFound:
        # An instance takes minutes until it begins the run, and without capacity there is none.
        if not machines_wanted or not _is_launched(args.region, name_of(url)):
            raise
        status = {"run": name_of(url), "status": "not begun"}
        lines = [f"run      {url}: not begun yet"]
    if not args.json:
        print("\n".join(lines))  # before AWS is asked, which may refuse
    if machines_wanted:
        from wds_train.aws.account import Aws
        from wds_train.aws.stacks import machines

        status["machines"] = machines(Aws(args.region), name_of(url))
        if not args.json:
            print("\n".join(status["machines"]))
    if args.json:
        print(json.dumps(status, indent=1))
    return 0


def _is_launched(region: str | None, run: str) -> bool:
    from wds_train.aws.account import Aws
    from wds_train.aws.stacks import group

    return group(Aws(region), run) is not None


def _watch(url: str, price: float | None) -> None:
    """Show the run's state until it ends.

    In a terminal it is redrawn in one place; elsewhere a line is printed whenever it has changed.
    """
    above = 0  # lines of the last state, which the next one replaces
    shown = ""
    while True:
        status = describe(find_run(url)[0], time.time(), price)
        lines = _lines(status)
        line = _line(status)
        if sys.stdout.isatty():
            columns = shutil.get_terminal_size().columns - 1  # a line that wraps would take two
            go_up = f"\x1b[{above}F" if above else ""
            text = "\n".join(each[:columns] for each in lines)
            print(f"{go_up}\x1b[J{text}", flush=True)
            above = len(lines)
        elif line != shown:
            print(line, flush=True)
        if status["status"] not in ("running", "silent"):
            return
        shown = line
        time.sleep(WATCH_SECONDS)


def _line(status: dict[str, Any]) -> str:
    """Return the state in one line."""
    parts = [
        status["status"],
        f"step {status['step']}",
        f"epoch {status['epochs']}/{status['of_epochs']}",
    ]
    for name, value in status["metrics"].items():
        if "top1" in name:
            parts.append(f"{name} {value:.2f}")
    return f"{status['run']}: {', '.join(parts)}"


def describe(manifest: RunManifest, now: float, price: float | None) -> dict[str, Any]:
    """Return what `status --json` prints.

    Hours are those between each attempt's claim and its last sign of life; the paid time begins
    earlier, with the process. Ages compare the clocks of two machines, and are for people only.

    Args:
        manifest: The run's.
        now: The time, seconds since the epoch.
        price: Dollars of an instance hour. None: what each attempt noted.
    """
    newest = manifest.checkpoints[-1] if manifest.checkpoints else None
    totals = manifest.totals()
    hours = totals.seconds / 3600
    return {
        "run": manifest.run,
        "status": state_of(manifest, now),
        "step": newest.progress.step if newest else 0,
        "epochs": newest.progress.evaluated if newest else 0,
        "of_epochs": manifest.settings.schedule.epochs,
        "metrics": _newest_metrics(manifest),
        "owner": str(manifest.owner),
        "lease_s": manifest.lease,
        "lease_age_s": round(now - manifest.written, 1),
        "fence": manifest.fence,
        "attempts": totals.attempts,
        "interruptions": totals.interruptions,
        "failures": totals.failures,
        "rollbacks": manifest.rollbacks,
        "unsafe_store": manifest.unsafe_store,
        "differences": [asdict(each) for each in manifest.differences],
        "wandb": manifest.page.url or None,
        "hours": round(hours, 4),
        "dollars": _dollars(totals, price),
        "goodput": _goodput(where_time_went(manifest, now)),
        "checkpoints": [_row(checkpoint) for checkpoint in manifest.checkpoints],
        "best": _best_steps(manifest),
        "weights": _weights(manifest),
    }


def _dollars(totals: Totals, price: float | None) -> float | None:
    """Return what the run cost so far; None if nobody knows a price."""
    if price is not None:
        return round(totals.seconds / 3600 * price, 2)
    return round(totals.dollars, 2) if totals.dollars else None


def _best_steps(run: RunManifest) -> dict[str, int]:
    """Return the step of the best weights of each kind that was validated."""
    steps = {}
    for kind in SCORES:
        best = best_weights(run, [kind])
        if best:
            steps[kind] = best.checkpoint.progress.step
    return steps


def _goodput(parts: Parts) -> dict[str, Any]:
    """Return the share of the paid time that became steps of the run, and all parts of that time.

    `share` is None if no attempt noted where its time went. Parts are given in seconds and as
    shares.
    """
    return {
        "share": parts.goodput,
        "paid_s": round(parts.paid, 3),
        "seconds": {name: round(seconds, 3) for name, seconds in asdict(parts).items()},
        "shares": parts.shares(),
    }


def _newest_metrics(run: RunManifest) -> dict[str, float]:
    """Return the metrics of the last validation, without those that say nothing."""
    scored = [checkpoint for checkpoint in run.checkpoints if checkpoint.metrics]
    if not scored:
        return run.result or {}
    newest = scored[-1]
    return telling(run.result or newest.metrics, newest.progress.step, every_of(run.recipe))


def _weights(run: RunManifest) -> dict[str, Any] | None:
    """Return the weights that every command takes; None if nothing was validated."""
    found = best_weights(run)
    if found is None:
        return None
    progress = found.checkpoint.progress
    return {
        "kind": found.kind,
        "step": progress.step,
        "epoch": progress.evaluated,
        "top1": found.top1,
    }


def _row(checkpoint: Checkpoint) -> dict[str, Any]:
    return asdict(checkpoint.object) | {
        "step": checkpoint.progress.step,
        "epochs": checkpoint.progress.evaluated,
        "metrics": checkpoint.metrics,
    }


def _lines(status: dict[str, Any]) -> list[str]:
    """Return the state as a table for people."""
    scores = [f"{name} {value:.4g}" for name, value in status["metrics"].items()]
    megabytes = sum(row["bytes"] for row in status["checkpoints"]) / 1e6
    cost = "" if status["dollars"] is None else f", ${status['dollars']:.2f}"
    best = "none yet"
    weights = status["weights"]
    if weights:
        score = {SCORES[weights["kind"]]: weights["top1"]}
        best = describe_score(weights["kind"], weights["step"], weights["epoch"], score)
    heard = f"last heard of {status['lease_age_s']:.0f} s ago (lease {status['lease_s']:g} s)"
    ended = f"{status['interruptions']} interrupted, {status['failures']} failed"
    rows = [
        ["run", f"{status['run']}: {status['status']}"],
        [
            "progress",
            f"step {status['step']}, {status['epochs']} of {status['of_epochs']} epochs validated",
        ],
        ["metrics", ", ".join(scores) or "none yet"],
        ["best", best],
        ["owner", f"{status['owner']}, {heard}"],
        ["checkpoints", f"{len(status['checkpoints'])}, {megabytes:.1f} MB"],
        ["attempts", f"{status['attempts']}, of which {ended}"],
        ["time", f"{status['hours']:.2f} hours{cost}"],
        ["goodput", describe_goodput(Parts(**status["goodput"]["seconds"]))],
    ]
    # The rest is there only in some runs.
    if status["wandb"]:
        rows.append(["W&B", status["wandb"]])
    for found in status["differences"]:
        where = f"rank {found['rank']} on {found['host']}"
        differs = (
            f"step {found['step']} gave another result the second time: {found['tensor']}, {where}"
        )
        rows.append(["recheck", differs])
    if status["unsafe_store"]:
        warning = (
            "ignores conditional writes (--unsafe-store): never train this run twice at a time"
        )
        rows.append(["store", warning])
    return align_columns(rows)
