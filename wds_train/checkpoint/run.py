"""A run on S3: claimed by one instance, committed to in the background, resumed by the next.

claim    read the manifest, wait until nobody holds the run, raise its fence, write it back by
         compare-and-swap
renew    in a thread, several times per lease: the manifest with another nonce, for claimants to
         see a sign of life
commit   copy the state to host memory at a step boundary (the training goes on), then in a thread:
         announce in the manifest what goes up, upload the metrics, upload the checkpoint, swap the
         manifest, and only then delete what the new manifest dropped
restore  the newest checkpoint whose size, sha256 and tensors are right; damaged ones are named and
         skipped. A commit that was announced by an earlier attempt, and arrived as a whole, is
         adopted first

An instance that another one has replaced meets a foreign fence at its next write, and writes
nothing more. An object that it uploads at that moment has its own fence in the key: no manifest
names it, and the next claim removes it. The commit that it had announced is settled by the first
restore after its end; objects that arrive later are ignored.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from wds_train.checkpoint import lease as leases
from wds_train.checkpoint import run_manifest as states
from wds_train.checkpoint.adoption import settle_pending
from wds_train.checkpoint.committer import Committer, collect
from wds_train.checkpoint.lease import Say, read_run, this_process, wait_until_free
from wds_train.checkpoint.metrics_upload import MetricsUploader
from wds_train.checkpoint.orphans import collect_orphans
from wds_train.checkpoint.restore import read_checkpoint, read_chosen, read_records
from wds_train.checkpoint.resume_checks import check_resume
from wds_train.checkpoint.run_manifest import Checkpoint, RunManifest, Segment
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.checkpoint.writer import Writer
from wds_train.errors import Conflict, NotFound, RunError, StoreError, Unavailable, UsageError
from wds_train.storage.base import Store
from wds_train.storage.proof import PROBES, prove
from wds_train.storage.retry import call_within

# For the last write of a process that is about to end. A spot instance has no more to spare.
LAST_WORD_SECONDS = 5.0
# Attempts at one manifest that nobody else writes, before the server is blamed.
CLAIMS = 30
# Segments of metrics that are read at a time: a read is a wait for the store, and little else.
READERS = 8


class Run:
    """A run that this process has claimed, or only reads.

    Args:
        store: The run's folder.
        manifest: Its manifest, as it is there.
        tag: The manifest's version on the store; "" for a run that is only read.
        say: Called with each line for a person.
        keep_every: Keep the checkpoint of every so many'th validation; 0: of none for that reason.
        leads: False in a rank other than 0, which writes nothing and ends in silence.
    """

    def __init__(
        self,
        store: Store,
        manifest: RunManifest,
        tag: str,
        *,
        say: Say = print,
        keep_every: int = 0,
        leads: bool = True,
    ) -> None:
        self.store = store
        self._say = say
        self.writer = Writer(store, manifest, tag, say=say, leads=leads)
        self.committer = Committer(self.writer, say=say, keep_every=keep_every)
        self.uploader = MetricsUploader(self.writer, say)

    @property
    def manifest(self) -> RunManifest:
        """The manifest as this process last wrote or read it."""
        return self.writer.manifest

    @classmethod
    def claim(
        cls,
        store: Store,
        fresh: RunManifest,
        say: Say,
        *,
        wait: bool = True,
        pause: Callable[[float], None] = time.sleep,
        keep_every: int = 0,
        go_on: bool = False,
        unsafe: bool = False,
    ) -> "Run":
        """Claim the run at `store`, or create it as `fresh`; a run that is done is only read.

        Args:
            fresh: The run as it would begin. A run that exists must have its recipe and dataset.
            wait: Wait until another instance gives the run up.
            pause: Sleeps so many seconds; an error that it raises ends the wait.
            go_on: Go on with a run that a person stopped.
            unsafe: Claim it even if the store ignores conditional writes.

        Raises:
            UsageError: It is of another recipe or dataset, or a person stopped it.
            RunError: Another instance owns it, and `wait` is False.
            StoreError: The store ignores conditional writes, or refuses all of them.
        """
        safe: bool | None = None
        refusals = Counter[str]()
        while True:
            # 1. Read it. A training that cannot go on is refused before the wait.
            found, tag = _find(store, fresh)
            if tag:
                check_resume(found, fresh, store.url)
            if safe is None and found.status != "done":
                safe = prove(store, PROBES, say, unsafe=unsafe)
                continue  # another one may have claimed the run meanwhile: look again

            # 2. Wait for its owner.
            if tag:
                found, tag = wait_until_free(store, found, tag, wait=wait, say=say, pause=pause)
                found = check_resume(found, fresh, store.url)
                if found.status == "done":
                    run = cls(store, found, tag, say=say)
                    # A kill right after the last commit may have left some.
                    collect_orphans(store, run.manifest, say)
                    return run
                _refuse_stopped(store, found, go_on)

            # 3. Take it, unless another claimant is faster.
            try:
                run = cls._take(store, replace(found, unsafe_store=not safe), tag, say, keep_every)
            except Conflict as error:
                refusals[tag] += 1
                _refuse_endless(store, refusals[tag], error)
                pause(0.1)
            else:
                collect_orphans(store, run.manifest, say)
                return run

    @staticmethod
    def roll_back(
        store: Store, step: int, say: Say, *, unsafe: bool = False
    ) -> tuple[RunManifest, RunManifest]:
        """Make the checkpoint of `step` the newest, and delete the commits after it.

        Returns:
            The manifests before and after.

        Raises:
            RunError: The checkpoint cannot be used, or an instance owns the run.
            StoreError: The store ignores conditional writes, and `unsafe` is False; nothing has
                changed.
        """
        before, tag = wait_until_free(store, *read_run(store), wait=False, say=say)
        after = before.back_to(step)
        read_chosen(store, before, after.checkpoints[-1])
        if after == before:
            return before, before

        # One swap claims the run, so that no earlier owner writes again, and takes it back.
        safe = prove(store, PROBES, say, unsafe=unsafe)
        after = replace(after, unsafe_store=not safe)
        claimed = after.with_claim(this_process(), leases.LEASE_SECONDS, time.time())
        claimed = replace(claimed, status=after.status)
        after = claimed.with_stamp(secrets.token_hex(16), time.time(), 0.0)
        store.write(states.NAME, after.to_json(), if_match=tag)
        # Deleted last: a kill before the swap must leave all that the manifest names.
        collect(store, before, after, say)
        return before, after

    @classmethod
    def _take(cls, store: Store, found: RunManifest, tag: str, say: Say, keep_every: int) -> "Run":
        """Claim the run whose manifest `found` has the tag `tag`; "" where there is none yet."""
        condition: dict[str, Any] = {"if_absent": True}
        if tag:
            condition = {"if_match": tag}
        claimed = found.with_claim(this_process(), leases.LEASE_SECONDS, time.time())
        claimed = replace(claimed, nonce=secrets.token_hex(16))
        tag = store.write(states.NAME, claimed.to_json(), **condition)
        return cls(store, claimed, tag, say=say, keep_every=keep_every)

    def restore(self, say: Say) -> Snapshot | None:
        """Return the newest usable checkpoint; None when the run has no checkpoint.

        The manifest forgets damaged ones. The metrics after the one that is used become replayed:
        they will be logged again.

        Raises:
            RunError: All checkpoints are damaged.
        """
        adopted = settle_pending(self.writer, self.committer.keep_every, say)
        if adopted is not None:
            return adopted
        # From the newest back, until one is right.
        for checkpoint in reversed(self.manifest.checkpoints):
            try:
                snapshot = read_checkpoint(self.store, self.manifest, checkpoint)
            except RunError as error:
                key = checkpoint.object.key
                say(f"checkpoint {key} cannot be used ({error}); trying the one before")
                continue
            # The manifest names it as the newest before training goes on: nobody trains behind it.
            if checkpoint != self.manifest.checkpoints[-1]:
                self.writer.write(partial(_go_back_to, checkpoint))
            return snapshot
        if self.manifest.checkpoints:
            raise RunError(
                f"every checkpoint of {self.store.url} is damaged; restore one from a backup or "
                "start another run"
            )
        return None

    def history(self) -> list[dict[str, Any]]:
        """Return all committed metrics that can be read, oldest first; name the others."""
        return _read_segments(self.store, self.manifest.metrics, self._say)

    def replayed(self) -> list[dict[str, Any]]:
        """Return the rows that earlier attempts logged, and that were never committed.

        Each row holds its attempt's fence as `time/attempt`.
        """
        earlier = [each for each in self.manifest.replayed if each.fence < self.manifest.fence]
        rows = _read_segments(self.store, earlier, self._say)
        return _drop_committed(rows, self.manifest.metrics)

    def begin(self) -> None:
        """Start the threads of an owner. This process must not fork any more."""
        self.committer.begin()
        self.writer.start_renewing()
        self.uploader.start()

    def end(self, status: str, **changes: Any) -> None:
        """Give the run up, as `status`. The caller has waited for the commit under way.

        Raises:
            Unavailable: The store does not take it within LAST_WORD_SECONDS. The lease then expires
                by itself.
        """
        self.writer.close()
        if not self.writer.leads or (self.manifest.status == status and not changes):
            return

        def end(manifest: RunManifest) -> RunManifest:
            return replace(manifest.with_status(status), **changes)

        call_within(LAST_WORD_SECONDS, partial(self.writer.write, end), self.store.url)


def _read_segments(store: Store, segments: Iterable[Segment], say: Say) -> list[dict[str, Any]]:
    """Return the rows of all segments that can be read, in order; name the others.

    Raises:
        Unavailable: The store does not answer.
    """

    def read(segment: Segment) -> list[dict[str, Any]]:
        try:
            return read_records(store, segment)
        # A store that does not answer ends the start; a damaged segment only costs its rows.
        except Unavailable:
            raise
        except (StoreError, RunError) as error:
            key = segment.object.key
            say(f"metrics {key} cannot be used ({error}); the curves go without them")
            return []

    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(READERS) as pool:
        for of_one in pool.map(read, segments):
            rows += of_one
    return rows


def _drop_committed(
    rows: Iterable[dict[str, Any]], committed: Iterable[Segment]
) -> list[dict[str, Any]]:
    """Return the rows of a later step than the last one that their attempt has committed."""
    newest: dict[int, int] = {}
    for segment in committed:
        newest[segment.fence] = segment.step
    left = []
    for row in rows:
        if row.get("step", -1) > newest.get(row.get("time/attempt", 0), -1):
            left.append(row)
    return left


def _find(store: Store, fresh: RunManifest) -> tuple[RunManifest, str]:
    """Return the manifest at `store` and its tag; `fresh` and "" where there is none."""
    try:
        return read_run(store)
    except NotFound:
        return fresh, ""


def _refuse_stopped(store: Store, found: RunManifest, go_on: bool) -> None:
    if found.status == "stopped" and not go_on:
        raise UsageError(
            f"{store.url} was stopped by a person, in W&B, at step {found.step}; give --go-on to "
            "go on from there"
        )


def _refuse_endless(store: Store, refusals: int, error: Conflict) -> None:
    """Raise `StoreError` after too many refusals of one manifest.

    Another claimant would have changed it: the server itself must be wrong.
    """
    if refusals >= CLAIMS:
        raise StoreError(
            f"{store.url} cannot be claimed: the server refused {refusals} times to write "
            f"{states.NAME}, though nobody else had written it; look at the server with wds-train "
            "check-store"
        ) from error


def _go_back_to(checkpoint: Checkpoint, found: RunManifest) -> RunManifest:
    """Return the manifest of an attempt that begins at `checkpoint`."""
    return found.up_to(checkpoint).with_attempt(step=checkpoint.progress.step)
