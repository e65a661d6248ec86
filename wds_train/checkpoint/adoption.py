"""Settle a commit that an earlier attempt announced and did not finish.

`Run.restore` does it first of all, before it reads a checkpoint.
"""

from functools import partial

from wds_train.checkpoint.committer import collect
from wds_train.checkpoint.lease import Say
from wds_train.checkpoint.restore import read_pending
from wds_train.checkpoint.run_manifest import adopt_commit
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.checkpoint.writer import Writer
from wds_train.errors import RunError


def settle_pending(writer: Writer, keep_every: int, say: Say) -> Snapshot | None:
    """Adopt the commit that the attempt before announced and could not finish.

    Nobody else can name it any more, since its owner's fence is past. If anything of it is missing
    or damaged, it is forgotten and deleted as a whole, its metrics with it.

    Args:
        writer: The writer of the run's manifest.
        keep_every: Keep the checkpoint of every so many'th validation; 0: of none for that reason.
        say: Called with a line on what became of the commit.

    Returns:
        The state to go on from, or None where there is no such commit or it is not whole.

    Raises:
        StoreError: The store did not answer: nothing is decided then.
    """
    before = writer.manifest
    pending = before.pending
    if pending is None:
        return None

    # Read it as a whole, and decide.
    step = pending.checkpoint.progress.step
    snapshot: Snapshot | None = None
    try:
        snapshot = read_pending(writer.store, before, pending)
    except RunError as error:
        # Not whole: nothing of it may be used.
        say(
            f"the commit of step {step} was not finished by the attempt before ({error}); it is "
            "left out"
        )
        writer.announce(None)
    else:
        # Whole: name it as the attempt before would have done.
        say(
            f"the commit of step {step} was uploaded by the attempt before, which ended before it "
            "was named: adopted"
        )
        writer.write(partial(adopt_commit, pending=pending, keep_every=keep_every))

    # Delete the objects of the commit itself, or the checkpoints that it replaces.
    collect(writer.store, before, writer.manifest, say)
    return snapshot
