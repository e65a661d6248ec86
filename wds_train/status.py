"""Looking at runs, and taking what they hold: `wds-train status`, `checkpoints`, `rollback` and `export`."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wds_train.errors import NotFound, RunError, UsageError
from wds_train.lease import is_gone, read_run
from wds_train.state import Checkpoint, RunManifest, best
from wds_train.store import Store, open_store

SCORES = {"raw": "val/top1", "ema": "val/top1_ema"}


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--price", type=_dollars, metavar="USD", help="price of an instance hour, to sum up the cost so far"
    )


def _dollars(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a price: give dollars per hour, 0 or more")
    return value


def add_rollback_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=int, required=True, metavar="STEP", help="the step of one of its checkpoints")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--best", choices=SCORES, default="ema", help="which weights, by default of their best epoch")
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint of this step instead")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="a .safetensors file")


def run_status(args: argparse.Namespace) -> int:
    manifest, _ = find_run(args.run)
    status = describe(manifest, time.time(), args.price)
    print(json.dumps(status, indent=1) if args.json else "\n".join(_lines(status)))
    return 0


def run_checkpoints(args: argparse.Namespace) -> int:
    manifest, _ = find_run(args.run)
    print("step\tepochs\tMB\ttop-1\tEMA top-1\tkey")
    for checkpoint in manifest.checkpoints:
        scores = [f"{score[name]:.2f}" if name in (score := checkpoint.metrics) else "-" for name in SCORES.values()]
        size = f"{checkpoint.object.bytes / 1e6:.1f}"
        print(checkpoint.progress.step, checkpoint.progress.evaluated, size, *scores, checkpoint.object.key, sep="\t")
    return 0


def run_rollback(args: argparse.Namespace) -> int:
    from wds_train.checkpoint import Run

    _, store = find_run(args.run)
    before, after = Run.roll_back(store, args.to, print)
    if after == before:
        print(f"{store.url} is done, and step {args.to} its last; nothing is changed")
        return 0
    dropped = f"{len(before.checkpoints) - len(after.checkpoints)} newer checkpoints"
    print(f"{store.url} is at step {args.to} again, without {dropped}; the next `wds-train train` goes on from there")
    return 0


def run_verify(url: str) -> int:
    """Read all that a run names; a line for each object that is damaged, and the checkpoint that a resume would use."""
    from wds_train.checkpoint import flaw_of, read_records

    manifest, store = find_run(url)
    flaws = [flaw_of(store, manifest, checkpoint) for checkpoint in manifest.checkpoints]
    usable = [c for c, flaw in zip(manifest.checkpoints, flaws, strict=True) if flaw is None]
    damaged = [str(flaw) for flaw in flaws if flaw is not None]
    for segment in manifest.metrics:
        try:
            read_records(store, segment)
        except RunError as error:
            damaged.append(str(error))
    for line in damaged:
        print(line)
    size = sum(named.bytes for named in manifest.objects)
    state = f"{len(damaged)} damaged" if damaged else "whole"
    print(
        f"{store.url}: {state}; {len(manifest.checkpoints)} checkpoints, {len(manifest.metrics)} segments of metrics, "
        f"{size / 1e6:,.1f} MB"
    )
    if usable:
        print(f"a resume uses the checkpoint of step {usable[-1].progress.step}, {usable[-1].object.key}")
    else:
        print(
            "there is no checkpoint that a resume could use"
            if damaged
            else "a resume begins anew: nothing is committed"
        )
    return 1 if damaged else 0


def run_export(args: argparse.Namespace) -> int:
    from wds_train.weights import SUFFIX, Weights

    if args.to.suffix != SUFFIX:
        raise UsageError(f"--to {args.to} must end in {SUFFIX}")
    if not args.to.parent.is_dir():
        raise UsageError(f"--to {args.to}: there is no folder {args.to.parent}; make it first")
    manifest, store = find_run(args.run)
    weights = Weights.of_checkpoint(store, manifest, choose(manifest, args.best, args.step), args.best)
    weights.save(args.to)
    scores = ", ".join(f"{name} {value:.2f}" for name, value in weights.metrics.items()) or "not validated"
    print(f"{args.to}: {weights.kind} weights of step {weights.step} ({scores})")
    print(f"load it with {weights.timm_call(args.to)}")
    return 0


def describe(manifest: RunManifest, now: float, price: float | None) -> dict[str, Any]:
    """What `status --json` prints. A run's status is the manifest's, but for a "running" one whose process is gone
    ("lost") or has written nothing for longer than its lease ("silent"): a kill, or a store that fails, leaves no last
    word. Ages compare two machines' clocks and are for people only; hours are those between each attempt's claim and its
    last sign of life.
    """
    newest = manifest.checkpoints[-1] if manifest.checkpoints else None
    scored = [checkpoint for checkpoint in manifest.checkpoints if checkpoint.metrics]
    totals, silent_s = manifest.totals(), now - manifest.written
    hours = totals.seconds / 3600
    status = manifest.status
    if status == "running" and is_gone(manifest.owner):
        status = "lost"
    elif status == "running" and silent_s > manifest.lease:
        status = "silent"
    return {
        "run": manifest.run,
        "status": status,
        "step": newest.progress.step if newest else 0,
        "epochs": newest.progress.evaluated if newest else 0,
        "of_epochs": manifest.settings.schedule.epochs,
        "metrics": manifest.result or (scored[-1].metrics if scored else {}),
        "owner": str(manifest.owner),
        "lease_s": manifest.lease,
        "lease_age_s": round(silent_s, 1),
        "fence": manifest.fence,
        "attempts": totals.attempts,
        "interruptions": totals.interruptions,
        "failures": totals.failures,
        "rollbacks": manifest.rollbacks,
        "hours": round(hours, 4),
        "dollars": None if price is None else round(hours * price, 2),
        "checkpoints": [_row(checkpoint) for checkpoint in manifest.checkpoints],
        "best": {
            kind: found.progress.step for kind, name in SCORES.items() if (found := best(manifest.checkpoints, name))
        },
    }


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
    return [
        f"run          {status['run']}: {status['status']}",
        f"progress     step {status['step']}, {status['epochs']} of {status['of_epochs']} epochs validated",
        f"metrics      {scores}",
        f"owner        {status['owner']}, last heard of {status['lease_age_s']:.0f} s ago (lease {status['lease_s']:g} s)",
        f"checkpoints  {len(status['checkpoints'])}, {stored:.1f} MB",
        f"attempts     {status['attempts']}, of which {status['interruptions']} interrupted, {status['failures']} failed",
        f"time         {status['hours']:.2f} hours{dollars}",
    ]


def find_run(url: str) -> tuple[RunManifest, Store]:
    """The run at `url`; `NotFound` when there is none."""
    store = open_store(url)
    try:
        return read_run(store)[0], store
    except NotFound as error:
        raise NotFound(f"there is no run at {store.url} (no manifest.json); check the address") from error


def choose(manifest: RunManifest, kind: str, step: int | None) -> Checkpoint:
    """The checkpoint of `step`, or else the one whose `kind` weights had the best validation."""
    if step is not None:
        return manifest.back_to(step).checkpoints[-1]
    found = best(manifest.checkpoints, SCORES[kind])
    if found is None:
        raise UsageError(f"run {manifest.run} has no validated checkpoint yet; choose one by --step, or wait")
    return found
