"""Several ranks train as one does: the same samples and losses. When one is killed, all end.

On CPUs through gloo, with a model without BatchNorm, whose statistics would differ by rank.
"""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch.distributed import TCPStore
from trainers import (
    HOLD,
    SETTINGS,
    STEPS_PER_EPOCH,
    Job,
    Training,
    all_ended,
    make_dataset,
    start_ranks,
    wait_for_commit,
)

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run import Run
from wds_train.errors import UsageError
from wds_train.storage.open import open_store
from wds_train.training.ranks import Ranks

LAYERNORM = (
    "model.name=test_convnext",
    "data.size=32",
    "data.eval_size=32",
    "model.drop_path=0",
    "optimizer.lr=0.02",
    "mix.mixup=0",
)
EPOCHS = 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("distributed"))


@pytest.fixture
def job(dataset: str, tmp_path: Path) -> Job:
    return Job(
        dataset,
        str(tmp_path / "run"),
        str(tmp_path),
        settings=(*LAYERNORM, f"schedule.epochs={EPOCHS}"),
    )


def history(job: Job) -> list[dict[str, float]]:
    store = open_store(job.run)
    return Run(store, *read_run(store)).history()


def losses(job: Job) -> list[float]:
    return [
        record[name]
        for record in history(job)
        for name in ("train/loss", "epoch/loss", "val/loss")
        if name in record
    ]


def test_1_2_and_4_ranks_train_the_same(job: Job, tmp_path: Path) -> None:
    samples = {}
    seen = {}
    for ranks in (1, 2, 4):
        micro_batches = ("--accumulate", str(4 // ranks))
        one = replace(
            job, run=str(tmp_path / f"run{ranks}"), workers=ranks % 2, arguments=micro_batches
        )
        trainings = start_ranks(one, ranks)
        with all_ended(trainings):
            for training in trainings:
                assert training.end() == 0, training.output
        steps = [training.steps() for training in trainings]
        samples[ranks] = {
            step: [sample for rank in steps for sample in rank[step]] for step in steps[0]
        }
        seen[ranks] = losses(one)
    assert samples[1] == samples[2] == samples[4]
    assert len(samples[1]) == EPOCHS * STEPS_PER_EPOCH
    for ranks in (2, 4):
        np.testing.assert_allclose(seen[ranks], seen[1], rtol=2e-4)


def test_a_rank_that_was_told_otherwise_is_refused(job: Job) -> None:
    trainings = start_ranks(job, 2, last=("seed=7",))
    with all_ended(trainings):
        assert trainings[1].end() == 2, trainings[1].output
    assert "was begun with seed 0, not 7; leave out what differs" in trainings[1].output


def test_a_killed_rank_ends_all_and_one_process_goes_on(job: Job) -> None:
    """Through the launcher that `make train` uses on a machine with several GPUs."""
    settings = [part for setting in (*SETTINGS, *job.settings) for part in ("--set", setting)]
    command = [
        sys.executable,
        "-m",
        "wds_train.cli",
        "train",
        job.run,
        "--dataset",
        job.dataset,
        "--workers",
        "0",
    ]
    environment = os.environ | {"WANDB_MODE": "disabled", "WDS_HOME": job.folder}
    with subprocess.Popen(
        [*command, *settings, "--processes", "2", "--set", "schedule.epochs=500"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        assert launcher.stderr is not None
        lines = iter(launcher.stderr.readline, "")
        assert any(re.match(r"epoch +1/500", line) for line in lines)
        wait_for_commit(job.run)
        ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        second = next(
            rank for rank in ranks if b"\0RANK=1\0" in Path(f"/proc/{rank}/environ").read_bytes()
        )
        os.kill(int(second), signal.SIGKILL)
        said = "".join(lines)
        assert launcher.wait(120) == 75
    assert "rank 1 was killed by SIGKILL" in said
    assert re.search(
        r"wds-train: contact with the other ranks is lost \(.+\); the same command, on any number "
        r"of GPUs",
        said,
    )
    manifest, _ = read_run(open_store(job.run))
    assert manifest.status == "interrupted"
    alone = Training(
        replace(job, settings=(*job.settings, "schedule.epochs=500"), sent=signal.SIGTERM)
    )
    with all_ended([alone]):
        alone.until(r"resuming at step \d+ of 5500")
        assert alone.end(signal.SIGTERM) == 75
    committed = manifest.checkpoints[-1].progress.step
    assert committed >= STEPS_PER_EPOCH
    assert min(alone.steps(), default=committed) == committed


def test_a_signal_to_one_rank_stops_all_with_the_state_committed(job: Job) -> None:
    long = replace(job, settings=(*job.settings, "schedule.epochs=500"))
    trainings = start_ranks(long, 2)
    with all_ended(trainings):
        trainings[0].until(r"epoch +1/500")
        assert trainings[1].end(signal.SIGTERM) == 75
        assert trainings[0].end() == 75, trainings[0].output
    assert re.search(
        r"stopped by another rank at step (\d+) of 5500, state committed", trainings[0].output
    )
    manifest, _ = read_run(open_store(long.run))
    assert manifest.status == "interrupted"
    assert (
        manifest.checkpoints[-1].progress.step
        == max(trainings[0].steps()) + 1
        == max(trainings[1].steps()) + 1
    )


def test_a_batch_that_the_ranks_cannot_share_is_refused_by_all(job: Job) -> None:
    trainings = start_ranks(replace(job, settings=(*job.settings, "batch=6")), 4)
    with all_ended(trainings):
        codes = [training.end() for training in trainings]
    # The first that leaves may take the store with it before the others come; `launch` prefers
    # its code to theirs.
    assert codes[0] == 2
    assert set(codes) <= {2, 75}
    assert (
        "a global batch of 6 is read in 2 lanes, which 4 ranks cannot share" in trainings[0].output
    )


def test_a_restart_hears_no_words_of_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's store outlives a restart: its ranks must not follow the last leader's words."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": "2",
        "RANK": "1",
    }
    for name, value in (
        place | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ).items():
        monkeypatch.setenv(name, value)

    def nothing_yet(_: float) -> None:
        raise TimeoutError

    Ranks(0, 2).announce({"progress": 1})
    assert Ranks(1, 2).await_announcement(nothing_yet) == {"progress": 1}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(TimeoutError):
        Ranks(1, 2).await_announcement(nothing_yet)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "x", "RANK = 'x' in the environment is not a whole number"),
        ("RANK", "2", "RANK = 2 cannot work with"),
    ],
)
def test_a_wrong_place_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        Ranks.of_environment()


def test_a_rank_that_is_lost_after_the_last_commit_leaves_a_done_run_done(job: Job) -> None:
    held = replace(job, point="after the manifest", nth=EPOCHS, sent=HOLD)
    trainings = start_ranks(held, 2)
    with all_ended(trainings):
        trainings[0].until("held at")
        trainings[1].end(signal.SIGKILL)
        assert trainings[0].end() == 0, trainings[0].output
    assert (
        "the run is done all the same (contact with the other ranks is lost" in trainings[0].output
    )
    assert read_run(open_store(job.run))[0].status == "done"
