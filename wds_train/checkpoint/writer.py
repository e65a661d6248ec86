"""Write a run's manifest: by compare-and-swap, and only while it carries our fence.

The committer, the metrics' uploader and the lease thread all write by the one `Writer` of a run.
"""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from wds_train.checkpoint import lease as leases
from wds_train.checkpoint import run_manifest as states
from wds_train.checkpoint.clock import Clock
from wds_train.checkpoint.lease import Say, read_run
from wds_train.checkpoint.run_manifest import Pending, RunManifest
from wds_train.errors import Conflict, Interrupted, NotFound, RunError, StoreError
from wds_train.storage.base import Store


class Writer:
    """Writes a run's manifest, while it carries the fence that this process claimed with.

    Every write notes the seconds that `clock` has counted so far.

    Args:
        store: The run's folder.
        manifest: Its manifest, as it is on the store.
        tag: The manifest's version on the store.
        say: Called with a line when the lease could not be renewed.
        leads: False in a rank other than 0, which writes nothing.

    Attributes:
        clock: Counts the paid seconds of this process by activity.
        fatal: An error of a thread, after which nothing may be written any more.
        closed: Set when the attempt is over.
    """

    def __init__(
        self, store: Store, manifest: RunManifest, tag: str, *, say: Say = print, leads: bool = True
    ) -> None:
        self.store = store
        self.manifest = manifest
        self.leads = leads
        self.clock = Clock()
        self.fatal: Exception | None = None
        self.closed = threading.Event()
        self._tag = tag
        self._say = say
        # Fields of the attempt for the next write.
        self._noted: dict[str, Any] = {}
        self._claimed_at = time.monotonic()
        self._written_at = self._claimed_at
        # One write at a time: two threads with the same tag would refuse one another.
        self._writing = threading.Lock()

    def start_renewing(self) -> None:
        """Start the thread that renews the lease.

        This process must not fork any more: a child would inherit the lock, perhaps held.
        """
        if self.leads:
            threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def close(self) -> None:
        """Stop renewing the lease."""
        self.closed.set()

    def announce(self, pending: Pending | None) -> None:
        """Name the next commit in the manifest; None for none.

        Raises:
            WdsTrainError: As `write`.
        """
        self._swap(lambda manifest: replace(manifest, pending=pending))

    def write(self, change: Callable[[RunManifest], RunManifest]) -> None:
        """Apply `change` to the manifest, and write the result.

        Args:
            change: Returns the changed manifest. It may be called again, with a newer one.

        Raises:
            Interrupted: Another instance has claimed the run.
            RunError: The manifest was deleted.
            StoreError: The store does not take it.
        """
        self._swap(change)

    def _swap(self, change: Callable[[RunManifest], RunManifest]) -> None:
        """Write the manifest on the condition that it is as this process left it.

        A swap that is refused while our own fence is in the manifest means that an earlier write of
        ours arrived, though its answer did not, or that the server refused two writes at one moment
        (409). The manifest is then taken up, and the swap tried again.
        """
        with self._writing:
            for _ in range(3):
                # The change, and a sign of life: its time, a new nonce, the seconds so far.
                seconds = time.monotonic() - self._claimed_at
                spent = self.clock.read()
                manifest = change(self.manifest).with_attempt(**self._noted, spent=spent)
                manifest = manifest.with_stamp(secrets.token_hex(16), time.time(), seconds)
                # Swap. A refused one is tried again if the manifest is still ours.
                try:
                    self._look()
                    data = manifest.to_json()
                    self._tag = self.store.write(states.NAME, data, if_match=self._tag)
                except (Conflict, NotFound) as error:
                    self._take_up(error)
                else:
                    self.manifest = manifest
                    self._written_at = time.monotonic()
                    return
        raise StoreError(
            f"{self.store.url}/{states.NAME} could not be written: the server kept refusing"
        )

    def note(self, **details: Any) -> None:
        """Set fields of the attempt with the next write, even if it only renews the lease.

        It does not wait for that write.
        """
        # Replaced, not changed: the threads that write read it without a lock.
        self._noted = self._noted | details

    def _look(self) -> None:
        """Raise `Conflict` when the manifest is not as this process left it.

        The swap itself would be refused, except by a server that ignores some conditions, or all of
        them (`--unsafe-store`). There a process that slept would overwrite its successor's commits.
        """
        if self.store.head(states.NAME)[1] != self._tag:
            raise Conflict(f"{self.store.url}/{states.NAME} was written by another writer")

    def _take_up(self, error: StoreError) -> None:
        """Take up the manifest on the store if it is ours; raise `Interrupted` if it is not."""
        try:
            found, tag = read_run(self.store)
        except NotFound as gone:
            raise RunError(
                f"{self.store.url}/{states.NAME} was deleted while this instance was training"
            ) from gone
        # The owner, too: a server that took both of two claims gave them one fence.
        if (found.fence, found.owner) != (self.manifest.fence, self.manifest.owner):
            raise Interrupted(
                f"another instance ({found.owner}) has claimed {self.store.url}; this one stops "
                "and changes nothing more"
            ) from error
        self.manifest = found
        self._tag = tag

    def _renew(self) -> None:
        """Renew the lease until the attempt is over: the body of the lease thread.

        A write that fails now may succeed later. If another instance has claimed the run by then,
        the next write that reaches the store finds out.
        """
        every = self.manifest.lease / leases.RENEWALS
        while not self.closed.wait(max(0.0, self._written_at + every - time.monotonic())):
            if time.monotonic() - self._written_at < every:
                continue  # a commit has renewed it
            try:
                self.write(lambda manifest: manifest)
            except StoreError as error:
                self._say(
                    f"the lease of {self.store.url} could not be renewed ({error}); trying again"
                )
                self.closed.wait(every)
            except Exception as error:
                self.fatal = error
                return
