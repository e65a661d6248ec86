"""A run that is trained while it is read: dropped objects do not count as missing."""

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainers import Job, Training

from wds_train.checkpoint import restore as read
from wds_train.checkpoint.lease import read_run
from wds_train.cli import main
from wds_train.errors import Dropped, RunError
from wds_train.storage.local import LocalStore
from wds_train.storage.open import open_store

PARTS = ["ckpt/", "metrics/"]
ALWAYS = 1000


@pytest.fixture(scope="module")
def trained(small: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("moving")
    training = Training(Job(small, str(folder / "run"), str(folder)))
    assert training.end() == 0, training.output
    return str(folder / "run")


@pytest.fixture
def run(trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WDS_HOME", str(tmp_path / "home"))
    return shutil.copytree(trained, tmp_path / "run")


Commit = Callable[[Path, str], None]


def replaced(run: Path, key: str) -> None:
    """As a commit does it that has the same state under a key of its own."""
    manifest = run / "manifest.json"
    new = re.sub(r"\d{6}", lambda fence: f"{int(fence[0]) + 1:06d}", key, count=1)
    shutil.copy(run / key, run / new)
    changed = run / "changed.json"
    changed.write_text(manifest.read_text().replace(f'"{key}"', f'"{new}"'))
    changed.replace(manifest)
    (run / key).unlink()


def removed(run: Path, key: str) -> None:
    """As nothing does that is right: the manifest names it still."""
    (run / key).unlink(missing_ok=True)


def commits(
    patch: pytest.MonkeyPatch, run: Path, *, part: str, times: int, commit: Commit = replaced
) -> None:
    """Let a commit come right before an object of `part` is read, so many times."""
    left = [times]
    before = LocalStore.read
    one_at_a_time = threading.Lock()

    def read_late(self: LocalStore, key: str, *arguments: Any, **named: Any) -> bytes:
        with one_at_a_time:
            if key.startswith(part) and left[0] and (run / key).exists():
                left[0] -= 1
                commit(run, key)
        return before(self, key, *arguments, **named)

    patch.setattr(LocalStore, "read", read_late)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("times", [1, 3, 6])
def test_verify_calls_nothing_missing_that_a_commit_has_dropped(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    times: int,
) -> None:
    commits(monkeypatch, run, part=part, times=times)
    assert main(["verify", str(run)]) == 0
    out = capsys.readouterr().out
    newest = read_run(open_store(str(run)))[0].checkpoints[-1]
    assert out.startswith(f"{run}: whole; ")
    assert out.endswith(
        f"a resume uses the checkpoint of step {newest.progress.step}, {newest.object.key}\n"
    )


@pytest.mark.parametrize("part", PARTS)
def test_verify_names_what_is_missing_all_the_same(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    commits(monkeypatch, run, part=part, times=1, commit=removed)
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert re.match(rf"\S+/{part}\S+ is missing\n\S+: 1 damaged; ", out)


def test_what_was_damaged_and_is_dropped_is_no_damage_of_the_run(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_, last = [each.object.key for each in read_run(open_store(str(run)))[0].checkpoints]
    sound = (run / first).read_bytes()
    (run / first).write_bytes(sound[:-1])

    def mended(run: Path, _: str) -> None:
        (run / first).write_bytes(sound)
        for key in (first, last):
            replaced(run, key)

    commits(monkeypatch, run, part=last, times=1, commit=mended)
    assert main(["verify", str(run)]) == 0
    assert f"{run}: whole" in capsys.readouterr().out


COMMANDS = {
    "export": ["export", "RUN", "--to", "TMP/out.safetensors"],
    "export of another kind": ["export", "RUN", "--best", "raw", "--to", "TMP/out.safetensors"],
    "export of a step": ["export", "RUN", "--step", "44", "--to", "TMP/out.safetensors"],
    "eval": ["eval", "RUN", "--workers", "0", "--device", "cpu"],
    "report": [
        "report",
        "RUN",
        "--out",
        "TMP/report",
        "--images",
        "8",
        "--workers",
        "0",
        "--device",
        "cpu",
    ],
    "predict": ["predict", "RUN", "IMAGE"],
}


def typed(name: str, run: Path, small: str) -> list[str]:
    image = next((Path(small).with_name("images") / "val").rglob("*.png"))
    words = {"RUN": str(run), "IMAGE": str(image)}
    return [words.get(word, word.replace("TMP", str(run.parent))) for word in COMMANDS[name]]


@pytest.mark.parametrize("name", COMMANDS)
def test_what_reads_weights_takes_those_of_the_newest_state(
    run: Path,
    small: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    commits(monkeypatch, run, part="ckpt/", times=3)
    assert main(typed(name, run, small)) == 0
    said = capsys.readouterr()
    assert "missing" not in said.out + said.err and "could not be evaluated" not in said.err


@pytest.mark.parametrize("name", ["report", "compare"])
def test_what_reads_metrics_takes_those_of_the_newest_state(
    run: Path,
    small: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    commits(monkeypatch, run, part="metrics/", times=3)
    arguments = (
        ["compare", str(run), str(run)] if name == "compare" else typed("report", run, small)
    )
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "cannot be used" not in said.out + said.err


@pytest.mark.parametrize("name", ["export", "eval", "predict", "verify"])
def test_a_run_that_is_never_the_same_is_told(
    run: Path,
    small: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    commits(monkeypatch, run, part="ckpt/", times=ALWAYS)
    assert main(["verify", str(run)] if name == "verify" else typed(name, run, small)) == 1
    err = capsys.readouterr().err
    assert re.search(
        rf"wds-train: error: {run} commits faster than it can be read: {read.ROUNDS} times a newer",
        err,
    )


@pytest.mark.parametrize("commit", [replaced, removed])
def test_an_object_that_is_gone_is_dropped_or_missing(run: Path, commit: Commit) -> None:
    store = open_store(str(run))
    named = read_run(store)[0].metrics[0].object
    commit(run, named.key)
    with pytest.raises(Dropped if commit is replaced else RunError, match=re.escape(named.key)):
        read.read_object(store, named)
    (run / "manifest.json").unlink()  # then nothing tells
    with pytest.raises(RunError, match="is missing"):
        read.read_object(store, named)
