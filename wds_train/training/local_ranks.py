"""Start and end one process for each GPU of this machine, together.

`wds-train train` calls `launch` where a machine has several GPUs. Each process that it starts is a
rank (`training/ranks.py`).
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import torch.distributed as dist

from wds_train.environment import number_of
from wds_train.errors import Interrupted, RunError, UsageError
from wds_train.machine import cores
from wds_train.training.ranks import LAST_SECONDS
from wds_train.training.stop_request import SIGNALS

# The number of prctl(2)'s operation, which Python does not name.
PR_SET_PDEATHSIG = 1


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `wds-train ARGUMENTS` as `processes` ranks on this machine, and wait for them.

    torchrun does the same, but ends with 1 whatever its ranks ended with: a supervisor could not
    recognise an interruption.

    Args:
        arguments: The command line, without the program.
        processes: The number of ranks.

    Returns:
        The exit code for all of them.
    """
    # The store where the ranks meet, and their environment, as torchrun would set it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, cores() // processes)
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "WDS_LAUNCHER": str(os.getpid()),
    }

    # Pass signals on. The handlers come first: a rank that is started must not miss one.
    ranks: list[subprocess.Popen[bytes]] = []
    for number in SIGNALS:
        is_nohup = number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
        if not is_nohup:
            signal.signal(number, lambda number, _: _send(ranks, number))

    # Start them.
    for rank in range(processes):
        environment = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        # A session of its own: Ctrl-C in the terminal reaches this process alone, which passes it
        # on, once.
        command = [sys.executable, "-m", "wds_train.cli", *arguments]
        ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
    _wait_for(ranks)
    return _exit_code(ranks)


def _send(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    """Send a signal to all ranks."""
    for rank in ranks:
        rank.send_signal(number)


def _wait_for(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Wait until all ranks have ended; once one has failed, the others have LAST_SECONDS."""
    deadline = float("inf")
    is_asked = False
    while _is_any_running(ranks):
        # One that was lost leaves the others waiting within a step.
        if deadline == float("inf") and _has_any_failed(ranks):
            deadline = time.monotonic() + LAST_SECONDS
        # Ask the others to end; once more after LAST_SECONDS, with no way to refuse.
        if time.monotonic() > deadline:
            for rank in ranks:
                if rank.poll() is not None:
                    continue
                if is_asked:
                    rank.kill()
                else:
                    rank.terminate()
            deadline = time.monotonic() + LAST_SECONDS
            is_asked = True
        time.sleep(0.05)


def _is_any_running(ranks: list[subprocess.Popen[bytes]]) -> bool:
    """Return True at the first rank that runs."""
    return any(rank.poll() is None for rank in ranks)


def _has_any_failed(ranks: list[subprocess.Popen[bytes]]) -> bool:
    """Return True if a rank has ended with another code than 0, also behind one that runs."""
    return any(rank.poll() for rank in ranks)


def _exit_code(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Return the exit code for all ranks; name those that were killed.

    An error that a restart would only repeat counts above an interruption.
    """
    worst = 0
    has_failed = False
    for number, rank in enumerate(ranks):
        code = rank.returncode
        if code < 0:
            name = signal.Signals(-code).name
            print(f"wds-train: rank {number} was killed by {name}", file=sys.stderr)
        if code in (RunError.exit_code, UsageError.exit_code):
            worst = max(worst, code)
        if code:
            has_failed = True
    if worst:
        return worst
    if has_failed:
        return Interrupted.exit_code
    return 0


def die_with_launcher() -> None:
    """Let the kernel send SIGHUP to this rank when its launcher dies.

    Otherwise the rank would train on, unseen. The kernel sends the signal at the death of each of
    the launcher's threads; a training takes any number of SIGHUPs as one.
    """
    launcher = int(number_of("WDS_LAUNCHER", 0))
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
        # The launcher may have died before the call.
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGHUP)
