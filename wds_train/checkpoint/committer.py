"""Commits in the background.

    announce -> upload the metrics and the checkpoint -> swap the manifest -> delete what it dropped

The announcement puts keys, sizes and digests of the next upload into the manifest, as `pending`. If
the process is killed between the upload and the swap, the next owner can tell by them whether all
of it arrived, and adopt it (`checkpoint/adoption.py`).
"""

import json
import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from wds_train.checkpoint.goodput import Spent
from wds_train.checkpoint.lease import Say
from wds_train.checkpoint.run_manifest import (
    Checkpoint,
    Pending,
    RunManifest,
    Segment,
    describe_object,
    place_of,
)
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.checkpoint.writer import Writer
from wds_train.errors import RunError, StoreError
from wds_train.storage.base import Store

LOG = logging.getLogger(__name__)
# Longest pause between attempts at a commit, each of which has the store's own retries within.
RETRY_SECONDS = 60.0
# Longest wait of the training for the commit before; then the new one replaces it. A store that
# hangs must not hold up paid GPUs, and a short delay need not cost a checkpoint.
QUEUE_SECONDS = 10.0


def collect(store: Store, before: RunManifest, after: RunManifest, say: Say) -> None:
    """Delete the objects that the manifest named before, and names no more.

    Args:
        store: The run's folder.
        before: The manifest that was replaced.
        after: The manifest that is on the store now: never call it before the swap.
        say: Called with a line on an object that could not be deleted; it costs storage until the
            next claim.
    """
    for dropped in sorted(before.keys - after.keys):
        try:
            store.delete(dropped)
        except StoreError as error:
            say(f"{dropped} could not be removed ({error}); the next start removes it")


@dataclass(frozen=True)
class _Commit:
    """A commit that waits for its upload, or is under way.

    Attributes:
        snapshot: The state.
        metrics: Of the validation at this step; empty without one.
        records: How many of the run's uncommitted records belong to it.
        changes: Other fields of the manifest.
        taken: When the snapshot was taken, monotonic seconds.
        spent: The seconds that the attempt had spent by then.
    """

    snapshot: Snapshot
    metrics: dict[str, float]
    records: int
    changes: dict[str, Any]
    taken: float
    spent: Spent


