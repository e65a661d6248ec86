"""Run ownership: identify this process, see that an owner is gone, and wait until a run is free.

Clocks of two machines are never compared. A claimant watches the manifest for the length of the
lease, on its own monotonic clock. If the owner has not written by then, the claimant takes the run
over by a compare-and-swap, which fails if the owner has written since.
"""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from wds_train.checkpoint import run_manifest as states
from wds_train.checkpoint.run_manifest import Owner, RunManifest
from wds_train.errors import RunError
from wds_train.storage.base import Store

# How long an owner may be silent. A replacement waits for so long after a kill; a store that hangs
# for longer lets a claimant take the run over.
LEASE_SECONDS = 60.0
# Writes of the owner per lease. One every 20 s costs $0.0009 per hour (S3: $0.005 per 1,000 PUTs),
# and one may fail.
RENEWALS = 3
# Looks of a waiting claimant per lease: one every 5 s.
LOOKS = 12

# Shows a line to a person.
Say = Callable[[str], None]


def this_process() -> Owner:
    """Return the identity of this process."""
    return Owner(socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()) or 0)


def is_gone(owner: Owner) -> bool:
    """Return True if `owner` provably runs no more.

    It ran in this boot and PID namespace, and is not there now. Nothing is known of a process of
    another machine.
    """
    if owner.machine == "" or owner.machine != _machine():
        return False
    return _started(owner.pid) != owner.started


def read_run(store: Store) -> tuple[RunManifest, str]:
    """Return the manifest of the run at `store` and its tag.

    Raises:
        NotFound: There is no run.
    """
    data, tag = store.read_tagged(states.NAME)
    return RunManifest.from_json(data, f"{store.url}/{states.NAME}"), tag


def wait_until_free(
    store: Store,
    found: RunManifest,
    tag: str,
    *,
    wait: bool,
    say: Say,
    pause: Callable[[float], None] = time.sleep,
) -> tuple[RunManifest, str]:
    """Wait until nobody owns the run any more; return its manifest, and the manifest's tag.

    Args:
        store: The run's folder.
        found: The manifest, as it was just read.
        tag: Its version on the store.
        wait: False refuses a run that has an owner.
        say: Called with a line on the owner that is waited for.
        pause: Sleeps so many seconds; an error that it raises ends the wait.

    Raises:
        RunError: The run has an owner, and `wait` is False.
    """
    # Refuse or announce the wait.
    if found.status == "running" and not is_gone(found.owner):
        holds = f"{store.url} is being trained by {found.owner}"
        if not wait:
            raise RunError(
                f"{holds}; wait for its end, or until its lease of {found.lease:g} s runs out"
            )
        say(
            f"{holds}; waiting until it ends or is silent for {found.lease:g} s (--no-wait refuses "
            "instead)"
        )

    # Wait for the end of the owner, or for a whole lease of silence.
    began = time.monotonic()
    silent = 0.0
    while found.status == "running" and not is_gone(found.owner) and silent < found.lease:
        pause(found.lease / LOOKS)
        # Taken before looking: a pause of this process must not count as the owner's.
        silent = time.monotonic() - began
        if store.head(states.NAME)[1] != tag:
            found, tag = read_run(store)
            began = time.monotonic()
            silent = 0.0
    return found, tag


def this_boot() -> str:
    """Return the id of this machine's boot, the same in all its containers; "" if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _machine() -> str:
    """Return the id of this boot and PID namespace; "" if unknown."""
    boot = this_boot()
    if not boot:
        return ""
    # Two containers of one machine may have processes of the same number.
    try:
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Return when the process started, in clock ticks since the boot; None if it does not run."""
    # proc(5), stat: the fields after the name, which may hold spaces and parentheses itself.
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state = fields[0]
    if state in "ZX":  # a zombie, or dead
        return None
    return int(fields[19])
