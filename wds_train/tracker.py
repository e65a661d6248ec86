"""What a person sees of a training: a progress bar or sparse log lines, records for the run's metrics, and W&B."""

import contextlib
import logging
import netrc
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import wandb
from tqdm import tqdm

from wds_train.state import RunManifest

LOG_SECONDS = 30.0  # between lines where there is no terminal

Record = dict[str, Any]


def say(message: str) -> None:
    """A line for the person, above the progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)


class Progress:
    """A bar over all steps in a terminal; elsewhere a line every LOG_SECONDS."""

    def __init__(self, total: int, done: int, batch: int, *, shown: bool = True) -> None:
        self._batch, self._total, self._shown = batch, total, shown
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            disable=not (shown and sys.stderr.isatty()),
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% {bar} step {n_fmt}/{total_fmt}, {remaining} left{postfix}",
        )
        self._start, self._first = time.monotonic(), done
        self._next_line = self._start + LOG_SECONDS

    def step(self, done: int, loss: float | None) -> None:
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._start, 1e-9)
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {rate * self._batch:.0f} img/s", refresh=False)
        self._bar.update(done - self._bar.n)
        if self._shown and self._bar.disable and now >= self._next_line:
            left = (self._total - done) / max(rate, 1e-9)
            shown = "" if loss is None else f", loss {loss:.3f}"
            say(f"step {done}/{self._total}{shown}, {rate * self._batch:.0f} img/s, {left / 60:.0f} min left")
            self._next_line = now + LOG_SECONDS

    def close(self) -> None:
        self._bar.close()


@dataclass
class Tracker:
    """Collects records for the next commit, and passes them on to W&B, whose troubles never reach the training."""

    run: RunManifest
    folder: Path
    pending: list[Record] = field(default_factory=list)
    _wandb: Any = None

    def __enter__(self) -> Self:
        with self._harmless("start"):
            self.folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("WANDB_SILENT", "true")
            logging.getLogger("wandb").setLevel(logging.ERROR)
            self._wandb = wandb.init(**_wandb_settings(self.run, self.folder))
            # Steps below W&B's own counter are dropped, and a resumed run logs some again: count by our step instead.
            self._wandb.define_metric("*", step_metric="step")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wandb is not None:
            with self._harmless("finish"):
                self._wandb.finish(exit_code=0 if kind is None else 1)

    def log(self, record: Record, timing: Record) -> None:
        """`record` is kept with the run and must be the same for a resumed and an unbroken run; `timing` need not."""
        self.pending.append(record)
        if self._wandb is not None:
            with self._harmless("log"):
                self._wandb.log(record | timing)

    def drain(self) -> list[Record]:
        records, self.pending = self.pending, []
        return records

    @property
    def where(self) -> str | None:
        """The run's page, or the folder of an offline run; None without W&B."""
        return None if self._wandb is None else self._wandb.url or os.path.relpath(Path(self._wandb.dir).parent)

    @contextlib.contextmanager
    def _harmless(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._wandb = None
            say(f"W&B: {what} failed ({error}); training goes on without it, its metrics stay with the run")


def _wandb_settings(run: RunManifest, folder: Path) -> dict[str, Any]:
    """Online with a login, else offline. W&B ignores `resume` offline: each attempt gets an id, and they share a group."""
    mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    identity = {"id": run.wandb_id, "resume": "allow"} if mode == "online" else {"id": f"{run.wandb_id}-{run.fence}"}
    return identity | {
        "project": os.environ.get("WANDB_PROJECT", "wds-train"),
        "name": run.run,
        "group": run.wandb_id,
        "dir": str(folder),
        "config": run.recipe | {"dataset": run.dataset},
        "mode": mode,
        "settings": wandb.Settings(init_timeout=30, console="off"),
    }


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        return netrc.netrc().authenticators(host or "") is not None
    return False
