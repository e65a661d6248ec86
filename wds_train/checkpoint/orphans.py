"""Removal of what killed instances left below a run.

That is, objects that no manifest names, parts of uploads, and probes.
"""

import time
from functools import partial

from wds_train.checkpoint.lease import Say
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.errors import StoreError, Unavailable
from wds_train.storage.base import Store
from wds_train.storage.proof import is_probe
from wds_train.storage.s3 import hurried

TIDY_SECONDS = 10.0  # for all of it: nobody renews the lease of a claim meanwhile


def collect_orphans(store: Store, manifest: RunManifest, say: Say) -> None:
    """Delete what killed instances uploaded and never named, right after a claim.

    It is safe for fences up to that of `manifest`: their owners can name nothing more.

    This is housekeeping: what a server lacks for it, or a role may not do, is told in one line. Who
    may only read a finished run leaves it as it is, and is told nothing.

    Args:
        store: Where the run is.
        manifest: What the claim wrote, or that of a run that is done.
        say: What is told to a person.
    """
    told = manifest.status == "done"
    end = time.monotonic() + TIDY_SECONDS
    for prefix in ("ckpt/", "metrics/"):
        for tidy in (partial(_remove_orphans, store, manifest, say, end), store.abort_uploads):
            try:
                _refuse_late(store, end)
                with hurried(store, TIDY_SECONDS):
                    tidy(prefix)
            except StoreError as error:
                if not told:
                    say(f"what interrupted uploads left stays there ({error}); see docs/stores.md")
                told = True
                # The next request would wait as long.
                if isinstance(error, Unavailable):
                    return


def _remove_orphans(store: Store, manifest: RunManifest, say: Say, end: float, prefix: str) -> None:
    named = manifest.keys
    for entry in list(store.list(prefix)):
        fence = entry.key.removeprefix(prefix).partition("-")[0]
        is_orphan = entry.key not in named and fence <= f"{manifest.fence:06d}"
        if is_orphan or is_probe(entry.key):
            _refuse_late(store, end)
            store.delete(entry.key)
            say(
                f"removed {entry.key}, which no manifest names: left by an interrupted upload or "
                "removal"
            )


def _refuse_late(store: Store, end: float) -> None:
    """Raise `Unavailable` after `end`: the lease must be renewed before it runs out."""
    if time.monotonic() > end:
        raise Unavailable(f"{store.url} is slow: the rest is left to the next start")
