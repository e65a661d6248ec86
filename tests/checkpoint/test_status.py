"""Look at a run, go back in it, and export its weights; addresses without a run are refused."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from trainers import HOLD, Job, Training, all_ended, wait_for_commit

from wds_train.checkpoint import run_manifest as states
from wds_train.checkpoint.lease import read_run
from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import Difference, RunManifest
from wds_train.cli import main
from wds_train.commands.status import describe
from wds_train.dataset.reader import Dataset
from wds_train.errors import RunError
from wds_train.loader.pipeline import Pipeline
from wds_train.loader.plan import EvalPlan
from wds_train.loader.transform import EvalTransform
from wds_train.storage.open import open_store
from wds_train.tracking.metrics import repeatable

SETTINGS = (
    "model.blur_pool=true",
    "data.size=32",
    "data.eval_size=32",
)  # what 16 px leave the last layer cannot be blurred


@pytest.fixture(scope="module")
def trained(small: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A dataset and a finished run, not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    job = Job(
        small, str(folder / "run"), str(folder), settings=SETTINGS, arguments=("--price", "36")
    )
    training = Training(replace(job, point="before a step", nth=13, sent=HOLD))
    with all_ended([training]):
        wait_for_commit(job.run)  # so that rows after it can say what it cost
        assert training.end() == 0, training.output
    return small, str(folder / "run")


@pytest.fixture
def run(trained: tuple[str, str], tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(trained[1], tmp_path / "run")


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_status_says_how_far_a_run_is_and_what_it_cost(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = answer(capsys, "status", run, "--json", "--price", 36)
    status = json.loads(out)
    assert (code, status["status"], status["step"], status["epochs"], status["of_epochs"]) == (
        0,
        "done",
        44,
        4,
        4,
    )
    assert (status["attempts"], status["interruptions"], status["failures"]) == (1, 0, 0)
    seconds = json.loads((run / "manifest.json").read_text())["attempts"][0]["seconds"]
    assert seconds > 0
    assert status["dollars"] == pytest.approx(seconds / 100, abs=0.006)
    assert status["metrics"]["val/top1"] == status["checkpoints"][-1]["metrics"]["val/top1"]
    code, out = answer(capsys, "status", run)
    assert code == 0
    assert "step 44, 4 of 4 epochs validated" in out
    code, out = answer(capsys, "checkpoints", run)
    assert [line.split("\t")[0] for line in out.splitlines()[1:]] == [
        str(c["step"]) for c in status["checkpoints"]
    ]


def test_no_machines_of_aws_are_asked_for_where_the_run_is_not_there(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wds_train.aws.account.Aws.__init__", None)  # a call of it would fail
    with_machines = answer(capsys, "status", run, "--machines", "--json")
    assert with_machines[0] == 0
    assert "machines" not in json.loads(with_machines[1])
    code, out = answer(capsys, "status", "none", "--machines", "--bucket", run.parent)
    assert (code, "there is no run at" in out) == (1, True)


def test_rows_say_what_is_repeatable_and_how_it_went_this_time(run: Path) -> None:
    store = open_store(str(run))
    opened = Run(store, *read_run(store))
    attempt = opened.manifest.attempts[0]
    rows = opened.history()
    steps = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in steps] == list(range(2, 45, 2))
    assert {*repeatable(steps[-1])} == {
        "step",
        "epoch",
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/resolution",
    }
    names = set[str]()
    for row in steps:
        names |= row.keys()
        assert row["train/resolution"] == 32
        assert row["time/img_s"] > 0
        assert 0 <= row["time/data_wait"] <= 1
    # The cost of a commit is in one row alone.
    assert {"commit/stall_ms", "commit/upload_s"} <= names
    assert {row["time/attempt"] for row in rows} == {1}
    times = [row["time/unix"] for row in rows]
    ended = attempt.started + attempt.seconds + 0.1  # to which the seconds are rounded
    assert times == sorted(times) and attempt.started <= times[0] <= times[-1] <= ended
    assert (attempt.step, attempt.price, attempt.hardware) == (0, 36.0, "CPU, 1 threads")


def test_the_price_that_attempts_began_with_is_summed_up(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = json.loads(answer(capsys, "status", run, "--json")[1])
    assert status["dollars"] == pytest.approx(manifest_of(run).attempts[0].seconds / 100, abs=0.006)


def manifest_of(run: Path) -> RunManifest:
    return RunManifest.from_json((run / states.NAME).read_bytes(), "here")


def test_steps_that_came_out_otherwise_are_told(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = answer(capsys, "status", run)
    assert code == 0
    assert "recheck" not in out
    manifest, _ = read_run(open_store(str(run)))
    found = Difference(7, 1, "the gradient of fc.weight", "vm")
    (run / "manifest.json").write_bytes(replace(manifest, differences=(found,)).to_json())
    code, out = answer(capsys, "status", run)
    line = "step 7 gave another result the second time: the gradient of fc.weight, rank 1 on vm"
    assert (code, f"recheck      {line}" in out) == (0, True)
    code, out = answer(capsys, "status", "--json", run)
    assert json.loads(out)["differences"][0]["tensor"] == "the gradient of fc.weight"


@pytest.mark.parametrize(
    ("age", "here", "expected"),
    [(59, False, "running"), (61, False, "silent"), (1, True, "lost"), (61, True, "lost")],
)
def test_a_run_whose_owner_fell_silent_is_not_called_running(
    run: Path, age: float, here: bool, expected: str
) -> None:
    manifest = manifest_of(run)
    owner = (
        manifest.owner if here else replace(manifest.owner, machine="another")
    )  # the one here has ended
    manifest = replace(manifest, status="running", owner=owner)
    assert describe(manifest, manifest.written + age, None)["status"] == expected


def test_however_often_a_run_is_interrupted_its_manifest_stays_small(run: Path) -> None:
    manifest = manifest_of(run)
    for number in range(2000):
        ended = ("interrupted", "failed", "running")[
            number % 3
        ]  # the last kind is found to be lost by the next claim
        manifest = replace(
            manifest.with_claim(manifest.owner, 60.0, float(number)), status=ended
        ).with_stamp("n", 0.0, 36.0)
    first = manifest_of(run).attempts[0]
    assert len(manifest.to_json()) < 30_000
    assert [attempt.started for attempt in manifest.attempts] == list(range(1900, 2000))
    status = describe(RunManifest.from_json(manifest.to_json(), "here"), 0.0, 10.0)
    assert (status["attempts"], status["interruptions"], status["failures"]) == (2001, 1333, 667)
    assert status["hours"] == pytest.approx(20 + first.seconds / 3600, abs=1e-4)
    assert status["dollars"] == pytest.approx(200 + first.seconds / 360, abs=0.006)


def test_a_rollback_forgets_what_came_after(
    run: Path, trained: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end = (run / "manifest.json").read_bytes()
    assert answer(capsys, "rollback", run, "--to", 34)[1].endswith(
        "has no checkpoint of step 34; it has those of 11, 33, 44\n"
    )
    assert (run / "manifest.json").read_bytes() == end
    assert answer(capsys, "rollback", run, "--to", 33)[0] == 0
    assert answer(capsys, "rollback", run, "--to", 33) == (
        0,
        f"{run} is at step 33, its last; nothing is changed\n",
    )
    assert len(list(run.glob("ckpt/*"))) == 2
    manifest = RunManifest.from_json((run / "manifest.json").read_bytes(), "here")
    assert (manifest.status, manifest.checkpoints[-1].progress.step, manifest.result) == (
        "interrupted",
        33,
        {},
    )
    assert [segment.step for segment in manifest.metrics] == [11, 22, 33]
    again = Training(Job(trained[0], str(run), str(tmp_path), settings=SETTINGS))
    assert again.end() == 0, again.output
    assert "resuming at step 33 of 44" in again.output
    assert "left by an interrupted upload" not in again.output
    assert json.loads((run / "manifest.json").read_text())["result"] == json.loads(end)["result"]


def test_a_rollback_to_the_last_step_of_a_done_run_leaves_it_done(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "manifest.json").read_bytes()
    code, out = answer(capsys, "rollback", run, "--to", 44)
    assert (code, out) == (0, f"{run} is done, and at step 44, its last; nothing is changed\n")
    assert (run / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("status", ["interrupted", "done"])
def test_a_run_at_its_last_step_without_a_result_is_done_with_that_step_s(
    run: Path, trained: tuple[str, str], tmp_path: Path, status: str
) -> None:
    """As rollbacks to the last step once left it: `train` ended with a KeyError, for ever."""
    changed(run / "manifest.json", lambda m: m.update(status=status, result={}))
    again = Training(Job(trained[0], str(run), str(tmp_path), settings=SETTINGS))
    assert again.end() == 0, again.output
    manifest = manifest_of(run)
    assert (manifest.status, manifest.result) == ("done", manifest.checkpoints[-1].metrics)


def test_verify_reads_all_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = answer(capsys, "verify", run)
    checkpoints = sorted(run.glob("ckpt/*"))
    segments = sorted(run.glob("metrics/*"))
    size = sum(path.stat().st_size for path in (*checkpoints, *segments)) / 1e6
    assert (code, out.splitlines()) == (
        0,
        [
            f"{run}: whole; 3 checkpoints, 4 segments of metrics, {size:,.1f} MB",
            f"a resume uses the checkpoint of step 44, {checkpoints[-1].relative_to(run)}",
        ],
    )
    checkpoints[-1].unlink()
    data = bytearray(segments[1].read_bytes())
    data[3] ^= 1
    segments[1].write_bytes(data)
    code, out = answer(capsys, "verify", run)
    missing, damaged, summary, resume = out.splitlines()
    assert (code, missing) == (1, f"{checkpoints[-1]} is missing")
    assert damaged.startswith(f"{segments[1]} is damaged: it has {len(data)} bytes of sha256 ")
    assert summary.startswith(f"{run}: 2 damaged; ")
    assert resume.startswith("a resume uses the checkpoint of step 33, ckpt/")


def test_verify_finds_a_name_where_runs_and_where_datasets_lie(
    run: Path, trained: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = tmp_path / "bucket"
    shutil.copytree(run, bucket / "runs" / "one")
    shutil.copytree(trained[0], bucket / "datasets" / "two")
    for name in ("one", "two"):
        code, out = answer(capsys, "verify", name, "--bucket", bucket)
        assert (code, f"{name}: whole; " in out) == (0, True), out
    code, out = answer(capsys, "verify", "three", "--bucket", bucket)
    assert (
        code,
        f"there is no dataset and no run at {bucket}/datasets/three or {bucket}/runs/three" in out,
    ) == (
        1,
        True,
    )
    shutil.copytree(trained[0], bucket / "datasets" / "one")
    code, out = answer(capsys, "verify", "one", "--bucket", bucket)
    assert (code, out.count("one: whole; ")) == (0, 2), out


def test_an_export_is_readable_as_other_files_are(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out" / "x.safetensors"
    code, out = answer(capsys, "export", run, "--to", file)
    assert (code, f"--to {file}: there is no folder {file.parent}; make it first" in out) == (
        2,
        True,
    ), out
    file.parent.mkdir()
    before = os.umask(0o022)
    try:
        assert answer(capsys, "export", run, "--to", file)[0] == 0
    finally:
        os.umask(before)
    assert (file.stat().st_mode & 0o777, list(file.parent.iterdir())) == (0o644, [file])


def test_an_export_of_a_missing_checkpoint_names_the_usable_ones(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = manifest_of(run).checkpoints[1].object.key
    (run / key).unlink()
    code, out = answer(capsys, "export", run, "--step", 33, "--to", tmp_path / "x.safetensors")
    assert (code, out) == (
        1,
        f"wds-train: error: {run}/{key} is missing; the usable checkpoints are those of step "
        "11, 44\n",
    )


@pytest.mark.parametrize("kind", ["raw", "ema"])
def test_timm_loads_an_export_and_it_scores_the_same(
    run: Path,
    trained: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    file = tmp_path / "weights.safetensors"
    code, out = answer(capsys, "export", run, "--step", 44, "--best", kind, "--to", file)
    assert code == 0, out
    assert f"{kind} weights of step 44" in out
    call = out.partition("load it with ")[2]
    assert call.startswith("timm.create_model('test_resnet', num_classes=2, checkpoint_path=")
    model = eval(call, {"timm": timm}).eval()
    split = Dataset.open(trained[0]).split("val")
    loss = 0.0
    mean = torch.tensor([0.3] * 3)
    std = torch.tensor([0.35] * 3)
    with torch.inference_mode():
        for batch in Pipeline(split, EvalPlan(len(split), 16), EvalTransform(32, 1.0), 0):
            pixels = ((batch.images / 255 - mean) / std).permute(0, 3, 1, 2)
            loss += torch.nn.functional.cross_entropy(
                model(pixels), batch.labels, reduction="sum"
            ).item() / len(split)
    result = json.loads((run / "manifest.json").read_text())["result"]
    assert loss == pytest.approx(result["val/loss" + ("_ema" if kind == "ema" else "")], rel=1e-4)


def changed(manifest: Path, change: Callable[[dict[str, Any]], object]) -> bytes:
    content = json.loads(manifest.read_text())
    change(content)
    manifest.write_text(json.dumps(content))
    return manifest.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update(kind="mlflow"),
            "is not a wds-train run manifest; choose another run name",
        ),
        (lambda m: m.update(format=2), "has format 2, this wds-train reads format 1; upgrade it"),
        (
            lambda m: m.update(status="happy"),
            "is damaged: status is 'happy', not one of running, interrupted, failed, stopped, done",
        ),
        (lambda m: m.update(fence="7"), "fence is '7', not a whole number"),
        (lambda m: m.pop("owner"), "is damaged: owner is missing"),
        (
            lambda m: m["recipe"]["model"].update(name="resnet18"),
            "was begun with model.name resnet18, not test_resnet;",
        ),
        (
            lambda m: m["dataset"].update(url="/d", fingerprint="f" * 64),
            "dataset /d (fingerprint ffffffff), not ",
        ),
        (
            lambda m: [c["object"].update(key="../../etc/passwd") for c in m["checkpoints"]],
            "object.key is '../../etc/passwd', not of the form ckpt/",
        ),
    ],
)
def test_a_run_that_is_not_ours_is_refused_and_left_alone(
    run: Path,
    trained: tuple[str, str],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    changed(run / "manifest.json", lambda m: m.update(status="interrupted"))
    before = changed(run / "manifest.json", change)
    training = Training(Job(trained[0], str(run), str(tmp_path), settings=SETTINGS))
    assert training.end() == (2 if "was begun with" in training.output else 1), training.output
    assert message in training.output
    assert "Traceback" not in training.output
    assert (run / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("name", ["a b", "-run", "run?", "a*", "r\u00fcn", ".hidden", "x" * 101])
def test_odd_run_names_are_refused_with_the_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    code, out = answer(capsys, "status", tmp_path / name)
    assert (code, out) == (
        2,
        f"wds-train: error: {name!r} cannot be a run's name: use at most 100 letters, digits, '.', "
        "'_' and '-', a letter "
        "or digit first\n",
    )
    assert list(tmp_path.iterdir()) == []


def test_no_run_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = answer(capsys, "status", tmp_path / "none")
    assert (code, "there is no run at" in out) == (1, True)


def test_a_manifest_is_its_own_round_trip(run: Path) -> None:
    data = (run / states.NAME).read_bytes()
    assert RunManifest.from_json(data, "here").to_json() == data
    with pytest.raises(RunError, match="here is not JSON"):
        RunManifest.from_json(data[:-5], "here")


@pytest.mark.parametrize("price", ["nan", "inf", "-1", "much"])
def test_a_price_that_is_none_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], price: str
) -> None:
    assert main(["status", str(run), f"--price={price}"]) == 2
    assert f"--price: '{price}' is not a number of at least 0" in capsys.readouterr().err