class Committer:
    """Commits snapshots in a background thread, while the training goes on.

    It holds two commits at most: one under way and the next. One that fails because of the store is
    tried again until it succeeds or a newer one takes its place. The training goes on meanwhile;
    `check` raises the error that ends it.

    Attributes:
        keep_every: Keep the checkpoint of every so many'th validation; 0: of none for that reason.
        failures: The attempts at a commit that failed.
        max_uncommitted: Seconds that a state may wait until `check` raises.
        upload_s: The seconds of the newest upload; None where its reader has taken it.
    """

    def __init__(self, writer: Writer, *, say: Say, keep_every: int) -> None:
        self.failures = 0
        self.keep_every = keep_every
        self.max_uncommitted = float("inf")
        self.upload_s: float | None = None
        self._writer = writer
        self._say = say
        # Everything older than this moment is committed.
        self._safe_at = time.monotonic()
        self._changed = threading.Condition()
        self._next: _Commit | None = None
        self._current: _Commit | None = None
        # Its swap was asked for, but no answer came: the manifest may name it or not.
        self._unsure: _Commit | None = None
        self._asked = False
        self._records: list[dict[str, Any]] = []
        self._failure: StoreError | None = None
        self._fruitless = 0
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start the time for which nothing was committed."""
        self._safe_at = time.monotonic()

    def commit(
        self,
        snapshot: Snapshot,
        metrics: dict[str, float],
        records: list[dict[str, Any]],
        **changes: Any,
    ) -> None:
        """Start committing `snapshot` in the background.

        It waits for the commit before for QUEUE_SECONDS at most. `metrics` are those of the
        validation at this step, `records` the rows since the last call, and `changes` other fields
        of the manifest.

        Raises:
            WdsTrainError: As `check`.
        """
        taken = time.monotonic()
        spent = self._writer.clock.read()
        with self._changed:
            self._changed.wait_for(self._has_room, QUEUE_SECONDS)
            self.check()
            # A commit that still waits is replaced; its records go with this one.
            self._records += records
            self._next = _Commit(snapshot, metrics, len(self._records), changes, taken, spent)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="commit", daemon=True)
                self._thread.start()

    def _has_room(self) -> bool:
        """Return True if a commit need not wait for the one before, or would wait in vain."""
        return self._next is None or bool(self._failure or self._writer.fatal)

    @property
    def busy(self) -> bool:
        """True while a commit is under way."""
        return (self._next or self._current or self._unsure) is not None

    def check(self) -> None:
        """Raise the error that ends this instance's work, if there is one.

        Raises:
            Interrupted: Another instance has claimed the run.
            NotFinite: The state that was to be committed is not finite.
            RunError: Nothing could be committed for longer than `max_uncommitted` seconds.
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
        """Wait until no commit is under way, for `seconds` at most; return True if none is.

        Raises:
            WdsTrainError: As `check`.
        """
        end = time.monotonic() + seconds
        with self._changed:
            while True:
                self.check()
                # In short waits: an error of the lease thread wakes nobody.
                left = min(end - time.monotonic(), 0.5)
                if not self.busy or left <= 0:
                    return not self.busy
                self._changed.wait(left)

    def _work(self) -> None:
        """Upload one commit after the other: the body of the commit thread."""
        while self._writer.fatal is None:
            # Take the next one. An unsure one comes first: its records may be in the manifest.
            with self._changed:
                self._changed.wait_for(lambda: self._unsure is not None or self._next is not None)
                job = self._current = self._unsure or self._next
                self._asked = self._unsure is not None
                if self._asked:
                    self._unsure = None
                else:
                    self._next = None
            assert job is not None

            # Upload it without the lock: the training may hand over the next one meanwhile.
            error: Exception | None = None
            try:
                self._commit(job)
            except Exception as caught:
                error = caught

            # Keep the outcome, and wake those that wait for it.
            with self._changed:
                self._current = None
                self._settle(job, error)
                self._changed.notify_all()
            if self._failure is not None:
                time.sleep(min(RETRY_SECONDS, 2.0**self._fruitless))

    def _settle(self, job: _Commit, error: Exception | None) -> None:
        """Keep the outcome of a commit, and decide whether it is tried again."""
        # It has succeeded. The next one holds only the records that came after.
        if error is None:
            self._failure = None
            self._fruitless = 0
            self._safe_at = job.taken
            del self._records[: job.records]
            if self._next is not None:
                self._next = replace(self._next, records=self._next.records - job.records)
            return

        # No further attempt would help: the training ends at its next `check`.
        if not isinstance(error, StoreError):
            self._writer.fatal = error
            return

        # The store failed: try it again, unless a newer one waits.
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
        state = job.snapshot.encode()
        lines = encode_rows(self._records[: job.records])

        # Announce it. This also finds out whether the run is still ours, before gigabytes go up.
        pending = _describe(job, writer.manifest.fence, state, lines)
        _announce(writer, pending, self._say)

        # Upload. The checkpoint comes last: where it is whole, its metrics are there as well.
        if pending.segment is not None:
            writer.store.write(pending.segment.object.key, lines, if_absent=True)
        writer.store.write(pending.checkpoint.object.key, state, if_absent=True)

        # Swap the manifest: from here on the commit counts.
        def commit(found: RunManifest) -> RunManifest:
            committed = found.with_commit(pending.checkpoint, pending.segment, self.keep_every)
            return replace(committed, **job.changes)

        before = writer.manifest
        self._asked = True
        writer.write(commit)
        self.upload_s = time.perf_counter() - began
        step = job.snapshot.progress.step
        LOG.debug("committed step %d: %.1f MB in %.1f s", step, len(state) / 1e6, self.upload_s)
        collect(writer.store, before, writer.manifest, self._say)


def _announce(writer: Writer, pending: Pending, say: Say) -> None:
    """Name the next upload in the manifest, and delete the rest of one that failed before."""
    before = writer.manifest
    writer.announce(pending)
    collect(writer.store, before, writer.manifest, say)


def _describe(job: _Commit, fence: int, state: bytes, lines: bytes) -> Pending:
    """Return the announcement of a commit: the keys, sizes and digests of what it uploads.

    The fence in the keys keeps them apart from those of every other attempt.
    """
    at = job.snapshot.progress
    place = place_of(fence, at)
    described = describe_object(f"ckpt/{place}.safetensors", state)
    checkpoint = Checkpoint(described, at, job.metrics, job.spent)
    segment: Segment | None = None
    if lines:
        described = describe_object(f"metrics/{place}.jsonl", lines)
        segment = Segment(described, at.step, at.evaluated)
    return Pending(checkpoint, segment, job.changes.get("result", {}))


def encode_rows(rows: Iterable[dict[str, Any]]) -> bytes:
    """Return rows of metrics as a segment holds them: a line of JSON each."""
    lines = [json.dumps(row) + "\n" for row in rows]
    return "".join(lines).encode()
