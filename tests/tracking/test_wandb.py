"""One run in Weights & Biases across kills, made of the rows that are on S3; and W&B is never in the way."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_wandb import FakeWandb, offline_history
from trainers import HOLD, Job, Training, all_ended
from waiting import wait_until

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.storage.open import open_store
from wds_train.tracking.metrics import Row

OFFLINE = {"WANDB_MODE": "offline"}
PICTURES = {"train/first_batch", "val/mistakes", "val/confused", "val/classes"}
LONG = ("schedule.epochs=400",)
ENDLESS = ("schedule.epochs=100000",)  # also on a fast machine, for as long as W&B takes to ask
SOME = ("schedule.epochs=12",)
FEW = ("schedule.epochs=8",)
# Without a report at the end, which takes as long as the training; and with all the time that W&B may need.
PLAIN: dict[str, Any] = {
    "training.run_training.REPORT_SECONDS": 0.0,
    "tracking.wandb_board.INIT_SECONDS": 100.0,
    "tracking.tracker.FINISH_SECONDS": 100.0,
    "tracking.tracker.HASTY_SECONDS": 100.0,
}


@pytest.fixture
def wandb() -> Iterator[FakeWandb]:
    with FakeWandb() as server:
        yield server


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def manifest_of(url: str) -> RunManifest:
    return read_run(open_store(url))[0]


def end(job: Job, sent: int | None = None) -> tuple[int, str]:
    training = Training(job)
    with all_ended([training]):
        return training.end(sent), training.output


def on_s3(url: str) -> list[Row]:
    """The rows of each step as one, as W&B is to show them."""
    store = open_store(url)
    steps: dict[float, Row] = {}
    for row in Run(store, *read_run(store)).history():
        steps[row["step"]] = steps.get(row["step"], {}) | row
    return [shown(row) for row in steps.values()]


def shown(row: Row) -> Row:
    renamed = {"step": "train/step", "time/unix": "_timestamp"}
    return {renamed.get(name, name): value for name, value in row.items()} | {"_step": row["step"]}


def page(rows: list[Row]) -> list[Row]:
    """Without the pictures, whose fields an offline run holds one by one, and the time that W&B counts."""
    left_out = {"_runtime", *PICTURES}
    return [
        {name: value for name, value in row.items() if name.partition(".")[0] not in left_out}
        for row in rows
    ]


def assert_whole(rows: list[Row], url: str) -> None:
    assert page(rows) == on_s3(url)
    steps = [row["_step"] for row in rows]
    assert steps == sorted(
        {step for step in range(1, 12 * 11 + 1) if step % 2 == 0 or step % 11 == 0}
    )
    times = [row["_timestamp"] for row in rows]
    started = manifest_of(url).attempts[0].started
    assert times == sorted(times) and started < times[0] < times[-1] < time.time()


def killed_thrice(job: Job, wandb: FakeWandb | None = None) -> str:
    """What the last attempt says. Those before are killed once W&B has what they say at their start."""
    for number in range(3):
        training = Training(replace(job, point="before a step", nth=3 * 11 + 1, sent=HOLD))
        with all_ended([training]):
            training.until("held at")
            if wandb is not None:
                wait_until(
                    lambda sent=number: wandb.alerts() == ["resumed"] * sent and wandb.history,
                    "the page",
                )
            training.send(signal.SIGKILL)
            training.end()
    code, output = end(job)
    assert code == 0, output
    return output


def test_a_run_killed_thrice_is_one_run_without_gaps(
    small: str, url: str, tmp_path: Path, wandb: FakeWandb
) -> None:
    patient = PLAIN | {
        "tracking.tracker.BACKLOG": 10_000
    }  # this training is over before W&B is there
    job = Job(
        small, url, str(tmp_path), settings=SOME, environment=wandb.environment, constants=patient
    )
    output = killed_thrice(job, wandb)
    manifest = manifest_of(url)
    assert [*wandb.history] == [manifest.wandb_id]
    rows = wandb.history[manifest.wandb_id]
    assert_whole(rows, url)
    assert PICTURES - {"train/first_batch"} <= rows[-1].keys()
    assert "W&B      http://127.0.0.1" in output
    assert wandb.alerts() == ["resumed"] * 3 + ["done"]
    assert [end["exitcode"] for end in wandb.ends] == [0]
    config = next(
        json.loads(values["config"])
        for name, values in reversed(wandb.said)
        if name == "UpsertBucket"
    )
    told = {name: entry["value"] for name, entry in config.items() if name != "_wandb"}
    assert told["model"]["name"] == "test_resnet"
    assert (told["dataset"]["fingerprint"], told["samples"]) == (
        manifest.dataset["fingerprint"],
        {"train": 181, "val": 40},
    )
    assert {"git", "versions", "hardware", "price"} <= told.keys()


def test_an_offline_run_is_rebuilt_from_s3(
    small: str, url: str, tmp_path: Path, wandb: FakeWandb
) -> None:
    job = Job(small, url, str(tmp_path), settings=SOME, environment=OFFLINE, constants=PLAIN)
    output = killed_thrice(job)
    assert f"(offline; upload: wds-train wandb {url})" in output
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    manifest = manifest_of(url)
    assert {folder.name.rsplit("-", 1)[1] for folder in folders} == {manifest.wandb_id}
    assert_whole(offline_history(folders[-1]), url)
    again = Job(
        small,
        url,
        str(tmp_path / "elsewhere"),
        command=("wandb", url),
        environment=wandb.environment,
    )
    (tmp_path / "elsewhere").mkdir()
    code, output = end(replace(again, environment=OFFLINE))
    (folder,) = (tmp_path / "elsewhere" / "wandb").glob("offline-run-*")
    assert (
        code == 0
        and "nothing was sent, the" in output
        and "unset WANDB_MODE, and type this again" in output
    )
    assert f"are in {os.path.relpath(folder)};" in output
    assert_whole(offline_history(folder), url)
    for sent in (len(on_s3(url)), 0):
        code, output = end(again)
        assert code == 0, output
        assert f"sent {sent} of the {len(on_s3(url))} steps" in output
        assert_whole(wandb.history[manifest.wandb_id], url)
    assert [end["exitcode"] for end in wandb.ends] == [0, 0]


@pytest.mark.parametrize("how", ["closed port", "silent", 500])
def test_a_server_that_fails_costs_one_warning(
    small: str, url: str, tmp_path: Path, wandb: FakeWandb, how: str | int
) -> None:
    """What it lacks is sent later."""
    if how == "closed port":
        wandb.die()
    else:
        wandb.broken = how if isinstance(how, int) else 3600.0
    constants = PLAIN | {"tracking.wandb_board.INIT_SECONDS": 0.5}
    code, output = end(
        Job(
            small,
            url,
            str(tmp_path),
            settings=FEW,
            environment=wandb.environment,
            constants=constants,
        )
    )
    assert code == 0 and manifest_of(url).status == "done", output
    assert re.search(r"W&B does not answer \(.*\); going on offline", the_warning(output))


def the_warning(output: str) -> str:
    (warning,) = [
        line for line in output.splitlines() if line.startswith("W&B ") and "W&B      " not in line
    ]
    return warning


def test_a_server_that_dies_costs_one_warning_and_no_more_than_its_seconds(
    small: str, url: str, tmp_path: Path, wandb: FakeWandb
) -> None:
    """W&B's own patience is without end."""
    constants = PLAIN | {"tracking.tracker.FINISH_SECONDS": 1.5}
    job = Job(
        small, url, str(tmp_path), settings=FEW, environment=wandb.environment, constants=constants
    )
    training = Training(replace(job, point="before a step", nth=12, sent=HOLD))
    with all_ended([training]):
        wait_until(lambda: wandb.history, "the page")
        wandb.die()
        assert training.end() == 0, training.output
    assert manifest_of(url).status == "done"
    assert "sends what is missing" in the_warning(training.output)


