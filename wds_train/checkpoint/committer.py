"""Commits in the background.

Announce, upload the metrics and the checkpoint, swap the manifest, delete what it dropped.

The announcement puts keys, sizes and digests of what goes up next into the manifest, as `pending`.
If the process is killed between the upload and the swap, the next owner can tell by them whether
all of it arrived, and adopt it.
"""

import hashlib
import json
import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

from wds_train.checkpoint.goodput import Spent
from wds_train.checkpoint.lease import Say
from wds_train.checkpoint.run_manifest import Checkpoint, Object, Pending, RunManifest, Segment
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.checkpoint.writer import Writer
from wds_train.errors import RunError, StoreError
from wds_train.storage.base import Store

LOG = logging.getLogger(__name__)
# Longest pause between attempts at a commit, each of which has the store's own retries within.
RETRY_SECONDS = 60.0
# Longest wait of the training for the commit before, until the new one replaces it.
QUEUE_SECONDS = 10.0


def collect(store: Store, before: RunManifest, after: RunManifest, say: Say) -> None:
    """Delete what the manifest named before and names no more.

    Failing costs storage until the next claim.
    """
    for dropped in sorted(before.keys - after.keys):
        try:
            store.delete(dropped)
        except StoreError as error:
            say(f"{dropped} could not be removed ({error}); the next start removes it")


@dataclass(frozen=True)
class _Commit:
    """A commit that is in hand.

    `records` is how many of the run's uncommitted records belong to it; `taken` is a monotonic
    time, seconds; `spent` is what the attempt had spent by then.
    """

    snapshot: Snapshot
    metrics: dict[str, float]
    records: int
    changes: dict[str, Any]
    taken: float
    spent: Spent


