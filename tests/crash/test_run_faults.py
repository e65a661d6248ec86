"""A run among others and in trouble: two trainers, notices, and a store that fails while the state goes there."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_imds import FakeImds
from fault_proxy import FaultProxy
from outcomes import end_state
from trainers import HOLD, Job, Training, all_ended, wait_for_commit
from waiting import wait_until

from wds_train.checkpoint.lease import read_run
from wds_train.storage.base import Store
from wds_train.storage.open import open_store

ROUNDS = int(os.environ.get("WDS_CRASH_ROUNDS", "2"))
SHORT_LEASE = {"checkpoint.lease.LEASE_SECONDS": 1.5}
HASTY = {"storage.s3_connection.PATIENCE_SECONDS": 0.5, "checkpoint.committer.RETRY_SECONDS": 0.5}
LONG = ("schedule.epochs=400",)


def assert_named_objects_are_there(store: Store) -> None:
    manifest, _ = read_run(store)
    for checkpoint in manifest.checkpoints:
        assert len(store.read(checkpoint.object.key)) == checkpoint.object.bytes


@pytest.mark.timeout(600)
def test_the_one_that_slept_past_its_lease_changes_nothing(
    small: str, s3_url: str, tmp_path: Path
) -> None:
    store, trainings = open_store(f"{s3_url}/run"), []
    with all_ended(trainings):
        details = {"settings": LONG, "constants": SHORT_LEASE}
        trainings.append(Training(Job(small, store.url, str(tmp_path), **details)))
        for fence in range(1, ROUNDS + 1):
            first = trainings[-1]
            first.until("epoch ")
            wait_for_commit(store.url)
            trainings.append(second := Training(Job(small, store.url, str(tmp_path), **details)))
            second.until(
                r"is being trained by .*, process \d+; waiting until it ends or is silent for 1.5 s"
            )
            first.send(signal.SIGSTOP)
            second.until("resuming at step")
            second.send(signal.SIGSTOP)
            time.sleep(0.3)  # what it had sent may still arrive
            before = store.read("manifest.json"), set(store.list())
            first.send(signal.SIGCONT)
            assert first.end() == 75, first.output
            assert re.search(r"another instance \(.*, process \d+\) has claimed", first.output)
            assert store.read("manifest.json") == before[0]
            assert_named_objects_are_there(store)
            # An upload that was under way when it was stopped may have ended: under its own fence, named by nobody.
            new = {entry.key for entry in set(store.list()) - before[1]}
            assert all(key.split("/")[1].startswith(f"{fence:06d}-") for key in new), new
            second.send(signal.SIGCONT)
        assert read_run(store)[0].fence == ROUNDS + 1


def test_a_run_that_is_held_is_refused_without_waiting(
    small: str, s3_url: str, tmp_path: Path
) -> None:
    lease = {"checkpoint.lease.LEASE_SECONDS": 3000.0}
    trainings = [
        Training(Job(small, f"{s3_url}/run", str(tmp_path), settings=LONG, constants=lease))
    ]
    with all_ended(trainings):
        trainings[0].until("epoch ")
        wait_for_commit(f"{s3_url}/run")
        trainings.append(
            Training(
                Job(small, f"{s3_url}/run", str(tmp_path), settings=LONG, arguments=("--no-wait",))
            )
        )
        assert trainings[1].end() == 1
        assert (
            f"is being trained by {os.uname().nodename}, process {trainings[0].pid}"
            in trainings[1].output
        )
        trainings.append(Training(Job(small, f"{s3_url}/run", str(tmp_path), settings=LONG)))
        trainings[2].until("waiting until it ends")
        assert trainings[2].end(signal.SIGTERM) == 75
        assert "stopped by SIGTERM before the training began" in trainings[2].output
        trainings[0].end(signal.SIGKILL)
        trainings.append(Training(Job(small, f"{s3_url}/run", str(tmp_path), settings=LONG)))
        trainings[3].until("resuming at step")  # no wait for the lease: its owner is gone


@pytest.mark.parametrize("point", ["after a step", "validating", "uploading"])
def test_a_spot_notice_is_answered_by_a_commit(
    small: str, s3_url: str, tmp_path: Path, imds: FakeImds, point: str
) -> None:
    """The notice comes while the thread that passes the point is held there."""
    run, trainings = f"{s3_url}/run", []
    details = {"settings": LONG}
    job = Job(
        small,
        run,
        str(tmp_path),
        point=point,
        nth=15 if point == "after a step" else 5,
        sent=HOLD,
        **details,
    )
    with all_ended(trainings):
        trainings.append(training := Training(job))
        training.until("held at")
        imds.give_notice(110)
        wait_until(
            lambda: imds.asked["GET", "/latest/meta-data/spot/instance-action", 200],
            "a look at the notice",
        )
        assert training.end() == 75, training.output
        stopped = re.search(
            r"stopped by the spot notice at step (\d+) of \d+, state committed to s3://",
            training.output,
        )
        assert stopped, training.output
        manifest, _ = read_run(open_store(run))
        assert manifest.status == "interrupted"
        assert manifest.checkpoints[-1].progress.step == int(stopped[1])
        imds.notice = None
        trainings.append(Training(Job(small, run, str(tmp_path), **details)))
        trainings[-1].until(f"resuming at step {stopped[1]} ")


@pytest.mark.parametrize(
    "seconds", [0.7, 4.0], ids=["shorter than the lease", "longer, and nobody else comes"]
)
def test_a_run_outlives_an_outage_of_the_store(
    small: str, s3_url: str, fault_proxy: FaultProxy, tmp_path: Path, seconds: float
) -> None:
    trainings = [
        Training(
            Job(small, f"{s3_url}/run", str(tmp_path), settings=LONG, constants=HASTY | SHORT_LEASE)
        )
    ]
    with all_ended(trainings):
        trainings[0].until("epoch   2/400")
        wait_for_commit(f"{s3_url}/run")
        outage = fault_proxy.fail("reset", times=float("inf"))
        time.sleep(seconds)
        trainings[0].until("epoch   3/400")  # it trains on meanwhile
        outage.times = 0
        step = read_run(open_store(f"{s3_url}/run"))[0].checkpoints[-1].progress.step
        wait_for_commit(f"{s3_url}/run", beyond=step)  # it commits again
        assert trainings[0].end(signal.SIGTERM) == 75, trainings[0].output
        assert "state committed to s3://" in trainings[0].output
    manifest, _ = read_run(open_store(f"{s3_url}/run"))
    assert (manifest.fence, manifest.status) == (1, "interrupted")
    if seconds > SHORT_LEASE["checkpoint.lease.LEASE_SECONDS"]:
        assert "could not be renewed" in trainings[0].output


def test_who_was_cut_off_while_another_claimed_changes_nothing(
    small: str,
    s3_url: str,
    fault_proxy: FaultProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A partition: the first reaches no store, the second does. Both stay alive, and the first comes back."""
    direct = f"http://127.0.0.1:{fault_proxy.port}"
    job = Job(small, f"{s3_url}/run", str(tmp_path), settings=LONG, constants=HASTY | SHORT_LEASE)
    trainings = [Training(job)]
    with all_ended(trainings):
        trainings[0].until("epoch   2/400")
        wait_for_commit(f"{s3_url}/run")
        outage = fault_proxy.fail("reset", times=float("inf"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", direct)
        trainings.append(Training(job))
        trainings[1].until(r"waiting until it ends[\s\S]*resuming at step[\s\S]*epoch ")
        assert trainings[0].process.is_alive()
        outage.times = 0
        assert trainings[0].end() == 75, trainings[0].output
        assert "has claimed" in trainings[0].output
        assert trainings[1].end(signal.SIGTERM) == 75, trainings[1].output
    store = open_store(f"{s3_url}/run")
    assert (read_run(store)[0].fence, read_run(store)[0].status) == (2, "interrupted")
    assert_named_objects_are_there(store)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_same_signal_twice_stops_at_once(
    small: str, s3_url: str, tmp_path: Path, number: signal.Signals
) -> None:
    run = f"{s3_url}/run"
    job = Job(small, run, str(tmp_path), point="before a step", nth=15, sent=HOLD, settings=LONG)
    trainings = [Training(job)]
    with all_ended(trainings):
        trainings[0].until("held at")
        trainings[0].send(number)
        trainings[0].until(f"{number.name}: stopping at the next step")
        assert trainings[0].end(number) == 75, trainings[0].output
        assert "stopped at once; what was committed before stands" in trainings[0].output
        assert max(trainings[0].steps()) == 13  # not even the step that it was asked to finish
        assert_named_objects_are_there(open_store(run))
        committed = read_run(open_store(run))[0].checkpoints
        trainings.append(Training(Job(small, run, str(tmp_path), settings=LONG)))
        # Without a commit, the epoch's was still on its way: it is adopted if it was uploaded, and else repeated.
        goes_on = r"resuming at step 11 of|epoch   1/400"
        trainings[1].until(
            f"resuming at step {committed[-1].progress.step} of" if committed else goes_on
        )


@pytest.mark.parametrize("seconds", [0.02, 1.0])
def test_a_signal_while_the_imports_run_damages_nothing(
    small: str, tmp_path: Path, seconds: float
) -> None:
    command = [
        sys.executable,
        "-m",
        "wds_train.cli",
        "train",
        "--dataset",
        small,
        "--run",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[1]
    assert process.returncode in (75, -signal.SIGTERM), output
    assert "Traceback" not in output
    if process.returncode == 75:
        assert "stopped by SIGTERM before the training began; nothing was changed" in output
    assert not (tmp_path / "run").exists()


def test_every_nth_epoch_is_kept_if_asked(small: str, tmp_path: Path) -> None:
    job = Job(
        small,
        str(tmp_path / "run"),
        str(tmp_path),
        settings=("schedule.epochs=7",),
        arguments=("--keep-every", "3"),
    )
    trainings = [Training(job)]
    with all_ended(trainings):
        assert trainings[0].end() == 0, trainings[0].output
    steps = {c.progress.step for c in read_run(open_store(job.run))[0].checkpoints}
    assert steps >= {33, 66, 77}
    assert len(steps) <= 5  # besides them, the best by raw and by EMA top-1


@pytest.mark.parametrize("fault", ["503", "403", "expired", "lost_ack"])
def test_a_commit_that_fails_is_tried_again_while_the_training_goes_on(
    small: str, s3_url: str, fault_proxy: FaultProxy, tmp_path: Path, fault: str
) -> None:
    kinds = {
        "503": {"kind": "status", "key": "ckpt/", "times": 30},
        "403": {
            "kind": "status",
            "key": "ckpt/",
            "times": 30,
            "status": 403,
            "code": "AccessDenied",
        },
        "expired": {
            "kind": "status",
            "key": "ckpt/",
            "times": 30,
            "status": 403,
            "code": "ExpiredToken",
        },
        "lost_ack": {"kind": "lost_ack", "key": "manifest.json", "times": 20, "share": 0.5},
    }
    fault_proxy.fail(method="PUT", **kinds[fault])
    trainings = [Training(Job(small, f"{s3_url}/run", str(tmp_path), constants=HASTY))]
    with all_ended(trainings):
        assert trainings[0].end() == 0, trainings[0].output
    if fault != "lost_ack":
        assert re.search(
            r"commit of step \d+ failed \(.*ckpt/.*\); it is tried again", trainings[0].output
        )
    assert fault_proxy.faults[0].times <= 19
    manifest, _ = read_run(open_store(f"{s3_url}/run"))
    assert (manifest.status, manifest.fence, manifest.checkpoints[-1].progress.evaluated) == (
        "done",
        1,
        4,
    )
    _, history, _ = end_state(f"{s3_url}/run")
    assert [record["epoch"] for record in history if "val/top1" in record] == [1, 2, 3, 4]
    assert [record["step"] for record in history] == sorted(record["step"] for record in history)


def test_no_more_than_the_allowed_minutes_are_put_at_risk(
    small: str, s3_url: str, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    minutes = ("--max-uncommitted-minutes", "0.1", "--commit-minutes", "0.01")
    trainings = [
        Training(
            Job(
                small,
                f"{s3_url}/run",
                str(tmp_path),
                settings=LONG,
                arguments=minutes,
                constants=HASTY,
            )
        )
    ]
    with all_ended(trainings):
        trainings[0].until("epoch   2/400")
        wait_for_commit(f"{s3_url}/run")
        fault_proxy.fail("status", method="PUT", key="ckpt/", times=1e9)
        assert trainings[0].end() == 1, trainings[0].output
        assert re.search(
            r"nothing could be committed for \d+\.\d minutes \(--max-uncommitted-minutes allows 0\.1\): .*503 SlowDown",
            trainings[0].output,
        )
        assert read_run(open_store(f"{s3_url}/run"))[0].checkpoints


def test_a_full_disk_is_survived_once_there_is_room(small: str, tmp_path: Path) -> None:
    """A real one, of 12 MB, for checkpoints of 4.5 MB: nothing that was committed is lost, and nothing torn is named."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    minutes = ("--max-uncommitted-minutes", "0.1", "--commit-minutes", "0.01")
    job = Job(small, str(disk / "run"), str(tmp_path), arguments=minutes, constants=HASTY)
    try:
        trainings = [Training(job)]
        with all_ended(trainings):
            assert trainings[0].end() == 1, trainings[0].output
        assert re.search(
            r"commit of step \d+ failed \(no space left on the disk of .*; it is tried again",
            trainings[0].output,
        )
        store = open_store(str(disk / "run"))
        assert_named_objects_are_there(store)
        assert read_run(store)[0].checkpoints
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        trainings = [Training(job)]
        with all_ended(trainings):
            assert trainings[0].end() == 0, trainings[0].output
        assert read_run(store)[0].status == "done"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
