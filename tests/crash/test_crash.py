"""Kill it anywhere: whatever is killed when, the run ends as the unbroken one, bit by bit, and nothing named is missing.

The short version is part of the tests; `make crash-test` sets WDS_CRASH_KILLS, the number of kills anywhere, to more. Of
each of the moments that are tried apart (the last seconds, the first claim, rollback and export) there are half as many.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from outcomes import assert_nothing_named_is_missing, assert_same_end
from trainers import BATCH, EPOCHS, POINTS, SAMPLES, STEPS_PER_EPOCH, Job, Training, all_ended

from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run import Run
from wds_train.errors import NotFound
from wds_train.models.weights import Weights
from wds_train.storage.open import open_store
from wds_train.tracking.metrics import repeatable

KILLS = int(os.environ.get("WDS_CRASH_KILLS", "12"))
APART = KILLS // 2
RACES = int(os.environ.get("WDS_CRASH_ROUNDS", "2"))
OFTEN = ("--commit-minutes", "0.001")  # several commits an epoch
AHEAD = {"checkpoint.metrics_upload.EVERY_SECONDS": 0.05}


def job(dataset: str, run: str, folder: Path, **details: object) -> Job:
    return Job(dataset, run, str(folder), **details)  # type: ignore[arg-type]


def committed_steps(attempts: list[Training]) -> dict[int, list[int]]:
    """The samples of every step that is part of the result: where an attempt began, those before it counted for
    nothing from there on.
    """
    steps: dict[int, list[int]] = {}
    for attempt in attempts:
        taken = attempt.steps()
        if taken:
            steps = {step: ids for step, ids in steps.items() if step < min(taken)} | taken
    return steps


def assert_each_sample_once(steps: dict[int, list[int]]) -> None:
    assert sorted(steps) == list(range(EPOCHS * STEPS_PER_EPOCH))
    for epoch in range(EPOCHS):
        ids = [
            i
            for step in range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
            for i in steps[step]
        ]
        assert len(ids) == len(set(ids)) == STEPS_PER_EPOCH * BATCH
        assert set(ids) <= set(range(SAMPLES))


def assert_replayed_alike(url: str) -> int:
    """How many rows killed attempts had put on S3 that their successors logged again."""
    store = open_store(url)
    run = Run(store, *read_run(store))
    committed = [repeatable(row) for row in run.history()]
    replayed = run.replayed()
    assert [row for row in replayed if repeatable(row) not in committed] == []
    return len(replayed)


@pytest.fixture(scope="module")
def seconds() -> dict[str, float]:
    return {}


@pytest.fixture
def unbroken(
    small: str, s3_url: str, tmp_path: Path, seconds: dict[str, float]
) -> tuple[str, dict[int, list[int]]]:
    """A run that nothing happened to, and its steps."""
    url = f"{s3_url}/unbroken"
    training = Training(job(small, url, tmp_path))
    assert training.end() == 0, training.output
    began = time.monotonic()
    second = Training(job(small, f"{s3_url}/again", tmp_path))
    assert second.end() == 0, second.output
    seconds["run"] = time.monotonic() - began
    assert_same_end(url, f"{s3_url}/again")
    return url, training.steps()


ONCE = ("claimed", "resuming", "resumed")  # points that an attempt passes once


def moments() -> Iterator[tuple[str, int, float]]:
    """(point, nth, share of a run's time): every point in turn, and after each a random time."""
    rng = random.Random(0)
    while True:
        for point in POINTS:
            yield point, 1 if point in ONCE else rng.choice([1, 1, 2, 3, 7]), 0.0
            yield "", 0, rng.uniform(0.2, 0.9)


@pytest.mark.timeout(3000)
def test_killed_anywhere_it_ends_as_the_unbroken_run(
    small: str,
    s3_url: str,
    tmp_path: Path,
    unbroken: tuple[str, dict[int, list[int]]],
    seconds: dict[str, float],
) -> None:
    kills, moment, number, replayed = 0, moments(), 0, 0
    while kills < KILLS:
        number += 1
        run = f"{s3_url}/broken{number}"
        attempts: list[Training] = []
        with all_ended(attempts):
            while not attempts or attempts[-1].process.exitcode != 0:
                point, nth, share = next(moment) if kills < KILLS else ("", 0, 100)
                often = OFTEN if number % 2 else ()
                details = {"workers": len(attempts) % 2, "arguments": often, "constants": AHEAD}
                attempts.append(
                    Training(job(small, run, tmp_path, point=point, nth=nth, **details))
                )
                if not point:
                    attempts[-1].process.join(share * seconds["run"])
                    attempts[-1].send(signal.SIGKILL)
                code = attempts[-1].end()
                assert code in (0, -signal.SIGKILL), attempts[-1].output
                kills += code != 0
                assert_nothing_named_is_missing(open_store(run))
        assert_same_end(unbroken[0], run)
        replayed += assert_replayed_alike(run)
        steps = committed_steps(attempts)
        assert_each_sample_once(steps)
        assert steps == unbroken[1]
        store = open_store(run)
        assert {e.key for e in store.list("ckpt/")} == {
            c.object.key for c in read_run(store)[0].checkpoints
        }
    assert replayed
    print(
        f"{kills} kills of {number} runs, {replayed} rows replayed, of which an unbroken one takes {seconds['run']:.1f} s"
    )


def read_run_status(run: str) -> str:
    try:
        return read_run(open_store(run))[0].status
    except NotFound:
        return "none"


def ended_by(job: Job, seconds: float, trainings: list[Training]) -> int:
    """The exit status of `job`, which is killed after so many seconds unless it has ended before."""
    trainings.append(training := Training(job))
    training.process.join(seconds)
    return training.end(signal.SIGKILL)


@pytest.mark.timeout(3000)
def test_killed_in_its_last_seconds(
    small: str,
    s3_url: str,
    tmp_path: Path,
    unbroken: tuple[str, dict[int, list[int]]],
    seconds: dict[str, float],
) -> None:
    """What was done when it was killed is done, with its result; what was not goes on to the same end."""
    rng, kills, number, trainings = random.Random(1), 0, 0, list[Training]()
    with all_ended(trainings):
        while kills < APART:
            number += 1
            run = f"{s3_url}/late{number}"
            code, store = -1, open_store(run)
            while code != 0:
                late = rng.uniform(0, min(2.0, seconds["run"] * 0.6)) if kills < APART else -100.0
                code = ended_by(
                    job(small, run, tmp_path, arguments=OFTEN), seconds["run"] - late, trainings
                )
                assert code in (0, -signal.SIGKILL), trainings[-1].output
                kills += code != 0
                assert_nothing_named_is_missing(store)
                # On a busy machine it may have been killed before there was a run at all.
                if read_run_status(run) == "done":
                    again = Training(job(small, run, tmp_path, arguments=OFTEN))
                    assert again.end() == 0 and again.steps() == {}, again.output
                    code = 0
            assert_same_end(unbroken[0], run)
    print(f"{kills} kills in the last seconds of {number} runs")


@pytest.mark.timeout(3000)
def test_killed_in_its_first_claim(
    small: str,
    s3_url: str,
    tmp_path: Path,
    unbroken: tuple[str, dict[int, list[int]]],
    seconds: dict[str, float],
) -> None:
    rng, kills, number, trainings = random.Random(2), 0, 0, list[Training]()
    with all_ended(trainings):
        while kills < APART:
            number += 1
            run = f"{s3_url}/early{number}"
            for _ in range(min(6, APART - kills)):
                point = rng.choice(
                    ["claimed", "uploading", "", ""]
                )  # the manifest is the first that goes up
                first = Job(small, run, str(tmp_path), point=point)
                code = ended_by(
                    first, 100 if point else rng.uniform(0, seconds["run"] * 0.4), trainings
                )
                assert code in (0, -signal.SIGKILL), trainings[-1].output
                kills += code != 0
                assert_nothing_named_is_missing(open_store(run))
                if read_run_status(run) == "done":  # some kills came late, after commits
                    break
            trainings.append(last := Training(job(small, run, tmp_path)))
            assert last.end() == 0, last.output
            assert_same_end(unbroken[0], run)
    print(f"{kills} kills in the first claims of {number} runs")


@pytest.mark.timeout(3000)
def test_killed_during_rollback_and_export(
    small: str,
    s3_url: str,
    tmp_path: Path,
    unbroken: tuple[str, dict[int, list[int]]],
    seconds: dict[str, float],
) -> None:
    """A killed rollback has happened or not; a file is whole or not there; and the run goes on to the same end."""
    rng, kills, number, trainings = random.Random(3), 0, 0, list[Training]()
    with all_ended(trainings):
        while kills < APART:
            number += 1
            run, file = f"{s3_url}/back{number}", tmp_path / f"{number}.safetensors"
            trainings.append(
                first := Training(job(small, run, tmp_path, arguments=("--keep-every", "1")))
            )
            assert first.end() == 0, first.output
            store = open_store(run)
            for _ in range(min(6, APART - kills)):
                older = rng.choice(read_run(store)[0].checkpoints).progress.step
                export = rng.random() < 0.5
                command = (
                    ("export", run, "--to", str(file))
                    if export
                    else ("rollback", run, "--to", str(older))
                )
                points = (
                    ["", ""]
                    if export
                    else ["before the manifest", "after the manifest", "in the garbage", ""]
                )
                point = rng.choice(points)
                late = 100 if point else rng.uniform(0, 0.5)
                code = ended_by(
                    job(small, run, tmp_path, command=command, point=point), late, trainings
                )
                assert code in (0, -signal.SIGKILL), trainings[-1].output
                kills += code != 0
                assert_nothing_named_is_missing(store)
                assert not file.exists() or Weights.read(file).tensors
            trainings.append(last := Training(job(small, run, tmp_path)))
            assert last.end() == 0, last.output
            assert_same_end(unbroken[0], run)
            assert {e.key for e in store.list("ckpt/")} == {
                c.object.key for c in read_run(store)[0].checkpoints
            }
            assert [path.name for path in tmp_path.glob(f"{number}.safetensors*")] in (
                [],
                [file.name],
            )
    print(f"{kills} kills of rollback and export of {number} runs")


@pytest.mark.timeout(3000)
def test_two_and_three_begin_at_once(
    small: str, s3_url: str, tmp_path: Path, unbroken: tuple[str, dict[int, list[int]]]
) -> None:
    """One trains, the others wait for it, find it done, and change nothing."""
    for number in range(RACES):
        run, racers = f"{s3_url}/race{number}", list[Training]()
        with all_ended(racers):
            racers += [Training(job(small, run, tmp_path)) for _ in range(2 + number % 2)]
            assert [racer.end() for racer in racers] == [0] * len(racers), [
                racer.output for racer in racers
            ]
            assert sum(bool(racer.steps()) for racer in racers) == 1
        assert_same_end(unbroken[0], run)
    print(f"{RACES} races of two and three")
