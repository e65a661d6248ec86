"""One process for each GPU of this machine, started and ended together."""

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

PR_SET_PDEATHSIG = 1


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `wds-train ARGUMENTS` as `processes` ranks on this machine; the exit code for all of
    them.

    torchrun does the same, but ends with 1 whatever its ranks ended with, so that nobody could tell
    an interruption.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    place |= {
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    threads = max(1, cores() // processes)
    place |= {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "WDS_LAUNCHER": str(os.getpid()),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # by `nohup`
            signal.signal(number, lambda number, _: _send(ranks, number))
    for rank in range(processes):
        environment = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        # A session of its own: Ctrl-C in the terminal reaches this process alone, which passes it
        # on, once.
        command = [sys.executable, "-m", "wds_train.cli", *arguments]
        ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
    return _outcome(ranks)


def _send(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        rank.send_signal(number)


def _outcome(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all ranks; once one has failed, the others have LAST_SECONDS."""
    deadline = float("inf")
    asked = False
    while any(rank.poll() is None for rank in ranks):
        if deadline == float("inf") and any(rank.returncode for rank in ranks):
            deadline = time.monotonic() + LAST_SECONDS
        if time.monotonic() > deadline:
            for rank in (rank for rank in ranks if rank.poll() is None):
                rank.kill() if asked else rank.terminate()
            deadline = time.monotonic() + LAST_SECONDS
            asked = True
        time.sleep(0.05)
    codes = [rank.returncode for rank in ranks]
    for number, code in enumerate(codes):
        if code < 0:
            print(
                f"wds-train: rank {number} was killed by {signal.Signals(-code).name}",
                file=sys.stderr,
            )
    if failed := [code for code in codes if code in (RunError.exit_code, UsageError.exit_code)]:
        return max(failed)
    return Interrupted.exit_code if any(codes) else 0


def die_with_launcher() -> None:
    """Have the kernel send SIGHUP to this rank when its launcher dies; it would train on, unseen,
    otherwise. The kernel sends it at the death of each of the launcher's threads in turn, and of
    SIGHUP alone any number counts as one.
    """
    launcher = int(number_of("WDS_LAUNCHER", 0))
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGHUP)
