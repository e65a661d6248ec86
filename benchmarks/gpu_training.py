"""Trainings that `wds-train bench gpu` starts, each in a process of its own."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.gpu_work import CannotRun, Settings, Work
from wds_train.checkpoint.lease import read_run
from wds_train.errors import WdsTrainError
from wds_train.storage.open import open_store

# A fresh process for every training, in milliseconds: the server has imported PyTorch, and uses no
# GPU.
PROCESSES = multiprocessing.get_context("forkserver")
MOST_WORKERS = 8
LOOK_SECONDS = 0.02  # between looks for the first checkpoint, which a short run soon replaces
END_SECONDS = 20.0  # for a training to commit and leave, before it is killed


class Training:
    """A run of `wds-train train` with the recipe `imagenette`, which begins at once.

    Args:
        work: The dataset, the device, and until when it may take.
        run: The run's folder. Its output goes to a file next to it.
        settings: Changes to the recipe, as for `--set`.
        flags: Further flags of the command.
        environment: Variables that are set for it, such as those of torch.distributed.
    """

    def __init__(
        self,
        work: Work,
        run: Path,
        settings: Settings,
        flags: tuple[str, ...],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        given = dict(environment or {})
        self._run = run
        self._until = work.until
        self._log = run.with_name(f"{run.name}-{given.get('RANK', '0')}.log")
        run.parent.mkdir(parents=True, exist_ok=True)

        workers = min(MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) - 1))
        command = ["train", "--recipe", "imagenette"]
        command += ["--dataset", work.images, "--run", str(run), "--workers", str(workers)]
        if work.device.type == "cpu":
            command += ["--device", "cpu"]
        for setting in (*work.scale.settings, *settings):
            command += ["--set", setting]
        command += flags

        # The owner's settings, caches and W&B project are no part of a benchmark.
        home = {"WDS_HOME": str(work.out / "home"), "WANDB_MODE": "disabled"}
        self._process = PROCESSES.Process(
            target=_train, args=(command, home | given, str(self._log)), daemon=False
        )
        self._process.start()

    def finish(self) -> None:
        """Wait until it ends.

        Raises:
            CannotRun: The time is up. Its run goes on at the next start.
            WdsTrainError: It failed; the message has its last line.
        """
        try:
            self._process.join(max(0.0, self._until - time.monotonic()))
            if self._process.exitcode is None:
                raise CannotRun(
                    f"no time is left for {self._run}; more --minutes, "
                    "and the same command goes on there"
                )
            if self._process.exitcode:
                raise WdsTrainError(
                    f"the training ended with code {self._process.exitcode}: {self._last_line()}"
                )
        finally:
            self.end()

    def _last_line(self) -> str:
        lines = [line for line in self._log.read_text().splitlines() if line.strip()]
        return lines[-1] if lines else "no word"

    def kill_after_commit(self) -> None:
        """Kill it, with SIGKILL, as soon as the manifest names a checkpoint.

        Raises:
            WdsTrainError: It ended, or the time was up, before there was one.
        """
        store = open_store(str(self._run))
        try:
            while self._process.exitcode is None and time.monotonic() < self._until:
                with contextlib.suppress(WdsTrainError):  # there is no run yet
                    if read_run(store)[0].checkpoints:
                        return
                time.sleep(LOOK_SECONDS)
            raise WdsTrainError(
                f"{self._run} was over before it could be killed; {self._log} says more"
            )
        finally:
            self._process.kill()
            self._process.join()

    def end(self) -> None:
        """End its process if it still runs. What it committed stays."""
        if self._process.exitcode is None:
            self._process.terminate()
            self._process.join(END_SECONDS)
            self._process.kill()
            self._process.join()


def _train(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Run a command line of wds-train with its output in `log`, and exit with its status."""
    # Dup, since children of this process write to it, too.
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.environ.update(environment)
    from wds_train.cli import main

    raise SystemExit(main(arguments))
