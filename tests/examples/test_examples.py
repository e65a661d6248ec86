"""The examples run, and keep their promise.

Killed and started again, they end with the weights of a training that was never killed.
"""

import os
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from layouts import WNIDS, photos, tar_of
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from trainers import CONTEXT

from wds_train.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ("--model", "test_resnet", "--size", "32", "--batch", "16", "--epochs", "2")


def _run(name: str, arguments: tuple[str, ...], log: str, kill_at: int) -> None:
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    steps = iter(range(1, 1 << 30))

    def kill(*_: object) -> None:
        if next(steps) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(kill)
    sys.argv[:] = [name, *arguments]
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def run(folder: Path, name: str, *arguments: object, kill_at: int = 0) -> str:
    """Return the output of an example; with `kill_at` it is killed after so many steps."""
    log = folder / "log"
    process = CONTEXT.Process(
        target=_run, args=(name, tuple(map(str, arguments)), str(log), kill_at)
    )
    process.start()
    process.join(120)
    assert process.exitcode == (-signal.SIGKILL if kill_at else 0), log.read_text()
    return log.read_text()


def plain_weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out, weights_only=True)["model"]


def accelerate_weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(max(out.glob("step-*")) / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "settings", "weights"),
    [
        ("plain_pytorch.py", SMALL[2:], plain_weights),
        ("accelerate_train.py", SMALL, accelerate_weights),
    ],
    ids=["plain", "accelerate"],
)
def test_killed_and_started_again(name, settings, weights, tmp_path: Path, small: str) -> None:  # type: ignore[no-untyped-def]
    """11 steps an epoch, checkpoints at 4, 8, ...: the kill at 15 costs three steps."""
    arguments = (small, *settings, "--every", 4, "--out")
    run(tmp_path, name, *arguments, tmp_path / "killed", kill_at=15)
    assert "going on at step 12" in run(tmp_path, name, *arguments, tmp_path / "killed")
    run(tmp_path, name, *arguments, tmp_path / "unbroken")
    killed, unbroken = weights(tmp_path / "killed"), weights(tmp_path / "unbroken")
    assert killed.keys() == unbroken.keys()
    assert not [key for key in killed if not torch.equal(killed[key], unbroken[key])]


def test_timm_s_loop_over_our_loader_and_its_own(tmp_path: Path, small: str) -> None:
    """Both learn what bright and dark noise are."""
    images = Path(small).parent / "images"
    for source in ((small,), ("--timm", images)):
        told = run(tmp_path, "timm_train.py", *source, *SMALL, "--workers", "0")
        epochs = re.findall(r"epoch (\d): loss ([\d.]+), top-1 ([\d.]+) %, \d+ img/s", told)
        assert [epoch for epoch, *_ in epochs] == ["1", "2"], told
        assert float(epochs[-1][2]) > 90, told


def test_captions_of_plain_tars(tmp_path: Path) -> None:
    files = []
    for number, photo in enumerate(photos()):
        label = number % len(WNIDS)
        parts = {
            "jpg": photo,
            "cls": str(label).encode(),
            "txt": f"A photo of {WNIDS[label]}".encode(),
        }
        files += [(f"photo{number:02d}.{kind}", data) for kind, data in parts.items()]
    folder = tmp_path / "captions"
    folder.mkdir()
    for split in ("train", "val"):
        (folder / f"{split}-000000.tar").write_bytes(tar_of(files))
    assert main(["shards", "index", str(folder)]) == 0
    told = run(
        tmp_path, "captions.py", folder, "--batch", 8, "--epochs", 2, "--model", "test_resnet"
    )
    assert [int(step) for step in re.findall(r"step (\d+): loss", told)] == [3, 6], told