def test_a_spot_notice_is_heeded_in_time_while_wandb_hangs(
    small: str, url: str, tmp_path: Path, wandb: FakeWandb
) -> None:
    wandb.broken = 3600.0
    constants = PLAIN | {
        "tracking.wandb_board.INIT_SECONDS": 3600.0,
        "tracking.tracker.HASTY_SECONDS": 1.5,
    }
    job = Job(
        small, url, str(tmp_path), settings=LONG, environment=wandb.environment, constants=constants
    )
    training = Training(job)
    with all_ended([training]):
        training.until("epoch +1/400")
        assert training.end(signal.SIGTERM) == 75, training.output
    assert the_warning(training.output).startswith(
        "W&B did not end within 1.5 s and is left behind"
    )
    assert manifest_of(url).status == "interrupted"


def test_the_stop_button_ends_the_run_until_a_person_says_to_go_on(
    small: str, url: str, tmp_path: Path, wandb: FakeWandb
) -> None:
    """W&B asks every 15 s whether it was pressed."""
    job = Job(
        small, url, str(tmp_path), settings=ENDLESS, environment=wandb.environment, constants=PLAIN
    )
    wandb.stopped = True
    code, output = end(job)
    assert code == 1, output
    step = manifest_of(url).step
    assert step > 0 and manifest_of(url).status == "stopped"
    assert (
        f"stopped for good by the Stop button of W&B, at step {step} of 1100000, state committed"
        in output
    )
    assert wandb.alerts() == ["stopped"]
    quiet = Job(small, url, str(tmp_path), settings=ENDLESS)
    code, output = end(quiet)
    assert (code, "was stopped by a person, in W&B, at step" in output, "--go-on" in output) == (
        2,
        True,
        True,
    ), output
    assert manifest_of(url).status == "stopped"
    training = Training(
        Job(small, url, str(tmp_path), settings=ENDLESS, arguments=("--go-on",), constants=PLAIN)
    )
    with all_ended([training]):
        training.until(f"resuming at step {step}")
        training.until("epoch")
        assert training.end(signal.SIGTERM) == 75, training.output
    assert manifest_of(url).status == "interrupted"
