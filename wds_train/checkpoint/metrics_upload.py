"""Rows of metrics on S3 before the commit that they belong to.

Those of a killed attempt outlive it.
"""

import hashlib
import json
import threading
from functools import partial
from typing import Any

from wds_train.checkpoint.lease import Say
from wds_train.checkpoint.run_manifest import Object, Progress, RunManifest, Segment
from wds_train.checkpoint.writer import Writer
from wds_train.errors import Interrupted, RunError

EVERY_SECONDS = 30.0  # two requests: $0.0012 an hour


class MetricsUploader:
    """Uploads the newest rows now and then, in a thread: no step and no commit waits for it.

    Args:
        writer: The writer of the run's manifest, which names the rows.
        say: Told when rows could not be uploaded.
    """

    def __init__(self, writer: Writer, say: Say) -> None:
        self._writer = writer
        self._say = say
        self._rows: list[tuple[dict[str, Any], Progress]] = []

    def start(self) -> None:
        """Begin to upload. This process must not fork any more."""
        if self._writer.leads:
            threading.Thread(target=self._work, name="rows", daemon=True).start()

    def log(self, row: dict[str, Any], at: Progress) -> None:
        """Note a row, which was logged at `at`."""
        if self._writer.leads:
            self._rows.append((row, at))

    def _work(self) -> None:
        while not self._writer.closed.wait(EVERY_SECONDS):
            try:
                self._put(len(self._rows))
            except (Interrupted, RunError) as error:  # the run is not ours any more
                self._writer.fatal = error
                return
            except Exception as error:
                self._say(f"the newest rows of the metrics wait for the next commit ({error})")

    def _put(self, count: int) -> None:
        """Upload the first `count` rows, unless a commit was faster."""
        writer = self._writer
        rows = self._rows[:count]
        checkpoints = writer.manifest.checkpoints
        ahead = []
        for row, at in rows:
            if not checkpoints or not _covers(checkpoints[-1].progress, at):
                ahead.append(row)
        if ahead:
            _, last = rows[-1]
            lines = "".join(json.dumps(row) + "\n" for row in ahead).encode()
            place = f"{writer.manifest.fence:06d}-{last.step:09d}-{last.evaluated:06d}"
            key = f"metrics/{place}-ahead.jsonl"
            writer.store.write(key, lines, if_absent=True)
            described = Object(key, len(lines), hashlib.sha256(lines).hexdigest())
            segment = Segment(described, last.step, last.evaluated)
            writer.write(partial(RunManifest.with_ahead, segment=segment))
        del self._rows[:count]


def _covers(done: Progress, at: Progress) -> bool:
    return (done.step, done.evaluated) >= (at.step, at.evaluated)
