"""The end of a training always comes, whatever hangs, and a run that is done stays done."""

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_imds import FakeImds
from fault_proxy import FaultProxy
from trainers import HOLD, SETTINGS, Job, Training, all_ended, wait_for_commit
from waiting import wait_until

from wds_train.checkpoint.lease import read_run
from wds_train.cli import main
from wds_train.storage.open import open_store

LONG = ("schedule.epochs=400",)
NOTICE = "/latest/meta-data/spot/instance-action"


@pytest.fixture
def silent_wandb() -> Iterator[dict[str, str]]:
    """The settings of a W&B that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        key = "0" * 40
        yield {
            "WANDB_MODE": "online",
            "WANDB_API_KEY": key,
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
        }


def command_of(job: Job) -> list[str]:
    settings = [part for setting in (*SETTINGS, *job.settings) for part in ("--set", setting)]
    place = ["--dataset", job.dataset, "--run", job.run, "--workers", "0"]
    return [sys.executable, "-m", "wds_train.cli", "train", *place, *settings, *job.arguments]


@pytest.fixture
def hung(small: str, s3_url: str, silent_wandb: dict[str, str], tmp_path: Path) -> Job:
    """A long training on the session's server, whose W&B is silent."""
    grace = {"training.stop_request.GRACE_SECONDS": 8.0}
    return Job(
        small,
        f"{s3_url}/run",
        str(tmp_path),
        settings=LONG,
        environment=silent_wandb,
        constants=grace,
    )


@pytest.mark.parametrize("asked", ["notice", "SIGTERM"])
def test_the_process_is_gone_by_the_deadline_whatever_hangs(
    hung: Job, fault_proxy: FaultProxy, imds: FakeImds, asked: str
) -> None:
    """The store, W&B and the metadata service."""
    trainings = [Training(hung)]
    with all_ended(trainings):
        trainings[0].until("epoch   2/400")
        wait_for_commit(hung.run)
        fault_proxy.fail("hang", times=float("inf"))
        if asked == "notice":
            imds.give_notice(15)
            wait_until(lambda: imds.asked["GET", NOTICE, 200], "a look at the notice")
        else:
            trainings[0].send(signal.SIGTERM)
        imds.broken = 3600.0
        assert trainings[0].end() == 75, trainings[0].output
    assert re.search(
        r"the time is up while .+ hangs|could not be committed in time", trainings[0].output
    )


