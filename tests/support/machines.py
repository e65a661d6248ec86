"""Trainings in processes of their own, of one rank or several, by a script that puts a fault into them."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from trainers import CONTEXT, SETTINGS

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.storage.open import open_store


class Rank:
    """A rank of a training: forked with PyTorch imported, which takes eight seconds of CPU, and used like a `Popen`."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        log.write_text("")
        self._process = CONTEXT.Process(target=_run_script, args=(command, environment, str(log)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code; None for a process that lives."""
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        """Wait for the end, and return the exit code."""
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("a rank", seconds or 0.0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run_script(command: list[str], environment: dict[str, str], log: str) -> None:
    """Run a Python script as `python SCRIPT ARGUMENTS` would; the body of a rank's process."""
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as in a command that a person starts
    sys.argv[:] = command
    runpy.run_path(command[0], run_name="__main__")


@dataclass(frozen=True)
class Machine:
    """Where trainings run. `script` ends by calling wds-train's `entry`, and finds its fault in $FAULT, as JSON."""

    script: str
    dataset: str
    folder: Path
    ranks: int = 1
    settings: tuple[str, ...] = ()
    workers: int = 0
    started: list[Rank] = field(default_factory=list)

    def start(self, run: str, *arguments: str, **fault: object) -> list[Rank]:
        """Begin to train, with the fault, one process a rank; what each says goes to FOLDER/rankN.log."""
        script = self.folder / "train.py"
        script.write_text(self.script)
        settings = [part for each in (*SETTINGS, *self.settings) for part in ("--set", each)]
        command = [str(script), "train", run, "--dataset", self.dataset, *arguments, *settings]
        command += ["--workers", str(self.workers)]
        own = {"FAULT": json.dumps(fault), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        environment = os.environ | own | {"WDS_HOME": str(self.folder)}
        places = enumerate(self._places())
        processes = [Rank(command, environment | place, self.log(rank)) for rank, place in places]
        self.started.extend(processes)
        return processes

    def end(self) -> None:
        """Kill what still runs."""
        for process in self.started:
            process.kill()
            process.wait()

    def log(self, rank: int) -> Path:
        """Where what a rank says is."""
        return self.folder / f"rank{rank}.log"

    def said(self) -> str:
        """What all ranks have said."""
        return "".join(self.log(rank).read_text() for rank in range(self.ranks))

    def train(self, run: str, *arguments: str, **fault: object) -> tuple[int, str]:
        """Train, with the fault; the exit code, which is that of every rank, and what was said."""
        processes = self.start(run, *arguments, **fault)
        codes = {process.wait(400) for process in processes}
        said = self.said()
        assert len(codes) == 1, (codes, said)
        assert "Traceback" not in said, said
        return codes.pop(), said

    def _places(self) -> list[dict[str, str]]:
        if self.ranks == 1:
            return [{}]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(self.ranks)}
        return [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(self.ranks)]


def manifest_of(run: str) -> RunManifest:
    """The manifest of the run at the address `run`."""
    return read_run(open_store(run))[0]
