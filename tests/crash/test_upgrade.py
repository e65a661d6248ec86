"""What older versions left goes on: a run and a dataset of every format that there was, made by the code of its time.

`tests/fixtures/README.md` says what they are, and how one is made.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import tiny
from safetensors.numpy import load_file
from trainers import CONTEXT

from wds_train.checkpoint.run_manifest import Attempt, Checkpoint, Progress, RunManifest, Segment
from wds_train.cli import main

FIXTURES = Path(tiny.__file__).parent
READ = ["losses", "sums", "typed", "ahead", "best", "proof", "goodput", "pending"]
NEWEST = "pending"
# What is read no more, and what is said of it.
REFUSED = {
    "first": "was written by a wds-train from before leases, whose runs this one does not read",
    "lease": "recipe.mix.'smoothing' is nothing that this wds-train knows",
}
# Mixup and CutMix were drawn otherwise when these were made, so that they go on with the same samples, mixed otherwise.
MIXED_OTHERWISE = ["losses"]
INTERRUPTED = 75
STOPPED_AGAIN_AT = 8


@dataclass(frozen=True)
class Ended:
    """A run of a fixture that this code took to its end, at once and with another interruption."""

    name: str
    expected: dict[str, Any]
    once: Path
    twice: Path


def expected_of(name: str) -> dict[str, Any]:
    """Return what the code of its time made of a fixture."""
    return json.loads((FIXTURES / name / "expected.json").read_text())


def go_on(name: str, run: Path, *, stop_at: int = 0) -> tuple[int | None, str]:
    """Go on with a copy of the fixture's run; return how the process ended, and what it said."""
    expected = expected_of(name)
    arguments = [
        "--run",
        str(run),
        "--dataset",
        str(FIXTURES / expected["dataset"]),
        "--workers",
        "0",
    ]
    if expected["second"]:
        arguments += ["--mix", f"{FIXTURES / expected['second']}=0.5"]
    process = CONTEXT.Process(target=tiny.attempt, args=(arguments, run.parent, run.name, stop_at))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it is still running"
    return process.exitcode, (run.parent / f"{run.name}.out").read_text()


def skip_mixed_otherwise(name: str) -> None:
    """Skip where the weights of its time cannot be reached."""
    if name in MIXED_OTHERWISE:
        pytest.skip(f"{name} was made before mixing came to depend on the step alone")


@pytest.fixture(scope="module", params=READ)
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The run of each fixture that is read, at its end."""
    folder = tmp_path_factory.mktemp(request.param)
    once = shutil.copytree(FIXTURES / request.param / "run", folder / "once")
    code, said = go_on(request.param, once)
    assert code == 0, said
    twice = shutil.copytree(FIXTURES / request.param / "run", folder / "twice")
    code, said = go_on(request.param, twice, stop_at=STOPPED_AGAIN_AT)
    assert code == INTERRUPTED, said
    code, said = go_on(request.param, twice)
    assert code == 0, said
    return Ended(request.param, expected_of(request.param), once, twice)


def test_it_takes_the_steps_that_were_left_with_the_same_pixels(ended: Ended) -> None:
    left = {
        int(step): digest
        for step, digest in ended.expected["steps"].items()
        if int(step) >= tiny.STOPPED_AT
    }
    for run in (ended.once, ended.twice):
        assert tiny.steps_of(run.parent / f"{run.name}.steps") == left


def test_another_interruption_changes_no_bit(ended: Ended) -> None:
    (once, beside_once, _), (twice, beside_twice, _) = (
        tiny.state_of(ended.once),
        tiny.state_of(ended.twice),
    )
    assert tiny.digests_of(once) == tiny.digests_of(twice)
    assert beside_once == beside_twice


def test_it_ends_near_the_weights_of_its_time(ended: Ended) -> None:
    """On any machine: what is rounded otherwise differs a little, what is computed otherwise by far more."""
    skip_mixed_otherwise(ended.name)
    tensors, _, manifest = tiny.state_of(ended.once)
    for name, wanted in load_file(FIXTURES / ended.name / "final.safetensors").items():
        np.testing.assert_allclose(tensors[name], wanted, rtol=1e-3, atol=1e-4, err_msg=name)
    assert manifest["result"]["epoch/loss"] == pytest.approx(
        ended.expected["result"]["epoch/loss"], rel=1e-3
    )


def test_it_ends_with_the_weights_of_its_time(ended: Ended) -> None:
    skip_mixed_otherwise(ended.name)
    if tiny.machine() != ended.expected["machine"]:
        pytest.skip(f"another machine or version than {ended.expected['machine']}")
    assert tiny.digests_of(tiny.state_of(ended.once)[0]) == ended.expected["final"]


def test_the_curves_are_whole(ended: Ended) -> None:
    """The rows of before the upgrade and those of after it, each step's once."""
    _, _, manifest = tiny.state_of(ended.twice)
    rows = [
        json.loads(line)
        for segment in manifest["metrics"]
        for line in (ended.twice / segment["object"]["key"]).read_text().splitlines()
    ]
    validated = [row["epoch"] for row in rows if "val/top1" in row]
    assert validated == [1, 2, 3, 4]


@pytest.mark.parametrize("name", [*READ, *REFUSED])
def test_a_dataset_is_read_in_the_order_of_its_time(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = expected_of(name)
    dataset = str(FIXTURES / expected["dataset"])
    for epoch, digest in enumerate(expected["order"]):
        order = [
            "order",
            dataset,
            "--seed",
            "0",
            "--epoch",
            str(epoch),
            "--global-batch",
            str(tiny.BATCH),
        ]
        assert main(order) == 0
        assert hashlib.sha256(capsys.readouterr().out.encode()).hexdigest() == digest
    for each in filter(None, (expected["dataset"], expected["second"])):
        assert main(["verify", str(FIXTURES / each)]) == 0


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("command", ["verify", "status", "checkpoints"])
def test_a_run_is_told_of(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(FIXTURES / name / "run", tmp_path / "run")
    assert main([command, str(run)]) == 0
    assert str(tiny.STOPPED_AT) in capsys.readouterr().out


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_is_read_no_more_is_refused_and_stays(name: str, tmp_path: Path) -> None:
    run = shutil.copytree(FIXTURES / name / "run", tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, said = go_on(name, run)
    assert code == 1
    assert REFUSED[name] in said
    assert "Traceback" not in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_newest_fixture_is_of_todays_format() -> None:
    """A field more in the manifest is another format: `tests/fixtures/make.py` makes a fixture of it."""
    manifest = json.loads((FIXTURES / NEWEST / "run" / "manifest.json").read_text())
    parts = [
        (RunManifest, {**manifest}, {"format", "kind"}),
        (Attempt, manifest["attempts"][-1], set()),
        (Checkpoint, manifest["checkpoints"][-1], set()),
        (Progress, manifest["checkpoints"][-1]["progress"], set()),
        (Segment, manifest["metrics"][-1], set()),
    ]
    for kind, written, more in parts:
        assert {each.name for each in fields(kind)} | more == {*written}, (
            f"{kind.__name__} is of another format than the newest fixture: make one with `python tests/fixtures/make.py NAME`"
        )
