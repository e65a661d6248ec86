"""Trainings in processes of their own, of one rank or several, by a script that puts a fault into them."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from trainers import SETTINGS

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.storage.open import open_store


@dataclass(frozen=True)
class Machine:
    """Where trainings run. `script` ends by calling wds-train's `entry`, and finds its fault in $FAULT, as JSON."""

    script: str
    dataset: str
    folder: Path
    ranks: int = 1
    settings: tuple[str, ...] = ()
    workers: int = 0

    def start(self, run: str, *arguments: str, **fault: object) -> list[subprocess.Popen[str]]:
        """Begin to train, with the fault, one process a rank; what each says goes to FOLDER/rankN.log."""
        script = self.folder / "train.py"
        script.write_text(self.script)
        settings = [part for each in (*SETTINGS, *self.settings) for part in ("--set", each)]
        command = [sys.executable, str(script), "train", run, "--dataset", self.dataset, *arguments, *settings]
        command += ["--workers", str(self.workers)]
        own = {"FAULT": json.dumps(fault), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        environment = os.environ | own | {"WDS_HOME": str(self.folder)}
        processes = []
        for rank, place in enumerate(self._places()):
            with self.log(rank).open("w") as log:
                process = subprocess.Popen(
                    command, env=environment | place, stdout=log, stderr=subprocess.STDOUT, text=True
                )
            processes.append(process)
        return processes

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
