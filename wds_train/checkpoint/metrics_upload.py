"""Rows of metrics on S3 before the commit that they belong to, so that those of a killed attempt outlive it."""

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


class Ahead:
    """Puts what was logged since it last did so, in a thread of its own: no step and no commit waits for it."""

    def __init__(self, writer: Writer, say: Say) -> None:
        self._writer, self._say = writer, say
        self._rows: list[tuple[dict[str, Any], Progress]] = []

    def start(self) -> None:
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
        """Put the first `count` rows, unless a commit was faster."""
        rows, writer = self._rows[:count], self._writer
        newest = [checkpoint.progress for checkpoint in writer.manifest.checkpoints[-1:]]
        ahead = [row for row, at in rows if not any(_covers(done, at) for done in newest)]
        if ahead:
            lines, at = "".join(json.dumps(row) + "\n" for row in ahead).encode(), rows[-1][1]
            key = f"metrics/{writer.manifest.fence:06d}-{at.step:09d}-{at.evaluated:06d}-ahead.jsonl"
            writer.store.write(key, lines, if_absent=True)
            segment = Segment(Object(key, len(lines), hashlib.sha256(lines).hexdigest()), at.step, at.evaluated)
            writer.write(partial(RunManifest.with_ahead, segment=segment))
        del self._rows[:count]


def _covers(done: Progress, at: Progress) -> bool:
    return (done.step, done.evaluated) >= (at.step, at.evaluated)
