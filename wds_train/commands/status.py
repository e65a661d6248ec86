"""`wds-train status`: how far a run is, who trains it, what it cost."""

import argparse
import contextlib
import json
import shutil
import sys
import time
from dataclasses import asdict
from typing import Any

from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.goodput import Parts
from wds_train.checkpoint.run_manifest import Checkpoint, RunManifest, name_of
from wds_train.checkpoint.scores import SCORES, every_of, telling, told
from wds_train.checkpoint.standing import state_of, where_time_went
from wds_train.checkpoint.weight_choice import best_weights
from wds_train.commands.flags import add_region, add_run, dollars, run_url
from wds_train.errors import NotFound
from wds_train.report import goodput_words as goodput
from wds_train.storage.address import is_embedded

WATCH_SECONDS = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--watch", action="store_true", help="again every few seconds, until the run ends")
    parser.add_argument(
        "--price", type=dollars, metavar="USD", help="price of an instance hour, to sum up the cost so far"
    )
    parser.add_argument("--machines", action="store_true", help="and its instances on AWS, if its bucket is there")
    add_region(parser)


def run(args: argparse.Namespace) -> int:
    url = run_url(args.run, args.bucket)
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
        if not machines_wanted or not _launched(args.region, name_of(url)):
            raise
        status, lines = {"run": name_of(url), "status": "not begun"}, [f"run      {url}: not begun yet"]
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


def _launched(region: str | None, run: str) -> bool:
    from wds_train.aws.account import Aws
    from wds_train.aws.stacks import group

    return group(Aws(region), run) is not None


def _watch(url: str, price: float | None) -> None:
    """Show the run's state until it ends: in a terminal in one place, elsewhere a line whenever it has changed."""
    above, shown = 0, ""
    while True:
        status = describe(find_run(url)[0], time.time(), price)
        lines, line = _lines(status), _line(status)
        if sys.stdout.isatty():
            wide = shutil.get_terminal_size().columns - 1  # a line that wraps would take two
            print(f"\x1b[{above}F" * (above > 0) + "\x1b[J" + "\n".join(each[:wide] for each in lines), flush=True)
            above = len(lines)
        elif line != shown:
            print(line, flush=True)
        if status["status"] not in ("running", "silent"):
            return
        shown = line
        time.sleep(WATCH_SECONDS)


def _line(status: dict[str, Any]) -> str:
    top1 = "".join(f", {name} {value:.2f}" for name, value in status["metrics"].items() if "top1" in name)
    return f"{status['run']}: {status['status']}, step {status['step']}, epoch {status['epochs']}/{status['of_epochs']}{top1}"


def describe(manifest: RunManifest, now: float, price: float | None) -> dict[str, Any]:
    """What `status --json` prints, the status as `state_of` has it. Ages compare two machines' clocks and are for people
    only; hours are those between each attempt's claim and its last sign of life. The paid time begins earlier, with the
    process.
    """
    newest = manifest.checkpoints[-1] if manifest.checkpoints else None
    totals, silent_s = manifest.totals(), now - manifest.written
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
        "lease_age_s": round(silent_s, 1),
        "fence": manifest.fence,
        "attempts": totals.attempts,
        "interruptions": totals.interruptions,
        "failures": totals.failures,
        "rollbacks": manifest.rollbacks,
        "unsafe_store": manifest.unsafe_store,
        "differences": [asdict(each) for each in manifest.differences],
        "wandb": manifest.page.url or None,
        "hours": round(hours, 4),
        "dollars": round(hours * price, 2)
        if price is not None
        else round(totals.dollars, 2)
        if totals.dollars
        else None,
        "goodput": _goodput(where_time_went(manifest, now)),
        "checkpoints": [_row(checkpoint) for checkpoint in manifest.checkpoints],
        "best": {kind: found.checkpoint.progress.step for kind in SCORES if (found := best_weights(manifest, [kind]))},
        "weights": _weights(manifest),
    }


def _goodput(parts: Parts) -> dict[str, Any]:
    """The share of the paid time that became steps that count, and all parts of that time in seconds and as shares.

    `share` is None where no attempt noted where its time went.
    """
    return {
        "share": parts.goodput,
        "paid_s": round(parts.paid, 3),
        "seconds": {name: round(seconds, 3) for name, seconds in asdict(parts).items()},
        "shares": parts.shares(),
    }


def _newest_metrics(run: RunManifest) -> dict[str, float]:
    """Those of the last validation, without what says nothing."""
    scored = [checkpoint for checkpoint in run.checkpoints if checkpoint.metrics]
    metrics = run.result or (scored[-1].metrics if scored else {})
    return telling(metrics, scored[-1].progress.step, every_of(run.recipe)) if scored else metrics


def _weights(run: RunManifest) -> dict[str, Any] | None:
    """Those that every command takes, with their own score; None where nothing was validated."""
    if (found := best_weights(run)) is None:
        return None
    progress = found.checkpoint.progress
    return {"kind": found.kind, "step": progress.step, "epoch": progress.evaluated, "top1": found.top1}


def _row(checkpoint: Checkpoint) -> dict[str, Any]:
    return asdict(checkpoint.object) | {
        "step": checkpoint.progress.step,
        "epochs": checkpoint.progress.evaluated,
        "metrics": checkpoint.metrics,
    }


def _lines(status: dict[str, Any]) -> list[str]:
    scores = ", ".join(f"{name} {value:.4g}" for name, value in status["metrics"].items()) or "none yet"
    stored = sum(row["bytes"] for row in status["checkpoints"]) / 1e6
    dollars = "" if status["dollars"] is None else f", ${status['dollars']:.2f}"
    best = "none yet"
    if weights := status["weights"]:
        own = {SCORES[weights["kind"]]: weights["top1"]}
        best = told(weights["kind"], weights["step"], weights["epoch"], own)
    lines = [
        f"run          {status['run']}: {status['status']}",
        f"progress     step {status['step']}, {status['epochs']} of {status['of_epochs']} epochs validated",
        f"metrics      {scores}",
        f"best         {best}",
        f"owner        {status['owner']}, last heard of {status['lease_age_s']:.0f} s ago (lease {status['lease_s']:g} s)",
        f"checkpoints  {len(status['checkpoints'])}, {stored:.1f} MB",
        f"attempts     {status['attempts']}, of which {status['interruptions']} interrupted, {status['failures']} failed",
        f"time         {status['hours']:.2f} hours{dollars}",
        f"goodput      {goodput.told(Parts(**status['goodput']['seconds']))}",
    ]
    if status["wandb"]:
        lines.append(f"W&B          {status['wandb']}")
    for found in status["differences"]:
        where = f"rank {found['rank']} on {found['host']}"
        lines.append(
            f"recheck      step {found['step']} gave another result the second time: {found['tensor']}, {where}"
        )
    if status["unsafe_store"]:
        lines.append("store        ignores conditional writes (--unsafe-store): never train this run twice at a time")
    return lines