def test_a_main_thread_that_hangs_in_c_code_is_ended_too(small: str, tmp_path: Path) -> None:
    """One rank is stopped for good: the other waits in gloo, where no signal handler runs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    trainings = []
    with all_ended(trainings):
        for rank in ("0", "1"):
            environment = place | {"RANK": rank, "LOCAL_RANK": rank}
            constants = {"training.stop_request.GRACE_SECONDS": 2.0}
            job = Job(
                small,
                str(tmp_path / "run"),
                str(tmp_path),
                settings=LONG,
                environment=environment,
                constants=constants,
            )
            trainings.append(Training(job))
        trainings[0].until("epoch   1/400")
        trainings[1].send(signal.SIGSTOP)
        time.sleep(0.5)
        assert trainings[0].end(signal.SIGTERM) == 75, trainings[0].output
    assert "the time is up while the training hangs" in trainings[0].output


def test_the_cause_comes_first_and_the_last_word_takes_seconds(
    small: str, s3_url: str, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    minutes = ("--max-uncommitted-minutes", "0.2", "--commit-minutes", "0.01")
    trainings = [
        Training(Job(small, f"{s3_url}/run", str(tmp_path), settings=LONG, arguments=minutes))
    ]
    with all_ended(trainings):
        trainings[0].until("epoch   2/400")
        wait_for_commit(f"{s3_url}/run")
        fault_proxy.fail("hang", times=float("inf"))
        trainings[0].until("wds-train: error: nothing could be committed for")
        assert trainings[0].end() == 1, trainings[0].output
    assert re.search(
        r"error: nothing could .*\n.*could not be marked as failed: s3://.* did not answer "
        r"within 5 s",
        trainings[0].output,
    )
    assert trainings[0].output.count("nothing could be committed") == 1


def test_a_silent_wandb_delays_neither_the_start_nor_the_end(
    small: str, tmp_path: Path, silent_wandb: dict[str, str]
) -> None:
    hasty = {"tracking.tracker.FINISH_SECONDS": 2.0, "tracking.wandb_board.INIT_SECONDS": 3600.0}
    job = Job(
        small, str(tmp_path / "run"), str(tmp_path), environment=silent_wandb, constants=hasty
    )
    trainings = [Training(job)]
    with all_ended(trainings):
        trainings[0].until("epoch   1/4")
        trainings[0].until("epoch   4/4")
        assert trainings[0].end() == 0, trainings[0].output
    assert "W&B did not end within 2 s and is left behind" in trainings[0].output
    assert trainings[0].output.count("W&B ") == 1  # nothing more of what the process's end breaks
    assert read_run(open_store(job.run))[0].status == "done"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_hangs_does_not_cost_the_newest_state(
    small: str, s3_url: str, fault_proxy: FaultProxy, tmp_path: Path, workers: int
) -> None:
    assert main(["shards", str(Path(small).with_name("images")), f"{s3_url}/data"]) == 0
    hasty = {"loader.fetch.AHEAD_BYTES": 1, "training.deadline.DATA_SECONDS": 1.0}
    job = Job(
        f"{s3_url}/data",
        str(tmp_path / "run"),
        str(tmp_path),
        settings=LONG,
        constants=hasty,
        workers=workers,
    )
    trainings = [Training(job)]
    with all_ended(trainings):
        trainings[0].until("epoch   1/400")
        fault_proxy.fail("hang", method="GET", key="shard-", times=float("inf"))
        steps = -1
        while len(trainings[0].steps()) > steps:
            steps = len(trainings[0].steps())
            time.sleep(1)
        assert trainings[0].end(signal.SIGTERM) == 75, trainings[0].output
        steps = len(trainings[0].steps())  # a slow machine may have been at some more
    assert re.search(rf"at step {steps} of 4400, state committed", trainings[0].output)
    assert read_run(open_store(job.run))[0].checkpoints[-1].progress.step == steps


def test_metrics_that_hang_delay_the_end_of_a_done_run_by_seconds(
    small: str, s3_url: str, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    job = Job(
        small,
        f"{s3_url}/run",
        str(tmp_path),
        constants={"training.run_training.REPORT_SECONDS": 1.0},
    )
    fault_proxy.fail("hang", method="GET", key="metrics/", times=float("inf"))
    trainings = [Training(job)]
    with all_ended(trainings):
        trainings[0].until("epoch   4/4")
        assert trainings[0].end() == 0, trainings[0].output
    assert re.search(
        r"report   could not be written \(s3://.*/run did not answer within 1 s\)",
        trainings[0].output,
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_at_the_last_commit_leaves_a_done_run_done(
    small: str, tmp_path: Path, when: str
) -> None:
    job = Job(
        small, str(tmp_path / "run"), str(tmp_path), point=f"{when} the manifest", nth=4, sent=HOLD
    )
    trainings = [Training(job)]
    with all_ended(trainings):
        trainings[0].until("held at")
        assert trainings[0].end(signal.SIGTERM) == 0, trainings[0].output
    assert "SIGTERM: stopping" in trainings[0].output
    assert read_run(open_store(job.run))[0].status == "done"


def test_what_comes_after_the_last_commit_can_only_warn(small: str, tmp_path: Path) -> None:
    """A segment of the metrics is missing, and nothing can be written to .wds."""
    run = str(tmp_path / "run")
    (tmp_path / "file").touch()
    trainings = [Training(Job(small, run, str(tmp_path), settings=LONG))]
    nowhere = {"WDS_HOME": str(tmp_path / "file"), "WANDB_MODE": "offline"}
    with all_ended(trainings):
        trainings[0].until("epoch   1/400")
        wait_for_commit(run)
        trainings[0].end(signal.SIGTERM)
        manifest, _ = read_run(open_store(run))
        open_store(run).delete(manifest.metrics[0].object.key)
        last = manifest.checkpoints[-1].progress.evaluated + 1
        text = Path(run, "manifest.json").read_text().replace('"epochs": 400', f'"epochs": {last}')
        Path(run, "manifest.json").write_text(text)
        job = Job(
            small, run, str(tmp_path), settings=(f"schedule.epochs={last}",), environment=nowhere
        )
        for said in (f"epoch +{last}/{last} ", "is done already"):
            trainings.append(Training(job))
            assert trainings[-1].end() == 0, trainings[-1].output
            output = trainings[-1].output
            assert re.search(said, output)
            named = output.index(f"metrics {manifest.metrics[0].object.key} cannot be used")
            assert said == "is done already" or named < output.index(f"epoch {last:3d}/{last}")
            assert "report   could not be written" in output
            assert "W&B      " not in output
            assert read_run(open_store(run))[0].status == "done"


@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_a_closed_terminal_stops_a_training_with_its_state_committed(
    small: str, tmp_path: Path, ignored: bool
) -> None:
    """A real one: what is written to it fails from then on."""
    job = Job(small, str(tmp_path / "run"), str(tmp_path), settings=LONG)
    command = command_of(job)
    child, terminal = pty.fork()
    if not child:
        os.environ.update(WANDB_MODE="disabled", WDS_HOME=job.folder)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        os.execvp(command[0], command)
    try:
        said = b""
        while b"epoch   1/400" not in said:
            said += os.read(terminal, 4096)
        wait_for_commit(job.run)
        before = read_run(open_store(job.run))[0].checkpoints[-1].progress.step
        os.close(terminal)
        if ignored:
            wait_for_commit(job.run, beyond=before)
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    finally:
        with_nobody_left(child)
    manifest, _ = read_run(open_store(job.run))
    assert manifest.status == "interrupted"
    assert manifest.checkpoints[-1].progress.step > 0


def test_a_training_without_standard_streams(small: str, tmp_path: Path) -> None:
    """As a supervisor may start it: its own pipes and connections must not get their numbers."""
    command = command_of(Job(small, str(tmp_path / "run"), str(tmp_path)))
    environment = os.environ | {"WANDB_MODE": "disabled", "WDS_HOME": str(tmp_path)}
    shell = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *command]
    assert subprocess.run(shell, env=environment, check=False, timeout=120).returncode == 0
    assert read_run(open_store(str(tmp_path / "run")))[0].status == "done"


def with_nobody_left(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        return
    os.waitpid(child, 0)


def test_the_death_of_the_launcher_stops_its_ranks_once(small: str, tmp_path: Path) -> None:
    job = Job(
        small, str(tmp_path / "run"), str(tmp_path), settings=LONG, arguments=("--processes", "2")
    )
    environment = os.environ | {"WANDB_MODE": "disabled", "WDS_HOME": job.folder}
    with subprocess.Popen(
        command_of(job), env=environment, stderr=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stderr is not None
        lines = iter(launcher.stderr.readline, "")
        assert any(re.match(r"epoch +1/400", line) for line in lines)
        launcher.kill()
        said = "".join(lines)  # until the last rank has closed its end
    assert "stopped at once" not in said
    assert re.search(r"stopped by (SIGHUP|another rank) at step \d+ of 4400, state committed", said)
    assert read_run(open_store(job.run))[0].status == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--accumulate", "999"),
            "a rank's 16 samples of a batch cannot be cut into 999 micro-batches",
        ),
        (
            ("--set", "model.name=vit_tiny_patch16_224"),
            "data.size = 16 cannot work: vit_tiny_patch16_224 takes no images",
        ),
        (("--set", "model.name=resnet18", "--set", "data.size=1"), "data.size = 1"),
        (("--set", "data.auto_augment=nonsense"), "is no policy known"),
        (("--set", "distill.teacher=missing.safetensors"), "there is no file missing.safetensors"),
        (("--init", "missing.safetensors"), "there is no file missing.safetensors"),
        (("--init", "timm:no_such_model"), "timm has no pretrained weights of that name"),
        (("--set", "optimizer.name=nonsense"), "timm has no optimizer 'nonsense'"),
        (("--set", "batch=512"), "fewer than one global batch of 512"),
    ],
)
def test_what_cannot_work_is_refused_before_the_claim(
    small: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    trainings = [Training(Job(small, str(tmp_path / "run"), str(tmp_path), arguments=arguments))]
    with all_ended(trainings):
        assert trainings[0].end() in (1, 2), trainings[0].output
    assert message in trainings[0].output
    assert "Traceback" not in trainings[0].output
    assert not (tmp_path / "run").exists()


def test_nothing_is_called_committed_that_was_not(small: str, tmp_path: Path) -> None:
    job = Job(small, str(tmp_path / "run"), str(tmp_path), point="claimed", sent=signal.SIGTERM)
    trainings = [Training(job)]
    with all_ended(trainings):
        assert trainings[0].end() == 75, trainings[0].output
    assert (
        "stopped by SIGTERM before the first of 44 steps; the same command begins anew"
        in trainings[0].output
    )
    assert "state committed to" not in trainings[0].output
    manifest, _ = read_run(open_store(job.run))
    assert (manifest.status, manifest.checkpoints) == ("interrupted", ())


def test_disabling_wandb_names_no_folder(small: str, tmp_path: Path) -> None:
    trainings = [Training(Job(small, str(tmp_path / "run"), str(tmp_path)))]
    with all_ended(trainings):
        assert trainings[0].end() == 0, trainings[0].output
    assert "W&B" not in trainings[0].output
    assert not (tmp_path / "wandb").exists()
