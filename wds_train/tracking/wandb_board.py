"""A run's page in Weights & Biases, made from the rows that are on S3."""

import contextlib
import logging
import netrc
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from wds_train.checkpoint.find import where_time_went
from wds_train.checkpoint.goodput import Parts
from wds_train.checkpoint.run_manifest import Page, RunManifest
from wds_train.checkpoint.weight_choice import best_weights
from wds_train.files import home
from wds_train.tracking.metrics import Row

INIT_SECONDS = 30.0  # for W&B's server to answer
GROUPS = ("train", "epoch", "val", "time", "commit", "s3", "gpu")
BEST = {
    "val/top1": "max",
    "val/top1_ema": "max",
    "val/top5": "max",
    "val/top5_ema": "max",
    "val/loss": "min",
}


class Board:
    """A run of W&B, whose steps are those of the optimizer.

    Rows that W&B has already are skipped, so that the same ones may be logged again.

    Args:
        run: The run, as `wandb.init` returns it.
    """

    def __init__(self, run: Any) -> None:
        self.sent = 0
        self._run = run
        self._next = run.starting_step
        self._row: Row = {}
        self._pictures: dict[str, Any] = {}

    @classmethod
    def open(
        cls, manifest: RunManifest, mode: Any, config: dict[str, Any], **settings: Any
    ) -> Self:
        """Open the page whose id, project and entity the manifest holds, be it new or not.

        Args:
            mode: "online", or "offline" for a folder below `home()`.
            config: What the page shows besides the recipe and the dataset.
            settings: More fields of `wandb.Settings`.

        Raises:
            Exception: Whatever W&B raises; `tracking.page` makes a sentence of it.
        """
        os.environ.setdefault("WANDB_SILENT", "true")
        # Otherwise it reports to its maker even when offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        logging.getLogger("wandb").setLevel(logging.ERROR)
        import wandb  # takes seconds, and only if W&B is not disabled

        home().mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            id=manifest.wandb_id,
            resume="allow" if mode == "online" else None,
            project=manifest.page.project,
            entity=manifest.page.entity or None,
            name=manifest.run,
            dir=str(home()),
            config=manifest.recipe | {"dataset": manifest.dataset} | config,
            mode=mode,
            settings=wandb.Settings(
                console="off", init_timeout=INIT_SECONDS, finish_timeout_raises=True, **settings
            ),
        )
        for group in GROUPS:
            run.define_metric(f"{group}/*", step_metric="train/step")
        for name, kind in BEST.items():
            run.define_metric(name, step_metric="train/step", summary=kind)
        return cls(run)

    @staticmethod
    def forget() -> None:
        """End W&B's service, which would hold a run that could not be opened for ever."""
        import wandb

        wandb.teardown()

    @property
    def page(self) -> Page:
        """The page that W&B has opened; what W&B does not say offline is ""."""
        return Page(self._run.project or "", self._run.entity or "", self._run.url or "")

    @property
    def where(self) -> str:
        """The page's address, or the folder of an offline run."""
        return self._run.url or os.path.relpath(Path(self._run.dir).parent)

    def log(self, row: Row) -> None:
        """Send a row.

        That of an epoch's last step waits for the validation's, which has the same step.
        """
        if self._row and self._row["step"] != row["step"]:
            self._send()
        self._row = self._row | row
        if not float(row["epoch"]).is_integer() or "epoch/loss" in row:
            self._send()

    def show(self, pictures: dict[str, Any]) -> None:
        """Add pictures or tables to the row that is sent next."""
        self._pictures |= pictures

    def _send(self) -> None:
        row = dict(self._row)
        pictures = self._pictures
        self._row = {}
        self._pictures = {}
        step = int(row.pop("step"))
        logged = row.pop("time/unix", None)
        if step < self._next:  # W&B has it already
            return
        values = {"train/step": step} | row | pictures
        if logged is not None:
            values["_timestamp"] = logged
        self._run.log(values, step=step, commit=True)
        self._next = step + 1
        self.sent += 1

    def alert(self, title: str, text: str, level: str = "INFO") -> None:
        """Let W&B notify its user, in the way that they chose there."""
        self._run.alert(title, text, level=level, wait_duration=0)

    def finish(self, manifest: RunManifest, url: str) -> None:
        """Write the run's sums, and let W&B send the rest.

        Args:
            manifest: The run's.
            url: The run's address.

        Raises:
            TimeoutError: It takes too long.
        """
        totals = manifest.totals()
        sums = {
            "attempts": totals.attempts,
            "interruptions": totals.interruptions,
            "hours": totals.seconds / 3600,
        }
        if totals.dollars:
            sums["dollars"] = totals.dollars
        self._run.summary.update(sums)
        self._run.summary.update(_goodput(where_time_went(manifest, time.time())))
        if manifest.status == "done":
            self._refer(manifest, url)
        elif manifest.status in ("running", "interrupted"):
            self._run.mark_preempting()  # or the exit code would say that it failed
        self._run.finish(exit_code=0 if manifest.status == "done" else 1)

    def _refer(self, manifest: RunManifest, url: str) -> None:
        """Add the address of the checkpoint with the best weights. Nothing is read or copied."""
        chosen = best_weights(manifest)
        if chosen is None or not url.startswith("s3://"):
            return
        import wandb

        metadata = {"weights": chosen.kind} | chosen.metrics
        artifact = wandb.Artifact(f"{manifest.run}-best", "model", metadata=metadata)
        artifact.add_reference(f"{url}/{chosen.checkpoint.object.key}", checksum=False)
        self._run.log_artifact(artifact)


def _goodput(parts: Parts) -> dict[str, float]:
    """Return the parts of the paid time as shares; nothing if no attempt noted them."""
    if parts.goodput is None:
        return {}
    summary = {"goodput": parts.goodput, "paid_hours": parts.paid / 3600}
    for name, share in parts.shares().items():
        if name != "steps":  # that is the goodput
            summary[f"goodput/{name}"] = share
    return summary


def usual_mode() -> str:
    """Return $WANDB_MODE; without it "online" with a login, and "offline" without one."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return mode
    return "online" if _is_logged_in() else "offline"


def send(board: Board, rows: Iterable[Row]) -> None:
    """Log all rows that have a step and an epoch."""
    for row in rows:
        if "step" in row and "epoch" in row:
            board.log(row)


def one_line(error: Exception) -> str:
    """Return the text of an error on one line."""
    return " ".join(str(error).split())


def _is_logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        return netrc.netrc().authenticators(host or "") is not None
    return False
