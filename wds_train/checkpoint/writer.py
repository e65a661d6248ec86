"""Writing a run's manifest: compare-and-swap, by the one whose fence it carries."""

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

    Every write says what `clock` has counted so far.

    Args:
        store: The run's folder.
        manifest: Its manifest, as it is there.
        tag: The manifest's version on the store.
        say: Told when the lease could not be renewed.
        leads: False in a rank other than 0, which writes nothing.

    Attributes:
        fatal: The error, found in a thread, after which nothing may be written any more.
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
        self._noted: dict[str, Any] = {}
        self._claimed_at = time.monotonic()
        self._written_at = self._claimed_at
        self._writing = threading.Lock()

    def start_renewing(self) -> None:
        """Renew the lease from here on.

        This process must not fork any more: a forked child would inherit the lock, perhaps held.
        """
        if self.leads:
            threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def close(self) -> None:
        """Renew the lease no more."""
        self.closed.set()

    def announce(self, pending: Pending | None) -> None:
        """Name in the manifest the commit that goes up next; None for none.

        Raises:
            Interrupted: Another instance has claimed the run.
        """
        self._swap(lambda manifest: replace(manifest, pending=pending))

    def write(self, change: Callable[[RunManifest], RunManifest]) -> None:
        """Swap the manifest for what `change` makes of it.

        Raises:
            Interrupted: Another instance has claimed the run.
            RunError: The manifest was deleted.
            StoreError: The store does not take it.
        """
        self._swap(change)

    def _swap(self, change: Callable[[RunManifest], RunManifest]) -> None:
        """Write the manifest under the condition that it is as this process left it.

        Our own fence in the manifest after a lost swap means that an earlier write of ours arrived,
        though its answer did not, or that the server refused two writes at one moment (409): take
        it up and try again.
        """
        with self._writing:
            for _ in range(3):
                seconds = time.monotonic() - self._claimed_at
                spent = self.clock.read()
                manifest = change(self.manifest).with_attempt(**self._noted, spent=spent)
                manifest = manifest.stamped(secrets.token_hex(16), time.time(), seconds)
                # A lost swap is tried again if the manifest is still ours.
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
        """Let the next write say more of this attempt, even if it only renews the lease.

        Nobody waits for it.
        """
        self._noted = self._noted | details

    def _look(self) -> None:
        """Raise `Conflict` when the manifest is not as this process left it.

        The swap itself would be refused. But a server that ignores some conditions, or all with
        `--unsafe-store`, would take it, and a process that slept would overwrite what its successor
        has committed.
        """
        if self.store.head(states.NAME)[1] != self._tag:
            raise Conflict(f"{self.store.url}/{states.NAME} was written by another writer")

    def _take_up(self, error: StoreError) -> None:
        """Take up the manifest that is there, if it is ours; raise `Interrupted` if it is not."""
        try:
            found, tag = read_run(self.store)
        except NotFound as gone:
            raise RunError(
                f"{self.store.url}/{states.NAME} was deleted while this instance was training"
            ) from gone
        # Two claims have one fence where a server took both.
        if (found.fence, found.owner) != (self.manifest.fence, self.manifest.owner):
            raise Interrupted(
                f"another instance ({found.owner}) has claimed {self.store.url}; this one stops "
                "and changes nothing more"
            ) from error
        self.manifest = found
        self._tag = tag

    def _renew(self) -> None:
        """Renew the lease until the attempt is over: the body of the lease thread.

        A write that fails now may succeed later. Others may claim the run by then, which the next
        write that passes finds out.
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
