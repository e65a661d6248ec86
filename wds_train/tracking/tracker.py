"""Tracking of a training: collect its rows, and send them to Weights & Biases."""

import os
import shlex
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.console import say
from wds_train.dataset.manifest import ClassInfo
from wds_train.errors import Interrupted, NotFinite, RunError, StoppedByPerson
from wds_train.models.mistakes import Findings
from wds_train.tracking.metrics import Row
from wds_train.tracking.versions import revision, versions
from wds_train.tracking.wandb_board import Board, one_line, send, usual_mode
from wds_train.tracking.wandb_media import first_batch, tables, tiles
from wds_train.tracking.wandb_page import Change, PageError, RunPage

FINISH_SECONDS = 7.0  # for W&B to take what it has not yet, once the run is done
HASTY_SECONDS = 3.0  # the same, when the training was interrupted or failed
BACKLOG = 20  # entries that wait for W&B; with more, it gets no pictures

Pass = Callable[[Board], object]


@dataclass
class Tracker:
    """Collect rows for the next commit, and send them to W&B.

    W&B's errors never reach the training: a thread makes all calls, and rows wait in a queue until
    W&B is there.

    Args:
        run: The run.
        stop: Called when a person presses W&B's Stop button.
        pending: Rows for the next commit.
        where: The run's page, or the folder of an offline run; None without W&B.
    """

    run: Run
    stop: Callable[[], None]
    pending: list[Row] = field(default_factory=list)
    where: str | None = None
    _queue: SimpleQueue[Pass | None] = field(default_factory=SimpleQueue)
    _thread: threading.Thread | None = None
    _over: bool = False
    """Whether the last line about W&B was printed.

    Later errors only come from the process's end.
    """
    _saying: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Self:
        return self

    def start(self, history: list[Row], **details: Any) -> None:
        """Begin to send. Call it when this process forks no more.

        Args:
            history: The rows that are on S3 already.
            details: More fields of the configuration that W&B shows.
        """
        if os.environ.get("WANDB_MODE") != "disabled":
            self._thread = threading.Thread(
                target=self._pass_on, args=(history, details), name="W&B", daemon=True
            )
            self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None and kind is not KeyboardInterrupt:
            self._tell(partial(_alert, error=error))
            self._queue.put(None)
            seconds = FINISH_SECONDS if kind is None else HASTY_SECONDS
            self._thread.join(seconds)
            if self._thread.is_alive():
                self._warn(
                    f"W&B did not end within {seconds:g} s and is left behind; {_remedy(self.run)}",
                    last=True,
                )

    @property
    def watching(self) -> bool:
        """Whether W&B shows pictures at present."""
        return self._is_alive() and self._queue.qsize() < BACKLOG

    def _is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def log(self, row: Row) -> None:
        """Add a row to the next commit, and send it to W&B."""
        self.pending.append(row)
        self._tell(lambda board: board.log(row))

    def drain(self) -> list[Row]:
        """Return the rows for the next commit, and forget them."""
        rows = self.pending
        self.pending = []
        return rows

    def show_batch(self, images: Any) -> None:
        """Show uint8 images [n, height, width, 3] as the first that were trained on."""
        if self.watching:
            sheet = tiles(images)
            self._tell(lambda board: board.show(first_batch(sheet)))

    def show_findings(self, findings: Findings, classes: tuple[ClassInfo, ...]) -> None:
        """Show the mistakes of a validation, with the next row."""
        self._tell(lambda board: board.show(tables(findings, classes)))

    def _tell(self, what: Pass) -> None:
        if self._is_alive():
            self._queue.put(what)

    def _pass_on(self, history: list[Row], details: dict[str, Any]) -> None:
        """Send all that is queued, until None comes. This is the body of the thread."""
        try:
            board = self._open(details)
            self.where = board.where
            send(board, history)
            step = self.run.manifest.attempts[-1].step
            if step:
                board.alert("resumed", f"{self.run.manifest.run} goes on at step {step}")
            for call in iter(self._queue.get, None):
                call(board)
            board.finish(self.run.manifest, self.run.store.url)
        except TimeoutError:
            self._warn(f"W&B has not taken all; {_remedy(self.run)}", last=True)
        except PageError as error:
            self._warn(f"{error}; the run does not need it; {_remedy(self.run)}", last=True)
        except Exception as error:
            self.where = None
            self._warn(
                f"W&B failed ({one_line(error)}); the run does not need it; {_remedy(self.run)}",
                last=True,
            )

    def _open(self, details: dict[str, Any]) -> Board:
        """Open the run's page: online with a login, offline without one or where W&B refuses."""
        config = {"git": revision(), "versions": versions()} | details
        page = RunPage(self.run.manifest, self.run.store.url, self._amend, self._warn)
        page.settle()
        opened = partial(page.open, config=config, finish_timeout=FINISH_SECONDS, stop_fn=self.stop)
        mode = usual_mode()
        try:
            return opened(mode)
        except PageError as error:
            if mode != "online":
                raise
            self._warn(f"{error}; going on offline; {_remedy(self.run)}")
            return opened("offline")

    def _amend(self, change: Change) -> RunManifest:
        """Write the manifest as the run's owner.

        That fails if another process owns the run by now.
        """
        writer = self.run.writer
        if writer.closed.is_set() and writer.manifest.unsafe_store:
            raise RunError("the training has ended, and the store could not refuse a late write")
        writer.write(change)
        return writer.manifest

    def _warn(self, message: str, *, last: bool = False) -> None:
        """Print a line, unless the `last` one was printed. Two threads may call it at a time."""
        with self._saying:
            if not self._over:
                say(message)
            self._over = self._over or last


def _alert(board: Board, error: BaseException | None) -> None:
    """Tell W&B's user how the training ended."""
    if error is None:
        board.alert("done", "the training is done")
    elif isinstance(error, NotFinite) or isinstance(error.__cause__, NotFinite):
        board.alert("not finite", str(error), "ERROR")
    elif isinstance(error, Interrupted):
        board.alert("interrupted", str(error), "WARN")
    else:
        board.alert(
            "stopped" if isinstance(error, StoppedByPerson) else "failed", str(error), "ERROR"
        )


def _remedy(run: Run) -> str:
    command = f"wds-train wandb {shlex.quote(run.store.url)}"
    return f"the metrics are with the run, and `{command}` sends what is missing"
