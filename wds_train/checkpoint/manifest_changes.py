"""Changing what a run's manifest says beside the training, from a process that does not own the
run.

The fence stays as it is. An owner that meets the change at its next write finds its own fence,
takes the manifest up, and writes again.
"""

import secrets
from collections.abc import Callable
from dataclasses import replace

from wds_train.checkpoint import run_manifest as states
from wds_train.checkpoint.lease import Say, read_run
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.errors import Conflict, StoreError
from wds_train.storage.base import Store
from wds_train.storage.proof import PROBES, prove

ATTEMPTS = 10


def amend(store: Store, change: Callable[[RunManifest], RunManifest], say: Say) -> RunManifest:
    """Swap the newest manifest of the run at `store` for what `change` makes of it.

    Args:
        change: Is called again with a newer manifest when somebody else has written meanwhile.

    Returns:
        The manifest as it is now. Nothing is written where `change` changes nothing.

    Raises:
        StoreError: It could not be written, or the store ignores conditional writes while the run
            may be in training: a commit of its owner could be overwritten.
    """
    proven = False
    for _ in range(ATTEMPTS):
        found, tag = read_run(store)
        changed = change(found)
        if changed == found:
            return found
        # Nobody writes to a run that is done.
        if found.status != "done" and not proven:
            proven = prove(store, PROBES, say)
        changed = replace(changed, nonce=secrets.token_hex(16))
        try:
            store.write(states.NAME, changed.to_json(), if_match=tag)
        except Conflict:
            continue
        return changed
    raise StoreError(f"{store.url}/{states.NAME} could not be written: others kept changing it")
