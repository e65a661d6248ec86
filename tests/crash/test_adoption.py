"""Killed between a checkpoint's upload and the swap that names it, a run goes on from that checkpoint: nothing is lost.

On one rank and on two, against the embedded S3 server; and it ends with the bytes and the records of a run left alone.
"""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
from outcomes import assert_nothing_named_is_missing, assert_same_end
from trainers import STEPS_PER_EPOCH, Job, Training, all_ended, start_ranks, wait_for_commit

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run_manifest import Pending
from wds_train.storage.base import Store
from wds_train.storage.open import open_store

UPLOADED = "between uploads and manifest"
SHORT_LEASE = {"checkpoint.lease.LEASE_SECONDS": 2.0}
ADOPTED = "was uploaded by the attempt before, which ended before it was named: adopted"


def end(job: Job, ranks: int) -> tuple[int, str, list[int]]:
    """Run an attempt to its end; its exit code, its output, and the steps that it took."""
    trainings = start_ranks(job, ranks) if ranks > 1 else [Training(job)]
    with all_ended(trainings):
        code = trainings[0].end()
        for other in trainings[1:]:
            # Whoever starts ranks ends them all when one was killed: before they have met, they would wait for minutes.
            other.end(signal.SIGKILL if code < 0 else None)
    return code, trainings[0].output, sorted(trainings[0].steps())


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def job(small: str, s3_url: str, tmp_path: Path) -> Job:
    return Job(small, f"{s3_url}/run", str(tmp_path))


@pytest.fixture
def unbroken(job: Job, s3_url: str, ranks: int) -> str:
    """The address of a run that nothing happened to."""
    url = f"{s3_url}/unbroken"
    code, output, _ = end(replace(job, run=url), ranks)
    assert code == 0, output
    return url


def killed(job: Job, ranks: int) -> tuple[Store, Pending]:
    """Kill a run when its commit is uploaded; its store, and that commit."""
    code, output, _ = end(job, ranks)
    assert code == -signal.SIGKILL, output
    store = open_store(job.run)
    pending = read_run(store)[0].pending
    assert pending is not None
    assert_nothing_named_is_missing(store)
    return store, pending


@pytest.mark.parametrize("epoch", [1, 2, 4], ids=["the first epoch", "the second", "the last"])
def test_killed_before_the_swap_it_goes_on_from_what_was_uploaded(
    job: Job, unbroken: str, ranks: int, epoch: int
) -> None:
    store, pending = killed(replace(job, point=UPLOADED, nth=epoch), ranks)
    assert pending.checkpoint.progress.step == epoch * STEPS_PER_EPOCH
    code, output, steps = end(job, ranks)
    assert code == 0, output
    assert f"the commit of step {epoch * STEPS_PER_EPOCH} {ADOPTED}" in output
    assert steps == list(range(epoch * STEPS_PER_EPOCH, 4 * STEPS_PER_EPOCH))
    assert_same_end(unbroken, job.run)
    assert {entry.key for entry in store.list("ckpt/")} == {
        c.object.key for c in read_run(store)[0].checkpoints
    }


def test_killed_so_again_and_again(job: Job, unbroken: str, ranks: int) -> None:
    """Also while it adopts: the first that passes the point after a kill is the adoption itself."""
    killed(replace(job, point=UPLOADED, nth=2), ranks)
    for nth, step in ((1, 22), (1, 22), (2, 33), (2, 44)):
        _, pending = killed(replace(job, point=UPLOADED, nth=nth), ranks)
        assert pending.checkpoint.progress.step == step
    code, output, steps = end(job, ranks)
    assert (code, steps) == (0, []), output
    assert_same_end(unbroken, job.run)


@pytest.mark.parametrize("part", ["checkpoint", "metrics"])
def test_damaged_it_is_left_out_and_trained_again(
    job: Job, unbroken: str, ranks: int, part: str
) -> None:
    store, pending = killed(replace(job, point=UPLOADED, nth=2), ranks)
    assert pending.segment is not None
    key = pending.checkpoint.object.key if part == "checkpoint" else pending.segment.object.key
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    store.write(key, bytes(data))
    code, output, steps = end(job, ranks)
    assert code == 0, output
    assert "the commit of step 22 was not finished by the attempt before" in output
    assert steps[0] == STEPS_PER_EPOCH
    assert_same_end(unbroken, job.run)
    assert {entry.key for entry in store.list()} == read_run(store)[0].keys | {"manifest.json"}


def test_only_announced_it_is_left_out(job: Job, unbroken: str, ranks: int) -> None:
    """Of a checkpoint that goes up in parts, some of which are there, test_resume.py has more."""
    store, _ = killed(replace(job, point="announced"), ranks)
    code, output, steps = end(job, ranks)
    assert code == 0, output
    assert "the commit of step 11 was not finished by the attempt before" in output
    assert steps[0] == 0
    assert_same_end(unbroken, job.run)
    assert {entry.key for entry in store.list()} == read_run(store)[0].keys | {"manifest.json"}


def test_a_sleeper_s_upload_is_never_adopted(job: Job, s3_url: str) -> None:
    """It sleeps between the announcement and the upload, and wakes when its successor has committed."""
    unbroken = f"{s3_url}/unbroken"
    assert end(replace(job, run=unbroken), 1)[0] == 0
    hasty = replace(job, constants=SHORT_LEASE)
    store = open_store(job.run)
    trainings = [Training(replace(hasty, point="announced", nth=2, sent=signal.SIGSTOP))]
    with all_ended(trainings):
        trainings[0].until("held at")
        trainings.append(Training(hasty))
        trainings[1].until("resuming at step")
        wait_for_commit(job.run, beyond=STEPS_PER_EPOCH)
        trainings[1].end(signal.SIGKILL)
        assert "the commit of step 22 was not finished by the attempt before" in trainings[1].output
        trainings[0].send(signal.SIGCONT)
        assert trainings[0].end() == 75, trainings[0].output
        assert "has claimed" in trainings[0].output
        late = "ckpt/000001-000000022-000002.safetensors"
        assert late in {entry.key for entry in store.list("ckpt/")}
        trainings.append(Training(hasty))
        assert trainings[2].end() == 0, trainings[2].output
        assert f"removed {late}" in trainings[2].output
        assert f"the commit of step 22 {ADOPTED}" not in trainings[2].output
    assert_same_end(unbroken, job.run)
