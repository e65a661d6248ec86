"""What a resumed training starts from: never a broken number, never damaged bytes, never silently from scratch; and it
scores what it scored before.
"""

import json
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from outcomes import assert_nothing_named_is_missing, assert_same_end
from trainers import EPOCHS, POISON, STEPS_PER_EPOCH, Job, Training, all_ended

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.restore import read_object
from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import Progress, RunManifest
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.commands.status import describe
from wds_train.errors import Interrupted, NotFinite, RunError, WdsTrainError
from wds_train.storage.base import Store
from wds_train.storage.open import open_store
from wds_train.storage.s3 import S3Store
from wds_train.training.ending import handle_early_end
from wds_train.training.stop_request import StopRequest

LONG = ("schedule.epochs=400",)
OFTEN = ("--commit-minutes", "0.0001")


@pytest.fixture(scope="module")
def unbroken(small: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run that nothing happened to. Not to be written to."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert end(Job(small, str(folder / "run"), str(folder)))[0] == 0
    return str(folder / "run")


def end(job: Job) -> tuple[int, str]:
    """The exit status and the output of a training that runs to its end."""
    training = Training(job)
    with all_ended([training]):
        return training.end(), training.output


def snapshots(store: Store) -> list[Snapshot]:
    run = Run(store, *read_run(store))
    return [
        Snapshot.decode(read_object(run.store, c.object), c.progress)
        for c in run.manifest.checkpoints
    ]


@pytest.mark.parametrize(
    ("point", "nth", "newest"),
    [
        ("before a step", 25, 22),  # the loss shows it within the epoch
        (
            "after a step",
            22,
            11,
        ),  # the weights broke after the loss of the epoch's last step was computed
        ("after a step", EPOCHS * STEPS_PER_EPOCH, 33),  # ... and of the run's last
    ],
)
def test_what_is_not_finite_is_never_committed(
    small: str, tmp_path: Path, point: str, nth: int, newest: int
) -> None:
    code, output = end(
        Job(small, str(tmp_path / "run"), str(tmp_path), point=point, nth=nth, sent=POISON)
    )
    assert code == 1, output
    assert re.search(
        r"error: (the training loss is nan by step \d+; lower optimizer.lr|model/.* is not finite)",
        output,
    )
    store = open_store(str(tmp_path / "run"))
    assert read_run(store)[0].status == "failed"
    assert snapshots(store)[-1].progress.step == newest
    assert_finite(store)


def test_commits_within_an_epoch_look_too_and_the_run_can_go_on(
    small: str, unbroken: str, tmp_path: Path
) -> None:
    url = str(tmp_path / "run")
    job = Job(small, url, str(tmp_path), point="after a step", nth=20, sent=POISON, arguments=OFTEN)
    code, output = end(job)
    assert code == 1, output
    store = open_store(url)
    newest = snapshots(store)[-1].progress.step
    assert 11 <= newest < 20
    assert_finite(store)
    code, output = end(Job(small, url, str(tmp_path)))
    assert code == 0, output
    assert f"resuming at step {newest} of 44" in output
    assert_same_end(unbroken, url)


def assert_finite(store: Store) -> None:
    for snapshot in snapshots(store):
        assert all(value.isfinite().all() for value in snapshot.tensors.values()), snapshot.progress


def test_an_interruption_commits_no_broken_weights(small: str, tmp_path: Path) -> None:
    job = Job(
        small,
        str(tmp_path / "run"),
        str(tmp_path),
        point="after a step",
        nth=13,
        sent=POISON,
        settings=LONG,
    )
    training = Training(job)
    with all_ended([training]):
        training.until("held at")
        training.send(signal.SIGTERM)
        assert training.end() == 1, training.output
    store = open_store(str(tmp_path / "run"))
    assert [snapshot.progress.step for snapshot in snapshots(store)] == [11]
    assert read_run(store)[0].status == "failed"


def ended_by_a_loss_of_nan(run: Run, *, repeats: bool) -> WdsTrainError:
    with (
        pytest.raises(WdsTrainError) as caught,
        handle_early_end(run, StopRequest(), repeats=repeats),
    ):
        raise NotFinite("the loss is nan")
    return caught.value


def test_on_a_gpu_the_run_goes_back_twice_and_then_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wds_train.checkpoint.lease.is_gone", lambda owner: True)
    store = open_store(str(tmp_path / "run"))
    fresh = RunManifest("r", {}, {"url": "d", "fingerprint": "f"}, "w")
    first = Run.claim(store, fresh, print)
    first.committer.commit(Snapshot({}, {"scaler": {}}, Progress(7)), {}, [])
    first.committer.wait()
    for number in (1, 2):
        error = ended_by_a_loss_of_nan(Run.claim(store, fresh, print), repeats=False)
        assert isinstance(error, Interrupted)
        assert (
            str(error)
            == f"the loss is nan; the next start goes back to step 7 (return {number} of 2)"
        )
        assert read_run(store)[0].status == "interrupted"
    error = ended_by_a_loss_of_nan(Run.claim(store, fresh, print), repeats=False)
    assert isinstance(error, RunError)
    assert str(error) == "the loss is nan; 2 returns to a checkpoint did not help"
    assert read_run(store)[0].status == "failed"


def test_a_failure_does_not_throw_away_the_commit_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "run"))
    run, write = (
        Run.claim(store, RunManifest("r", {}, {"url": "d", "fingerprint": "f"}, "w"), print),
        store.write,
    )

    def slowly(key: str, *arguments: Any, **named: Any) -> str:
        time.sleep(0.3)
        return write(key, *arguments, **named)

    monkeypatch.setattr(store, "write", slowly)
    run.committer.commit(Snapshot({}, {"scaler": {}}, Progress(7)), {}, [])
    ended_by_a_loss_of_nan(run, repeats=True)
    manifest, _ = read_run(store)
    assert (manifest.status, [c.progress.step for c in manifest.checkpoints]) == ("failed", [7])


