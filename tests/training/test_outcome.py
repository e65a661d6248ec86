"""The lines at the end of a training, and the estimate before its start."""

import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from trainers import Job, Training, all_ended

from wds_train.checkpoint.find import find_run
from wds_train.checkpoint.run_manifest import Checkpoint, Object, Progress, RunManifest
from wds_train.cli import main
from wds_train.commands import status
from wds_train.config.recipe import Recipe
from wds_train.storage.base import Store
from wds_train.training import dry_run as estimate
from wds_train.training.outcome import describe_outcome, next_commands, resume_command


def run_of(*tops: tuple[float, float]) -> RunManifest:
    """A run whose epochs had these accuracies, raw and EMA."""
    epochs = [{"val/top1": raw, "val/top1_ema": ema} for raw, ema in tops]
    checkpoints = [
        Checkpoint(Object(f"ckpt/1-{n}-{n}.safetensors", 1, "0" * 64), Progress(n, n), epoch)
        for n, epoch in enumerate(epochs, 1)
    ]
    recipe = Recipe(name="digits", seed=6).to_dict()
    return RunManifest(
        "c1", recipe, {}, "", status="done", checkpoints=tuple(checkpoints), result=epochs[-1]
    )


def test_the_end_names_the_best_epoch_and_the_last() -> None:
    assert describe_outcome(run_of((50.0, 40.0), (60.0, 65.0), (61.0, 64.0))) == [
        "last     top-1 61.00 % raw, 64.00 % EMA",
        "best     top-1 65.00 % EMA, of epoch 2: the weights that eval uses",
    ]


def test_the_next_commands_are_those_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WDS_BUCKET", raising=False)
    ema = run_of((60.0, 65.0))
    raw = run_of((66.0, 65.0))
    assert next_commands(ema, "s3://embedded/runs/c1", test=True) == [
        "next     wds-train eval c1 --split test",
        "         wds-train export c1 --to c1.safetensors",
        "         wds-train train --like c1 --set seed=7 --run c1-seed-7",
    ]
    assert next_commands(raw, "s3://bucket/runs/c1", test=False) == [
        "next     wds-train export s3://bucket/runs/c1 --best raw --to c1.safetensors",
        "         wds-train train --like s3://bucket/runs/c1 --set seed=7 "
        "--run s3://bucket/runs/c1-seed-7",
    ]
    monkeypatch.setenv("WDS_BUCKET", "s3://bucket")
    assert resume_command("s3://bucket/runs/c1") == "wds-train train c1"
    assert resume_command("/my runs/c1") == "wds-train train '/my runs/c1'"


def test_an_interrupted_training_leaves_its_report_and_the_command_to_go_on(
    small: str, tmp_path: Path
) -> None:
    """Not before an epoch was validated; and what cannot be drawn changes nothing of the end."""
    run = str(tmp_path / "run")
    long = ("schedule.epochs=400",)
    trainings = [
        Training(
            Job(
                small, run, str(tmp_path), settings=long, point="before a step", sent=signal.SIGTERM
            )
        )
    ]
    with all_ended(trainings):
        assert trainings[0].end() == 75, trainings[0].output
        assert "report " not in trainings[0].output
        trainings.append(Training(Job(small, run, str(tmp_path), settings=long)))
        trainings[1].until("epoch   2/400")
        assert trainings[1].end(signal.SIGINT) == 75, trainings[1].output
        assert (
            f"the same command goes on from there, or: wds-train train {run}" in trainings[1].output
        )
        page = re.search(r"report   (\S+)", trainings[1].output)
        assert page
        assert Path(page[1]).read_text().startswith("<!doctype html>")
        Path(page[1]).unlink()
        Path(page[1]).mkdir()
        trainings.append(Training(Job(small, run, str(tmp_path), settings=long)))
        trainings[2].until("epoch +[0-9]+/400")
        assert trainings[2].end(signal.SIGTERM) == 75, trainings[2].output
        assert "the run is interrupted all the same" in trainings[2].output


