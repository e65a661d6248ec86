"""Remove the leftovers of killed instances below a run.

These are objects that no manifest names, parts of uploads, and probes. `Run.claim` does it.
"""

import time
from functools import partial

from wds_train.checkpoint.lease import Say
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.errors import StoreError, Unavailable
from wds_train.storage.base import Store
from wds_train.storage.proof import is_probe
from wds_train.storage.s3 import hurried

# For all of the removal. Nobody renews the lease of a fresh claim meanwhile: a slow server must not
# let it expire.
TIDY_SECONDS = 10.0


def collect_orphans(store: Store, manifest: RunManifest, say: Say) -> None:
    """Delete the objects that killed instances uploaded and never named, right after a claim.

    It is safe for fences up to that of `manifest`: their owners can name nothing more.

    This is housekeeping, so it never ends a training: a server that lacks a function for it, or a
    role that may not delete, gives one line. A finished run gives none, since its reader may have
    no right to write.

    Args:
        store: The run's folder.
        manifest: The manifest of the claim, or of a run that is done.
        say: Called with a line on each object that is removed, or on what cannot be.
    """
    is_said = manifest.status == "done"
    end = time.monotonic() + TIDY_SECONDS
    for prefix in ("ckpt/", "metrics/"):
        # Objects first; then the parts of uploads that were never completed, which S3 bills, too.
        for tidy in (partial(_remove_orphans, store, manifest, say, end), store.abort_uploads):
            try:
                _refuse_late(store, end)
                with hurried(store, TIDY_SECONDS):
                    tidy(prefix)
            except StoreError as error:
                if not is_said:
                    say(f"what interrupted uploads left stays there ({error}); see docs/stores.md")
                is_said = True
                # The next request would wait as long, while nobody renews the lease.
                if isinstance(error, Unavailable):
                    return


def _remove_orphans(store: Store, manifest: RunManifest, say: Say, end: float, prefix: str) -> None:
    """Delete the objects below `prefix` that no manifest can name any more."""
    named = manifest.keys
    for entry in list(store.list(prefix)):
        fence = entry.key.removeprefix(prefix).partition("-")[0]
        # An object of a later fence belongs to an instance that has claimed the run meanwhile.
        is_orphan = entry.key not in named and fence <= f"{manifest.fence:06d}"
        if is_orphan or is_probe(entry.key):
            _refuse_late(store, end)
            store.delete(entry.key)
            say(
                f"removed {entry.key}, which no manifest names: left by an interrupted upload or "
                "removal"
            )


def _refuse_late(store: Store, end: float) -> None:
    """Raise `Unavailable` after `end`: the lease must be renewed before it expires."""
    if time.monotonic() > end:
        raise Unavailable(f"{store.url} is slow: the rest is left to the next start")
