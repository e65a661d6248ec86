"""The signals that end a training with its state committed, whoever sends them, and how often."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from trainers import HOLD, SETTINGS, Job, Training, all_ended, wait_for_commit

from wds_train.checkpoint.lease import read_run
from wds_train.storage.open import open_store
from wds_train.training.stop_request import StopRequest

LONG = ("schedule.epochs=400",)
ONCE = ["SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT", "SIGHUP"]


@pytest.mark.parametrize("name", ONCE)
def test_a_signal_commits_and_exits_with_75(small: str, tmp_path: Path, name: str) -> None:
    job = Job(small, str(tmp_path / "run"), str(tmp_path), settings=LONG, workers=1)
    trainings = [Training(job)]
    with all_ended(trainings):
        trainings[0].until("epoch   1/400")
        wait_for_commit(job.run)
        # A terminal, or Slurm, sends it to the workers, too, which must go on until the trainer
        # ends them.
        for worker in children(trainings[0].pid) if name != "SIGTERM" else []:
            os.kill(worker, signal.Signals[name])
        assert trainings[0].end(signal.Signals[name]) == 75, trainings[0].output
    output = trainings[0].output
    assert output.count(f"{name}: stopping at the next step, state committed") == 1
    stopped = re.search(rf"stopped by {name} at step (\d+) of 4400, state committed", output)
    assert stopped is not None
    step = int(stopped[1])
    assert "report   " in output
    assert "Traceback" not in output
    manifest, _ = read_run(open_store(job.run))
    assert (manifest.status, manifest.checkpoints[-1].progress.step) == ("interrupted", step)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_what_comes_twice_by_itself_stops_no_sooner(small: str, tmp_path: Path, name: str) -> None:
    """While the state is on its way: a second SIGTERM would end the training there and then."""
    held = Job(
        small,
        str(tmp_path / "run"),
        str(tmp_path),
        settings=LONG,
        point="before a step",
        nth=5,
        sent=HOLD,
    )
    trainings = [Training(held)]
    with all_ended(trainings):
        trainings[0].until("held at")
        trainings[0].send(signal.Signals[name])
        trainings[0].until(f"{name}: stopping")
        assert trainings[0].end(signal.Signals[name]) == 75, trainings[0].output
    assert re.search(rf"stopped by {name} at step 5 of 4400, state committed", trainings[0].output)
    assert "stopped at once" not in trainings[0].output


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_person_who_asks_twice_is_heard_at_once(name: str) -> None:
    stop = StopRequest()
    stop._handle(signal.Signals[name], None)
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.Signals[name], None)
    assert stop.cause == name


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_the_launcher_passes_a_signal_on(small: str, tmp_path: Path, name: str) -> None:
    run = str(tmp_path / "run")
    settings = [part for setting in (*SETTINGS, *LONG) for part in ("--set", setting)]
    place = ["train", run, "--dataset", small, "--workers", "0", "--processes", "2"]
    environment = os.environ | {"WANDB_MODE": "disabled", "WDS_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "wds_train.cli", *place, *settings]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stderr is not None
        lines = iter(launcher.stderr.readline, "")
        assert any(re.match(r"epoch +1/400", line) for line in lines)
        launcher.send_signal(signal.Signals[name])
        said = "".join(lines)
        assert launcher.wait() == 75, said
    assert re.search(
        rf"stopped by ({name}|another rank) at step \d+ of 4400, state committed", said
    )
    assert read_run(open_store(run))[0].status == "interrupted"
