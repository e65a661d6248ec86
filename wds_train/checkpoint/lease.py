"""Whose a run is: who this process is, whether an owner still lives, and the wait for a run to come
free.

Clocks of two machines are never compared. A claimant watches, on its own monotonic clock, whether
the owner writes the manifest within the lease; the compare-and-swap that takes the run over fails
if the owner has written since.
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

LEASE_SECONDS = 60.0
RENEWALS = 3  # per lease: a request every 20 s costs $0.0009 per hour (S3: $0.005 per 1,000 PUTs)
LOOKS = 12  # per lease, of who waits

Say = Callable[[str], None]


def this_process() -> Owner:
    return Owner(socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()) or 0)


def is_gone(owner: Owner) -> bool:
    """Return True if `owner` provably runs no more.

    It lived in this boot and PID namespace, and is not there now.
    """
    return (
        owner.machine != "" and owner.machine == _machine() and _started(owner.pid) != owner.started
    )


def read_run(store: Store) -> tuple[RunManifest, str]:
    """Return the manifest of the run at `store` and its tag.

    Raises:
        NotFound: There is no run.
    """
    data, tag = store.read_tagged(states.NAME)
    return RunManifest.from_json(data, f"{store.url}/{states.NAME}"), tag


def until_free(
    store: Store,
    found: RunManifest,
    tag: str,
    *,
    wait: bool,
    say: Say,
    pause: Callable[[float], None] = time.sleep,
) -> tuple[RunManifest, str]:
    """Return the manifest and its tag once nobody holds the run any more.

    Raises:
        RunError: It is held and not to be waited for.
    """
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
    began = time.monotonic()
    silent = 0.0
    while found.status == "running" and not is_gone(found.owner) and silent < found.lease:
        pause(found.lease / LOOKS)
        # Before looking: a pause of this process must not count as the owner's.
        silent = time.monotonic() - began
        if store.head(states.NAME)[1] != tag:
            found, tag = read_run(store)
            began = time.monotonic()
            silent = 0.0
    return found, tag


def this_boot() -> str:
    """Return what is unique to this machine since its last boot, the same in all its containers; ""
    if unknown.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _machine() -> str:
    try:
        return f"{this_boot()} {Path('/proc/self/ns/pid').readlink()}" if this_boot() else ""
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When the process started, in clock ticks since the boot (proc(5), stat field 22); None if it
    does not run.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
