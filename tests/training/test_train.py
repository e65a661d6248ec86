"""Whole trainings in processes: killed, resumed, and bit by bit equal to unbroken ones."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trainers import wait_for_commit

from wds_train.checkpoint import run_manifest as states
from wds_train.checkpoint.run import Run
from wds_train.checkpoint.run_manifest import RunManifest
from wds_train.checkpoint.snapshot import Snapshot
from wds_train.cli import main
from wds_train.dataset.reader import Dataset
from wds_train.storage.open import open_store
from wds_train.tracking.metrics import repeatable

TINY = [
    "model.name=test_resnet",
    "schedule.epochs=2",
    "schedule.warmup_epochs=1",
    "mix.mixup=0.2",
    "model.drop_path=0.1",
]


class Training:
    """`wds-train train` as a process, with its output line by line."""

    def __init__(
        self, dataset: str, run: str, *, settings: list[str] = TINY, workers: int = 1
    ) -> None:
        command = [
            sys.executable,
            "-m",
            "wds_train.cli",
            "train",
            "--dataset",
            dataset,
            "--run",
            run,
            "--workers",
            str(workers),
        ]
        command += [part for setting in settings for part in ("--set", setting)]
        environment = os.environ | {"OMP_NUM_THREADS": "2", "WANDB_MODE": "offline"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.output = ""

    def until(self, pattern: str) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.output += line
            if re.search(pattern, line):
                return
        raise AssertionError(f"{pattern!r} never came:\n{self.output}")

    def end(self, sent: int | None = None) -> int:
        if sent is not None:
            self.process.send_signal(sent)
        assert self.process.stderr is not None
        self.output += self.process.stderr.read()
        return self.process.wait(120)


def final(url: str) -> tuple[RunManifest, Snapshot, list[str]]:
    """Manifest, state and metrics of a run, as anybody could read them."""
    store = open_store(url)
    data, tag = store.read_tagged(states.NAME)
    run = Run(store, RunManifest.from_json(data, url), tag)
    snapshot = run.restore(print)
    assert snapshot is not None
    return run.manifest, snapshot, [json.dumps(repeatable(record)) for record in run.history()]


def assert_equal_runs(one: str, other: str) -> None:
    manifest, snapshot, history = final(one)
    manifest2, snapshot2, history2 = final(other)
    assert manifest.status == manifest2.status == "done"
    assert manifest.result == manifest2.result
    assert history == history2
    assert snapshot.progress == snapshot2.progress
    assert snapshot.tensors.keys() == snapshot2.tensors.keys()
    different = [
        name
        for name in snapshot.tensors
        if not torch.equal(snapshot.tensors[name], snapshot2.tensors[name])
    ]
    assert not different


@pytest.fixture
def home(embedded_home: Path) -> Path:
    return embedded_home


@pytest.mark.timeout(600)
def test_killed_anywhere_it_ends_as_the_unbroken_run(
    digits: Dataset, s3_url: str, home: Path
) -> None:
    """SIGKILL at three moments, SIGTERM at a fourth, another number of workers each time."""
    unbroken = Training(digits.store.url, f"{s3_url}/unbroken")
    assert unbroken.end() == 0, unbroken.output
    broken = f"{s3_url}/broken"
    rng = random.Random(0)
    for workers, moment, sent in (
        (0, "dataset", signal.SIGKILL),
        (2, "epoch   1/2", signal.SIGKILL),
        (1, "resuming", signal.SIGTERM),
    ):
        training = Training(digits.store.url, broken, workers=workers)
        training.until(moment)
        if moment.startswith("epoch"):
            wait_for_commit(broken)
        time.sleep(rng.uniform(0.0, 0.6))
        assert training.end(sent) == (75 if sent == signal.SIGTERM else -sent), training.output
    assert re.search(
        r"stopped by SIGTERM at step \d+ of 44, state committed to s3://.*/broken", training.output
    )
    training = Training(digits.store.url, broken, workers=3)
    training.until(r"resuming at step \d+ of 44")
    time.sleep(rng.uniform(0.2, 1.0))
    training.end(signal.SIGKILL)
    last = Training(digits.store.url, broken)
    assert last.end() == 0, last.output
    assert_equal_runs(f"{s3_url}/unbroken", broken)
    named = {checkpoint.object.key for checkpoint in final(broken)[0].checkpoints}
    assert {entry.key for entry in open_store(broken).list("ckpt/")} == named


def test_a_first_training_needs_no_settings(home: Path, aws_env: pytest.MonkeyPatch) -> None:
    """The embedded server and the digits need no set-up; a second call finds the run done."""
    command = [
        sys.executable,
        "-m",
        "wds_train.cli",
        "train",
        "--set",
        "schedule.epochs=1",
        "--set",
        "schedule.warmup_epochs=0",
    ]
    command += ["--set", "model.name=test_resnet"]
    first = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("using the embedded S3 server") == 1
    assert "s3://embedded/datasets/digits: 1,437 train, 360 val, 10 classes" in first.stderr
    assert re.search(r"top-1 \d+\.\d+ % raw, \d+\.\d+ % EMA", first.stderr)
    page = re.search(r"report   (\S+)", first.stderr)
    assert page
    assert "<h1>Run digits</h1>" in Path(page[1]).read_text()
    assert Path(page[1]).with_name("loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(home.glob("wandb/offline-run-*"))
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert second.returncode == 0, second.stderr
    assert "run s3://embedded/runs/digits is done already" in second.stderr


def test_a_run_of_other_settings_is_refused(
    digits: Dataset,
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    command = [
        "train",
        "--dataset",
        digits.store.url,
        "--run",
        str(tmp_path / "run"),
        "--workers",
        "0",
    ]
    command += [
        "--set",
        "model.name=test_resnet",
        "--set",
        "schedule.epochs=1",
        "--set",
        "schedule.warmup_epochs=0",
    ]
    assert main(command) == 0
    before = (tmp_path / "run/manifest.json").read_bytes()
    assert main([*command, "--set", "optimizer.lr=0.3"]) == 2
    assert "was begun with optimizer.lr 0.002, not 0.3;" in capsys.readouterr().err
    assert (tmp_path / "run/manifest.json").read_bytes() == before


def test_a_mixture_trains_and_is_part_of_the_run(
    digits: Dataset,
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    other = str(tmp_path / "other")
    assert main(["shards", "digits", other, "--seed", "1", "--spool", str(tmp_path / "spool")]) == 0
    command = [
        "train",
        "--dataset",
        digits.store.url,
        "--run",
        str(tmp_path / "run"),
        "--workers",
        "0",
    ]
    command += [
        "--set",
        "model.name=test_resnet",
        "--set",
        "schedule.epochs=1",
        "--set",
        "schedule.warmup_epochs=0",
    ]
    mixed = [*command, "--mix", f"{other}=0.25"]
    assert main(mixed) == 0
    assert (
        "1 epochs of 29 steps of 64" in capsys.readouterr().err
    )  # 1,437 samples, 48 of each batch
    manifest = json.loads((tmp_path / "run/manifest.json").read_bytes())
    mixed_in = {"fingerprint": Dataset.open(other).fingerprint, "share": 0.25, "url": other}
    assert manifest["dataset"]["mix"] == [mixed_in]
    assert main(command) == 0  # the run supplies its own mixture
    assert main([*command, "--mix", f"{other}=0.5"]) == 2
    assert f"was begun with mixture {other}=0.25, not {other}=0.5;" in capsys.readouterr().err
    manifest["dataset"]["mix"][0].pop("url")  # as an older version left it
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest))
    assert main(command) == 2
    assert (
        "does not say where the datasets of its mixture are; give them again: --mix DATASET=0.25"
        in (capsys.readouterr().err)
    )
    assert main(mixed) == 0
