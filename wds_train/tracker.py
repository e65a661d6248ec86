"""What a person sees of a training: a progress bar or sparse log lines, records for the run's metrics, and W&B."""

import contextlib
import logging
import netrc
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from tqdm import tqdm

from wds_train.devserver import home
from wds_train.state import RunManifest

LOG_SECONDS = 30.0  # between lines where there is no terminal
FINISH_SECONDS = 20.0  # for W&B to take what it has not yet, once the run is done
HASTY_SECONDS = 3.0  # the same, when the training was interrupted or failed
# Its own: 30 s to begin, and as long for the last records as anybody waits; without, `finish` waits for ever.
LIMITS: dict[str, Any] = {"init_timeout": 30, "finish_timeout": FINISH_SECONDS, "console": "off"}

Record = dict[str, Any]


def say(message: str) -> None:
    """A line for the person, above the progress bar if there is one."""
    with contextlib.suppress(OSError):  # a terminal that was closed must not end the training
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
        with contextlib.suppress(OSError):  # as `say`
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
    """Collects records for the next commit, and passes them on to W&B, whose troubles never reach the training: a thread
    makes every call of it, and records wait in a queue until W&B is there.
    """

    run: RunManifest
    pending: list[Record] = field(default_factory=list)
    where: str | None = None
    """The run's page, or the folder of an offline run; None without W&B."""
    _queue: SimpleQueue[Record | int] = field(default_factory=SimpleQueue)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def start(self) -> None:
        """Begin to pass records on. To be called once this process forks no more."""
        if os.environ.get("WANDB_MODE") != "disabled":
            self._thread = threading.Thread(target=self._pass_on, name="W&B", daemon=True)
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None and kind is not KeyboardInterrupt:
            seconds = FINISH_SECONDS if kind is None else HASTY_SECONDS
            self._queue.put(0 if kind is None else 1)
            self._thread.join(seconds)
            if self._thread.is_alive():
                say(f"W&B did not end within {seconds:g} s and is left behind; the metrics are with the run")

    def log(self, record: Record, timing: Record) -> None:
        """`record` is kept with the run and must be the same for a resumed and an unbroken run; `timing` need not."""
        self.pending.append(record)
        if self._thread is not None and self._thread.is_alive():
            self._queue.put(record | timing)

    def drain(self) -> list[Record]:
        records, self.pending = self.pending, []
        return records

    def _pass_on(self) -> None:
        """The body of the thread. W&B's exit code, an int, is the last that comes."""
        try:
            run = _begin(self.run, home())
            self.where = run.url or os.path.relpath(Path(run.dir).parent)
            while not isinstance(entry := self._queue.get(), int):
                run.log(entry)
            run.finish(exit_code=entry)
        except Exception as error:
            self.where = None
            say(f"W&B failed ({error}); training goes on without it, its metrics stay with the run")


def _begin(manifest: RunManifest, folder: Path) -> Any:
    """W&B's run: online with a login, offline where there is none, or no answer."""
    os.environ.setdefault("WANDB_SILENT", "true")
    logging.getLogger("wandb").setLevel(logging.ERROR)
    import wandb  # seconds, and only here: who disabled it does not wait

    folder.mkdir(parents=True, exist_ok=True)
    mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    try:
        run = wandb.init(**_settings(manifest, folder, mode), settings=wandb.Settings(**LIMITS))
    except Exception as error:
        if mode != "online":
            raise
        say(f"W&B does not answer ({error}); going on offline")
        run = wandb.init(**_settings(manifest, folder, "offline"), settings=wandb.Settings(**LIMITS))
    # Steps below W&B's own counter are dropped, and a resumed run logs some again: count by our step instead.
    run.define_metric("*", step_metric="step")
    return run


def _settings(run: RunManifest, folder: Path, mode: str) -> dict[str, Any]:
    """W&B ignores `resume` offline: each attempt gets an id, and they share a group."""
    identity = {"id": run.wandb_id, "resume": "allow"} if mode == "online" else {"id": f"{run.wandb_id}-{run.fence}"}
    return identity | {
        "project": os.environ.get("WANDB_PROJECT", "wds-train"),
        "name": run.run,
        "group": run.wandb_id,
        "dir": str(folder),
        "config": run.recipe | {"dataset": run.dataset},
        "mode": mode,
    }


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        return netrc.netrc().authenticators(host or "") is not None
    return False
