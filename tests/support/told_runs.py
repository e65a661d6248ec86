"""A run as a training leaves it in a local directory, made in no time: a manifest and its segments of metrics."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wds_train.checkpoint.run_manifest import Attempt, Object, RunManifest, Segment
from wds_train.config.presets import preset
from wds_train.config.recipe import Recipe
from wds_train.config.settings import with_settings

BEGAN, STEPS, LOGGED = 1_700_000_000.0, 20, 5  # Unix time; of an epoch; between two rows


@dataclass(frozen=True)
class Paid(Attempt):
    """An attempt that noted its price and its first step."""

    price: float | None = 0.5
    hardware: str = "NVIDIA A10G"
    instance: str = "g5.2xlarge"
    step: int = 0


def recipe_of(name: str = "standard", **settings: Any) -> Recipe:
    return with_settings(
        preset(name), [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    )


def row_of(step: int, attempt: int, now: float) -> dict[str, float]:
    """A training step's."""
    return {
        "step": step,
        "epoch": step / STEPS,
        "train/loss": 6 * math.exp(-step / 400) + 1 + 0.2 * math.sin(step),
        "train/lr": 0.4 / (1 + step),
        "train/grad_norm": 1.0 + step,
        "train/resolution": 160 if step < 600 else 192,
        "time/unix": now,
        "time/attempt": attempt,
        "time/img_s": 900 + 30 * math.cos(step),
        "time/data_wait": 0.02,
    }


def validation_of(step: int, now: float) -> dict[str, float]:
    top1 = 78 * (1 - math.exp(-step / 250))
    losses = {
        "val/loss": 7 * math.exp(-step / 400) + 0.9,
        "val/loss_ema": 7 * math.exp(-step / 350) + 0.9,
    }
    tops = {
        "val/top1": top1,
        "val/top1_ema": top1 + 0.4,
        "val/top5": top1 + 15,
        "val/top5_ema": top1 + 15.5,
    }
    own = {
        "step": step,
        "epoch": step / STEPS,
        "epoch/loss": 6 * math.exp(-step / 400) + 1,
        "epoch/lost": 0,
    }
    return own | losses | tops | {"time/unix": now}


def history_of(epochs: int, attempt: int = 1) -> list[dict[str, float]]:
    """A minute for each row."""
    rows: list[dict[str, float]] = []
    for step in range(LOGGED, epochs * STEPS + 1, LOGGED):
        now = BEGAN + 60 * (len(rows) + 1)
        rows.append(row_of(step, attempt, now))
        if step % STEPS == 0:
            rows.append(validation_of(step, now))
    return rows


def make_run(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    *,
    recipe: Recipe | None = None,
    attempts: Sequence[Attempt] = (Attempt("vm", BEGAN, 3600.0, "interrupted"),),
    **changes: Any,
) -> RunManifest:
    """The manifest of a run written to `folder`, a segment of metrics for every ten rows. Only plain attempts are written."""
    segments = []
    for first in range(0, len(rows), 10):
        data = "".join(json.dumps(row) + "\n" for row in rows[first : first + 10]).encode()
        key = f"metrics/000001-{first:09d}-000001.jsonl"
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)
        segments.append(Segment(Object(key, len(data), hashlib.sha256(data).hexdigest()), first, 0))
    dataset = {
        "url": str(folder / "no-dataset"),
        "fingerprint": "f" * 64,
        "classes": 1000,
        "mix": [],
    }
    manifest = RunManifest(
        folder.name,
        (recipe or recipe_of()).to_dict(),
        dataset,
        "id",
        fence=len(attempts),
        written=BEGAN,
        status="interrupted",
        metrics=tuple(segments),
        attempts=tuple(attempts),
    )
    manifest = replace(manifest, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    plain = tuple(
        Attempt(each.host, each.started, each.seconds, each.ended) for each in manifest.attempts
    )
    (folder / "manifest.json").write_bytes(replace(manifest, attempts=plain).to_json())
    return manifest


def make_long_run(folder: Path) -> Path:
    """Thirty-seven epochs of a run that goes on."""
    attempts = [
        Attempt("one", BEGAN, 4800.0, "lost"),
        Attempt("two", BEGAN + 6000, 3600.0, "running"),
    ]
    make_run(folder, history_of(37), attempts=attempts, status="running")
    return folder


def make_newer(run: Path) -> None:
    """The recipe gets a field that this version does not know."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["recipe"]["optimizer"]["newer"] = 1
    (run / "manifest.json").write_text(json.dumps(manifest))