def test_the_start_says_what_an_epoch_leaves_out(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        "model.name=test_resnet",
        "data.size=16",
        "data.eval_size=16",
        "schedule.epochs=2",
        "batch=16",
    ]
    arguments = [
        "train",
        "--dataset",
        small,
        "--run",
        str(tmp_path / "run"),
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    arguments += [
        part for setting in [*settings, "schedule.warmup_epochs=0"] for part in ("--set", setting)
    ]
    assert main([*arguments, "--dry-run", "--price", "7200"]) == 0
    said = capsys.readouterr()
    assert "epoch    uses 176 of 181 samples (drops 5, different each epoch)" in said.out
    steps = re.search(
        r"steps    22 of ([\d.e-]+) s, from 2 of them; 2 validations of ([\d.e-]+) s", said.out
    )
    whole = re.search(r"time     about \d+ s, \$([\d.]+)", said.out)
    assert steps and whole, said.out
    assert float(whole[1]) == pytest.approx(
        2 * (22 * float(steps[1]) + 2 * float(steps[2])), rel=0.2, abs=0.02
    )
    assert re.search(
        r"memory   about [\d.]+ GB of [\d.]+\n"
        r"nothing was written: without --dry-run, this begins\n",
        said.out,
    )
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--quiet"]) == 0
    assert [
        line.split()[0]
        for line in capsys.readouterr().err.splitlines()
        if not line.startswith("W&B")
    ] == [*("last", "best", "goodput", "state", "report", "next", "wds-train")]
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out == f"nothing would be trained: run {tmp_path / 'run'} is done\n"
    assert main(["rollback", str(tmp_path / "run"), "--to", "11"]) == 0
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith(
        "nothing was written: without --dry-run, this goes on at step 11\n"
    )


def test_a_training_that_takes_too_long_here_gets_a_smaller_one_named(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of those without larger images: none is short enough.

    A model that does not know the recipe's options is skipped.
    """
    monkeypatch.setattr(estimate, "TOO_LONG", 0.0)
    monkeypatch.setattr(
        estimate, "SMALLER", (("test_resnet", 64), ("test_resnet", 32), ("test_vit", 32))
    )
    settings = ["model.name=test_resnet", "model.blur_pool=true", "data.size=48", "batch=64"]
    arguments = [
        "train",
        "--dataset",
        small,
        "--run",
        str(tmp_path / "run"),
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    arguments += [part for setting in settings for part in ("--set", setting)]
    assert main([*arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "from 2 of batches of 32" in said
    assert re.search(
        r"instead  about \d+ (s|min) with --set model.name=test_resnet .*--set data.eval_size=32\n",
        said,
    )
    assert list(tmp_path.iterdir()) == []


def test_a_status_is_watched_until_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status, "WATCH_SECONDS", 0.02)
    done = run_of((60.0, 65.0))
    done = replace(done, dataset={"fingerprint": "x"}, written=time.time(), lease=60.0)
    done = done.with_claim(replace(done.owner, machine="another"), 60.0, time.time())
    running = tmp_path / "manifest.json"
    running.write_bytes(done.to_json())
    states = [done, done, replace(done, checkpoints=()), replace(done, status="done")]

    def find(url: str) -> tuple[RunManifest, Store]:
        """The run, whose training has gone on since the last look."""
        running.write_bytes(states.pop(0).to_json())
        return find_run(url)

    monkeypatch.setattr(status, "find_run", find)
    assert main(["status", str(tmp_path), "--watch"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "c1: running, step 1, epoch 1/90, val/top1 60.00, val/top1_ema 65.00",
        "c1: running, step 0, epoch 0/90, val/top1 60.00, val/top1_ema 65.00",
        "c1: done, step 1, epoch 1/90, val/top1 60.00, val/top1_ema 65.00",
    ]
