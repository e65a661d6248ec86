"""Records of a training: collected for the run's metrics, and passed on to Weights & Biases."""

import contextlib
import logging
import netrc
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from wds_train.checkpoint.manifest import RunManifest
from wds_train.home import home
from wds_train.tracking.console import say
from wds_train.tracking.records import Row

FINISH_SECONDS = 20.0  # for W&B to take what it has not yet, once the run is done
HASTY_SECONDS = 3.0  # the same, when the training was interrupted or failed
# Its own: 30 s to begin, and as long for the last records as anybody waits; without, `finish` waits for ever.
LIMITS: dict[str, Any] = {"init_timeout": 30, "finish_timeout": FINISH_SECONDS, "console": "off"}


@dataclass
class Tracker:
    """Collects rows for the next commit, and passes them on to W&B, whose troubles never reach the training: a thread
    makes every call of it, and records wait in a queue until W&B is there.
    """

    run: RunManifest
    pending: list[Row] = field(default_factory=list)
    where: str | None = None
    """The run's page, or the folder of an offline run; None without W&B."""
    _queue: SimpleQueue[Row | int] = field(default_factory=SimpleQueue)
    _thread: threading.Thread | None = None
    _left_behind: bool = False

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
                self._left_behind = True
                say(f"W&B did not end within {seconds:g} s and is left behind; the metrics are with the run")

    def log(self, row: Row) -> None:
        self.pending.append(row)
        if self._thread is not None and self._thread.is_alive():
            self._queue.put(row)

    def drain(self) -> list[Row]:
        rows, self.pending = self.pending, []
        return rows

    def _pass_on(self) -> None:
        """The body of the thread. W&B's exit code, an int, is the last that comes."""
        try:
            run = _begin(self.run, home(), self._warn)
            self.where = run.url or os.path.relpath(Path(run.dir).parent)
            while not isinstance(entry := self._queue.get(), int):
                run.log(entry)
            run.finish(exit_code=entry)
        except Exception as error:
            self.where = None
            self._warn(f"W&B failed ({error}); training goes on without it, its metrics stay with the run")

    def _warn(self, message: str) -> None:
        """Nothing more, once it was said that W&B is left behind: the end of the process breaks what it is at."""
        if not self._left_behind:
            say(message)


def _begin(manifest: RunManifest, folder: Path, warn: Callable[[str], None]) -> Any:
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
        warn(f"W&B does not answer ({error}); going on offline")
        run = wandb.init(**_settings(manifest, folder, "offline"), settings=wandb.Settings(**LIMITS))
    # Steps below W&B's own counter are dropped, and a resumed run logs some again: count by our step instead.
    run.define_metric("*", step_metric="step")
    return run


def _settings(run: RunManifest, folder: Path, mode: str) -> dict[str, Any]:
    """What W&B is told of the run. It ignores `resume` offline: each attempt gets an id, and they share a group."""
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
