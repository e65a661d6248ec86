"""Upload rows of metrics ahead of the commit that they belong to.

So the rows of a killed attempt outlive it, for its curves and its report.
"""

import threading
from functools import partial
from typing import Any

from wds_train.checkpoint.committer import encode_rows
from wds_train.checkpoint.lease import Say
from wds_train.checkpoint.run_manifest import (
    Progress,
    RunManifest,
    Segment,
    describe_object,
    place_of,
)
from wds_train.checkpoint.writer import Writer
from wds_train.errors import Interrupted, RunError

# A kill loses the rows of so many seconds. Each upload is two requests: $0.0012 an hour.
EVERY_SECONDS = 30.0


class MetricsUploader:
    """Uploads the newest rows now and then, in a thread: no step and no commit waits for it.

    Args:
        writer: The writer of the run's manifest, which names the rows.
        say: Called with a line when rows could not be uploaded.
    """

    def __init__(self, writer: Writer, say: Say) -> None:
        self._writer = writer
        self._say = say
        self._rows: list[tuple[dict[str, Any], Progress]] = []

    def start(self) -> None:
        """Start the thread. This process must not fork any more."""
        if self._writer.leads:
            threading.Thread(target=self._work, name="rows", daemon=True).start()

    def log(self, row: dict[str, Any], at: Progress) -> None:
        """Keep a row, which was logged at the progress `at`, for the next upload."""
        if self._writer.leads:
            self._rows.append((row, at))

    def _work(self) -> None:
        """Upload the rows every EVERY_SECONDS: the body of the thread."""
        while not self._writer.closed.wait(EVERY_SECONDS):
            try:
                self._put(len(self._rows))
            except (Interrupted, RunError) as error:
                # The run is not ours any more: the training ends at its next look.
                self._writer.fatal = error
                return
            except Exception as error:
                self._say(f"the newest rows of the metrics wait for the next commit ({error})")

    def _put(self, count: int) -> None:
        """Upload the first `count` rows, unless a commit was faster."""
        writer = self._writer
        rows = self._rows[:count]

        # Leave out those that a commit holds by now.
        checkpoints = writer.manifest.checkpoints
        ahead = []
        for row, at in rows:
            if not checkpoints or not _covers(checkpoints[-1].progress, at):
                ahead.append(row)

        # Upload the others, then name them in the manifest.
        if ahead:
            _, last = rows[-1]
            lines = encode_rows(ahead)
            key = f"metrics/{place_of(writer.manifest.fence, last)}-ahead.jsonl"
            writer.store.write(key, lines, if_absent=True)
            segment = Segment(describe_object(key, lines), last.step, last.evaluated)
            writer.write(partial(RunManifest.with_ahead, segment=segment))
        # Only now: after a failure they are uploaded by the next round.
        del self._rows[:count]


def _covers(done: Progress, at: Progress) -> bool:
    """Return True if a commit at `done` holds the rows that were logged at `at`."""
    return (done.step, done.evaluated) >= (at.step, at.evaluated)