class Committer:
    """Commits snapshots in a thread of its own, while the training goes on.

    Two commits are in hand at most: one under way and the next. One that fails for want of the
    store is tried again until it succeeds or a newer one takes its place, and the training goes on
    meanwhile; `check` raises what ends it.
    """

    def __init__(self, writer: Writer, *, say: Say, keep_every: int) -> None:
        self.failures = 0
        self.keep_every = keep_every
        self.max_uncommitted = float("inf")
        self.upload_s: float | None = None
        self._writer = writer
        self._say = say
        self._safe_at = time.monotonic()
        self._changed = threading.Condition()
        self._next: _Commit | None = None
        self._current: _Commit | None = None
        # Its swap was asked for, and what became of it is not known.
        self._unsure: _Commit | None = None
        self._asked = False
        self._records: list[dict[str, Any]] = []
        self._failure: StoreError | None = None
        self._fruitless = 0
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Count from here on for how long nothing was committed."""
        self._safe_at = time.monotonic()

    def commit(
        self,
        snapshot: Snapshot,
        metrics: dict[str, float],
        records: list[dict[str, Any]],
        **changes: Any,
    ) -> None:
        """Start committing `snapshot` in the background.

        The commit before may keep the training waiting for QUEUE_SECONDS at most.

        Args:
            snapshot: The state.
            metrics: Of the validation at this step; empty without one.
            records: The rows of metrics since the last call.
            changes: Other fields of the manifest.

        Raises:
            WdsTrainError: What `check` raises.
        """
        taken = time.monotonic()
        spent = self._writer.clock.read()
        with self._changed:
            self._changed.wait_for(self._has_room, QUEUE_SECONDS)
            self.check()
            self._records += records
            self._next = _Commit(snapshot, metrics, len(self._records), changes, taken, spent)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="commit", daemon=True)
                self._thread.start()

    def _has_room(self) -> bool:
        """Return True if a commit need not wait for the one before, or waits in vain."""
        return self._next is None or bool(self._failure or self._writer.fatal)

    @property
    def busy(self) -> bool:
        """True while a commit is under way."""
        return any(job is not None for job in (self._next, self._current, self._unsure))

    def check(self) -> None:
        """Raise the error that ends this instance's work, if there is one.

        Raises:
            Interrupted: Another instance has claimed the run.
            NotFinite: The state that was to be committed is not finite.
            RunError: The oldest state that is not safe waits for longer than `max_uncommitted`
                seconds.
        """
        if self._writer.fatal is not None:
            raise self._writer.fatal
        waited = time.monotonic() - self._safe_at
        if self.busy and waited > self.max_uncommitted:
            raise RunError(
                f"nothing could be committed for {waited / 60:.1f} minutes "
                f"(--max-uncommitted-minutes allows {self.max_uncommitted / 60:g}): "
                f"{self._failure or 'the upload is too slow'}. Stopping before more is lost; "
                "repair that and run again, to go on from the newest checkpoint"
            )

    def wait(self, seconds: float = float("inf")) -> bool:
        """Wait until nothing is under way, for `seconds` at most; return True if nothing is.

        Raises:
            WdsTrainError: What `check` raises.
        """
        end = time.monotonic() + seconds
        with self._changed:
            while True:
                self.check()
                left = min(end - time.monotonic(), 0.5)
                if not self.busy or left <= 0:
                    return not self.busy
                self._changed.wait(left)

    def _work(self) -> None:
        """The body of the commit thread."""
        while self._writer.fatal is None:
            with self._changed:
                self._changed.wait_for(lambda: self._unsure is not None or self._next is not None)
                job = self._current = self._unsure or self._next
                self._asked = self._unsure is not None
                if self._asked:
                    self._unsure = None
                else:
                    self._next = None
            assert job is not None
            error: Exception | None = None
            try:
                self._commit(job)
            except Exception as caught:
                error = caught
            with self._changed:
                self._current = None
                self._settle(job, error)
                self._changed.notify_all()
            if self._failure is not None:
                time.sleep(min(RETRY_SECONDS, 2.0**self._fruitless))

    def _settle(self, job: _Commit, error: Exception | None) -> None:
        """Note what became of a commit, and decide whether it is tried again."""
        if error is None:
            self._failure = None
            self._fruitless = 0
            self._safe_at = job.taken
            del self._records[: job.records]
            if self._next is not None:
                self._next = replace(self._next, records=self._next.records - job.records)
            return
        if not isinstance(error, StoreError):
            self._writer.fatal = error
            return

        self._failure = error
        self._fruitless += 1
        self.failures += 1
        if self._asked:
            # The manifest may name its records, which the next one would commit a second time.
            self._unsure = job
        else:
            self._next = self._next or job
        step = job.snapshot.progress.step
        self._say(f"commit of step {step} failed ({error}); it is tried again")

    def _commit(self, job: _Commit) -> None:
        """Upload a commit, swap the manifest, and delete what the new one dropped."""
        began = time.perf_counter()
        writer = self._writer
        job.snapshot.check_finite()
        at = job.snapshot.progress
        place = f"{writer.manifest.fence:06d}-{at.step:09d}-{at.evaluated:06d}"
        state = job.snapshot.encode()
        described = _describe(f"ckpt/{place}.safetensors", state)
        checkpoint = Checkpoint(described, at, job.metrics, job.spent)
        records = self._records[: job.records]
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        segment: Segment | None = None
        if lines:
            segment = Segment(_describe(f"metrics/{place}.jsonl", lines), at.step, at.evaluated)

        # This also finds out whether the run is still ours, before what may be gigabytes go up.
        self._announce(Pending(checkpoint, segment, job.changes.get("result", {})))
        # The checkpoint comes last: where it is whole, its metrics are there as well.
        if segment is not None:
            writer.store.write(segment.object.key, lines, if_absent=True)
        writer.store.write(checkpoint.object.key, state, if_absent=True)

        def commit(found: RunManifest) -> RunManifest:
            committed = found.with_commit(checkpoint, segment, self.keep_every)
            return replace(committed, **job.changes)

        before = writer.manifest
        self._asked = True
        writer.write(commit)
        self.upload_s = time.perf_counter() - began
        megabytes = checkpoint.object.bytes / 1e6
        LOG.debug("committed step %d: %.1f MB in %.1f s", at.step, megabytes, self.upload_s)
        collect(writer.store, before, writer.manifest, self._say)

    def _announce(self, pending: Pending) -> None:
        """Name in the manifest what goes up next, and delete what a commit that failed before this
        one has left.
        """
        before = self._writer.manifest
        self._writer.announce(pending)
        collect(self._writer.store, before, self._writer.manifest, self._say)


def _describe(key: str, data: bytes) -> Object:
    """Return the entry of a manifest for an object that holds `data`."""
    return Object(key, len(data), hashlib.sha256(data).hexdigest())