def killed_after_epoch_2(small: str, url: str, folder: Path) -> RunManifest:
    """A run with checkpoints of steps 11 and 22."""
    code, output = end(Job(small, url, str(folder), point="after the manifest", nth=2))
    assert code == -signal.SIGKILL, output
    return read_run(open_store(url))[0]


def spoil(store: Store, key: str) -> None:
    data = bytearray(store.read(key))
    data[-1] ^= 1
    store.write(key, data)


def test_a_damaged_newest_checkpoint_costs_an_epoch_and_not_the_run(
    small: str, unbroken: str, s3_url: str, tmp_path: Path
) -> None:
    url = f"{s3_url}/run"
    key = killed_after_epoch_2(small, url, tmp_path).checkpoints[-1].object.key
    spoil(open_store(url), key)
    code, output = end(Job(small, url, str(tmp_path)))
    assert code == 0, output
    assert re.search(
        rf"checkpoint {key} cannot be used \(.*is damaged: it has (\d+) bytes of sha256 \w+, .* were \1 of \w+\); trying the one before",
        output,
    )
    assert "resuming at step 11 of 44" in output
    assert_same_end(unbroken, url)
    assert_nothing_named_is_missing(open_store(url))


def test_when_all_checkpoints_are_damaged_nothing_starts_afresh(
    small: str, s3_url: str, tmp_path: Path
) -> None:
    url = f"{s3_url}/run"
    before = killed_after_epoch_2(small, url, tmp_path)
    store = open_store(url)
    objects = {entry[:2] for entry in store.list() if entry.key != "manifest.json"}
    for checkpoint in before.checkpoints:
        spoil(store, checkpoint.object.key)
    for _ in range(2):  # refused for good, not only once
        training = Training(Job(small, url, str(tmp_path)))
        assert training.end() == 1, training.output
        assert (
            f"error: every checkpoint of {url} is damaged; restore one from a backup"
            in training.output
        )
        assert training.steps() == {}
    after = read_run(store)[0]
    assert (after.status, after.checkpoints, after.metrics) == (
        "failed",
        before.checkpoints,
        before.metrics,
    )
    assert {entry[:2] for entry in store.list() if entry.key != "manifest.json"} == objects


@pytest.mark.parametrize(
    "refusal",
    [
        (key, *answer)
        for key in ("manifest.json", "ckpt/")
        for answer in ((403, "AccessDenied"), (503, "SlowDown"))
    ],
)
def test_a_store_that_refuses_to_read_is_no_fresh_run(
    small: str, s3_url: str, fault_proxy: FaultProxy, tmp_path: Path, refusal: tuple[str, int, str]
) -> None:
    url, (key, status, code) = f"{s3_url}/run", refusal
    before = killed_after_epoch_2(small, url, tmp_path)
    fault = fault_proxy.fail(
        "status", method="GET", key=key, status=status, code=code, times=float("inf")
    )
    training = Training(
        Job(small, url, str(tmp_path), constants={"storage.s3_connection.PATIENCE_SECONDS": 0.5})
    )
    assert training.end() == 1, training.output
    assert re.search(rf"error: .*{key}.*{code}", training.output)
    assert training.steps() == {}
    fault.times = 0
    manifest, _ = read_run(open_store(url))
    assert manifest.checkpoints == before.checkpoints
    # Who may not read may say that it failed; to a store that does not answer, nothing can be said.
    assert describe(manifest, 0.0, None)["status"] == (
        "failed" if (key, status) == ("ckpt/", 403) else "lost"
    )


