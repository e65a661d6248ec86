"""Kill it anywhere: whatever is killed when, the run ends as the unbroken one, bit by bit, and nothing named is missing.

The short version is part of the tests; `make crash-test` sets WDS_CRASH_KILLS to more.
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

from wds_train.lease import read_run
from wds_train.store import open_store

KILLS = int(os.environ.get("WDS_CRASH_KILLS", "12"))
OFTEN = ("--commit-minutes", "0.001")  # several commits an epoch


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
        ids = [i for step in range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH) for i in steps[step]]
        assert len(ids) == len(set(ids)) == STEPS_PER_EPOCH * BATCH
        assert set(ids) <= set(range(SAMPLES))


@pytest.fixture(scope="module")
def seconds() -> dict[str, float]:
    return {}


@pytest.fixture
def unbroken(small: str, s3_url: str, tmp_path: Path, seconds: dict[str, float]) -> tuple[str, dict[int, list[int]]]:
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
    small: str, s3_url: str, tmp_path: Path, unbroken: tuple[str, dict[int, list[int]]], seconds: dict[str, float]
) -> None:
    kills, moment, number = 0, moments(), 0
    while kills < KILLS:
        number += 1
        run = f"{s3_url}/broken{number}"
        attempts: list[Training] = []
        with all_ended(attempts):
            while not attempts or attempts[-1].process.exitcode != 0:
                point, nth, share = next(moment) if kills < KILLS else ("", 0, 100)
                details = {"workers": len(attempts) % 2, "arguments": OFTEN}
                attempts.append(Training(job(small, run, tmp_path, point=point, nth=nth, **details)))
                if not point:
                    attempts[-1].process.join(share * seconds["run"])
                    attempts[-1].send(signal.SIGKILL)
                code = attempts[-1].end()
                assert code in (0, -signal.SIGKILL), attempts[-1].output
                kills += code != 0
                assert_nothing_named_is_missing(open_store(run))
        assert_same_end(unbroken[0], run)
        steps = committed_steps(attempts)
        assert_each_sample_once(steps)
        assert steps == unbroken[1]
        store = open_store(run)
        assert {e.key for e in store.list("ckpt/")} == {c.object.key for c in read_run(store)[0].checkpoints}
    print(f"{kills} kills of {number} runs, of which an unbroken one takes {seconds['run']:.1f} s")
