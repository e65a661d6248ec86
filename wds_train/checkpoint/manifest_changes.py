"""Change a run's manifest from a process that does not own the run.

`wds-train wandb` does so, to note the run's page. The fence stays as it is: an owner that meets the
change at its next write finds its own fence, takes the manifest up, and writes again.
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

ATTEMPTS = 10  # an owner writes every 20 s or so: two collisions in a row are rare


def amend(store: Store, change: Callable[[RunManifest], RunManifest], say: Say) -> RunManifest:
    """Apply `change` to the newest manifest of the run at `store`.

    Args:
        store: The run's folder.
        change: Returns the changed manifest. It is called again with a newer one when somebody else
            has written meanwhile.
        say: Called with a line on a store that is proved.

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
        # A run that is done needs no proof: nobody else writes to it.
        if found.status != "done" and not proven:
            proven = prove(store, PROBES, say)
        # Another nonce: the owner could take an equal manifest for its own write.
        changed = replace(changed, nonce=secrets.token_hex(16))
        try:
            store.write(states.NAME, changed.to_json(), if_match=tag)
        except Conflict:
            continue
        return changed
    raise StoreError(f"{store.url}/{states.NAME} could not be written: others kept changing it")