def test_right_after_a_resume_all_weights_score_what_they_scored_before(
    small: str, s3_url: str, tmp_path: Path
) -> None:
    """Raw and EMA, in every digit: an EMA that is rebuilt from the raw weights after a restore is a well-known fault."""
    url = f"{s3_url}/run"
    before = killed_after_epoch_2(small, url, tmp_path).checkpoints[-1].metrics
    assert before["val/loss"] != before["val/loss_ema"]
    code, output = end(Job(small, url, str(tmp_path), revalidate=True))
    assert code == 0, output
    scored = re.search("resumed with (.*)", output)
    assert scored
    assert json.loads(scored[1]) == before


def test_a_kill_in_the_middle_of_an_upload_in_parts_leaves_nothing(
    small: str, s3_url: str, tmp_path: Path
) -> None:
    """A checkpoint of 19 MB in parts of 5 MiB, S3's least. A run sends its claim, the announcement and the metrics first;
    the second attempt sends one manifest more, which forgets what the first one announced.
    """
    url = f"{s3_url}/run"
    store = open_store(url)
    assert isinstance(store, S3Store)
    settings = ("model.name=mobilenetv3_small_100", "model.drop_path=0", "schedule.epochs=2")
    details = {"settings": settings, "constants": {"storage.s3_write.PART_BYTES": 5 << 20}}
    for attempt in range(2):
        code, output = end(
            Job(small, url, str(tmp_path), point="uploading", nth=6 + attempt, **details)
        )
        assert code == -signal.SIGKILL, output
        uploads = store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", [])
        assert len(uploads) == 1, f"attempt {attempt}"  # that of the attempt before is gone
        assert not read_run(store)[0].checkpoints
    code, output = end(Job(small, url, str(tmp_path), **details))
    assert code == 0, output
    assert store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", []) == []
    assert end(Job(small, str(tmp_path / "unbroken"), str(tmp_path), **details))[0] == 0
    assert_same_end(str(tmp_path / "unbroken"), url)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_early_end_is_the_same_after_kills(
    small: str, s3_url: str, tmp_path: Path, workers: int
) -> None:
    """Of 40 epochs: light and dark noise is soon told apart, and nothing is better than 100 %."""
    settings = ("schedule.epochs=40", "schedule.patience=2", "optimizer.lr=0.05", "mix.mixup=0")
    one, other = f"{s3_url}/unbroken", f"{s3_url}/run"
    details = {"settings": settings, "workers": workers}
    code, output = end(Job(small, one, str(tmp_path), **details))
    assert code == 0, output
    last = read_run(open_store(one))[0].checkpoints[-1].progress
    assert 3 <= last.evaluated == last.best_epoch + 2 < 20, output
    why = (
        rf"ended    after {last.evaluated} of 40 epochs: the validation's top-1 was never higher than the {last.best:.2f} % of "
        rf"epoch {last.best_epoch} in the 2 after it \(schedule.patience\)\n"
    )
    assert re.search(rf"{why}last ", output)
    for nth in (last.evaluated - 1, 1):  # after the last commit but one, and after the last
        code, output = end(
            Job(small, other, str(tmp_path), point="after the manifest", nth=nth, **details)
        )
        assert code == -signal.SIGKILL, output
    code, output = end(Job(small, other, str(tmp_path), **details))
    assert code == 0, output
    assert re.search(rf"is done already\n{why}", output)
    assert_same_end(one, other)


def test_an_early_end_is_found_out_from_the_last_checkpoint(small: str, tmp_path: Path) -> None:
    """A run that lost its last word: the checkpoint alone says that it is over."""
    details = {"settings": ("schedule.epochs=9", "schedule.patience=1", "optimizer.lr=1e-12")}
    store = open_store(str(tmp_path / "run"))
    assert end(Job(small, store.url, str(tmp_path), **details))[0] == 0
    whole, _ = read_run(store)
    store.write("manifest.json", replace(whole, status="interrupted", result={}).to_json())
    training = Training(Job(small, store.url, str(tmp_path), **details))
    with all_ended([training]):
        assert training.end() == 0, training.output
    after, _ = read_run(store)
    assert (after.status, training.steps()) == ("done", {})
    assert after.result == {
        name: value for name, value in whole.result.items() if name != "epoch/loss"
    }
