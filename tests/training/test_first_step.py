"""Errors of a training's first step are found before the run is claimed."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from timm.models import register_model
from torch import nn

from wds_train.cli import main
from wds_train.config.presets import preset
from wds_train.config.settings import with_settings
from wds_train.errors import UsageError
from wds_train.storage.open import open_store
from wds_train.training.engine import Trainer
from wds_train.training.first_step import check_compiler, check_first_step
from wds_train.training.ranks import Ranks

CLASSES = 10
SMALL = ("model.name=test_resnet", "batch=16", "data.size=32", "data.eval_size=32")
CPU = torch.device("cpu")


class Odd(nn.Module):
    """A model of one linear layer, with one thing wrong with it."""

    def __init__(self, wrong: str, classes: int) -> None:
        super().__init__()
        self.wrong = wrong
        self.head = nn.Linear(3, classes)
        self.unused = nn.Linear(2, 2) if wrong == "a parameter without use" else None
        self.norm = nn.InstanceNorm2d(3)
        self.num_classes = classes

    def forward(self, images: torch.Tensor) -> object:  # noqa: PLR0911
        pooled = images.mean((2, 3))
        if not self.training or not self.wrong:
            return self.head(pooled)
        if self.wrong == "a pair":
            return self.head(pooled), self.head(pooled)
        if self.wrong == "other classes":
            return pooled
        if self.wrong == "a map":
            return self.head(images.movedim(1, 3))
        if self.wrong == "an instance of one value":
            return self.head(self.norm(images.mean((2, 3), keepdim=True)).flatten(1))
        if self.wrong == "a look at values" and images.sum().item() > 1e9:
            return self.head(-pooled)
        if self.wrong == "a look at shapes of values":
            return self.head(pooled[: len(torch.nonzero(pooled.sum(1) < 1e9))])
        if self.wrong == "no batch of one":
            return self.head(nn.functional.batch_norm(pooled, None, None, training=True))
        return self.head(pooled)


WRONG = {
    "a pair": "it gives tuple, where logits of shape [16, 10] are needed",
    "other classes": "it gives [16, 3], where logits of shape [16, 10] are needed",
    "a map": "it gives [16, 32, 32, 10], where logits of shape [16, 10] are needed",
    "an instance of one value": "Expected more than 1 spatial element",
}


FINE = (
    "a look at values",
    "a look at shapes of values",
)  # which a pass without memory does not have


@pytest.fixture(autouse=True, scope="module")
def odd_models() -> Iterator[None]:
    """timm's registry with `odd_NUMBER` for each kind of Odd."""
    for number, wrong in enumerate(
        ("", *WRONG, *FINE, "a parameter without use", "no batch of one")
    ):

        def make(
            pretrained: bool = False, wrong: str = wrong, num_classes: int = 1, **_: object
        ) -> nn.Module:
            return Odd(wrong, num_classes)

        make.__name__ = f"odd_{number}"
        make.__module__ = __name__
        ODD[wrong] = make.__name__
        register_model(make)
    yield


ODD: dict[str, str] = {}


def trainer(*settings: str, ranks: int = 1, accumulate: int = 1) -> Trainer:
    recipe = with_settings(preset("small"), [*SMALL, *settings])
    return Trainer(
        recipe, CLASSES, 11, torch.device("meta"), Ranks(0, ranks), accumulate=accumulate
    )


@pytest.mark.parametrize(
    "name", ["test_resnet", "resnet50", "convnext_atto", "mobilenetv3_small_050"]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ordinary_models_pass(name: str, ranks: int) -> None:
    check_first_step(
        trainer(f"model.name={name}", "data.size=64", "data.eval_size=64", ranks=ranks)
    )


@pytest.mark.parametrize(
    ("settings", "ranks", "accumulate", "said"),
    [
        (
            ["batch=1"],
            1,
            1,
            "batch = 1 cannot work: resnet50 works on 1 image of data.size = 32 pixels",
        ),
        (["batch=8"], 8, 1, "batch = 8 over 8 ranks cannot work"),
        (["batch=8"], 1, 8, "batch = 8 in 8 micro-batches (--accumulate) cannot work"),
        (["batch=8"], 2, 3, "batch = 8 over 2 ranks in 3 micro-batches (--accumulate) cannot work"),
        (
            ["batch=1", "data.size=64", "data.start_size=32"],
            1,
            1,
            "1 image of data.start_size = 32 pixels",
        ),
    ],
)
def test_a_single_value_for_each_channel_is_refused(
    settings: list[str], ranks: int, accumulate: int, said: str
) -> None:
    settings = ["model.name=resnet50", "mix.mixup=0", "mix.cutmix=0", *settings]
    with pytest.raises(UsageError, match="use a larger batch, fewer ranks") as caught:
        check_first_step(trainer(*settings, ranks=ranks, accumulate=accumulate))
    assert said in str(caught.value)


@pytest.mark.parametrize("batch", [2, 16])
def test_two_values_are_enough(batch: int) -> None:
    check_first_step(trainer("model.name=resnet50", f"batch={batch}"))


@pytest.mark.parametrize("wrong", WRONG)
def test_models_that_a_step_cannot_be_taken_with_are_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match="cannot work: odd_") as caught:
        check_first_step(trainer(f"model.name={ODD[wrong]}"))
    assert WRONG[wrong] in str(caught.value)


@pytest.mark.parametrize("kind", FINE)
def test_models_that_look_at_values_are_let_pass(kind: str) -> None:
    check_first_step(trainer(f"model.name={ODD[kind]}"))


def test_parameters_without_use_are_refused_on_several_ranks_alone() -> None:
    name = f"model.name={ODD['a parameter without use']}"
    check_first_step(trainer(name))
    with pytest.raises(
        UsageError, match=r"does not reach 2 of its parameters \(unused.weight, unused.bias\)"
    ):
        check_first_step(trainer(name, ranks=2))
    check_first_step(trainer(f"model.name={ODD['']}", ranks=2))


def test_no_generator_moves() -> None:
    meta = trainer("model.drop_path=0.1")
    before = torch.default_generator.get_state()
    check_first_step(meta)
    assert torch.equal(torch.default_generator.get_state(), before)


# The compiler


@pytest.fixture
def compiles_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for what is compiled, with nothing in it yet."""
    folder = tmp_path / "compiled"
    folder.mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return folder


@contextlib.contextmanager
def without_programs(folder: Path) -> Iterator[None]:
    """Let nothing that lies in `folder` be run."""
    mount = ["mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(not shutil.which("g++"), reason="this machine has no C++ compiler")
def test_a_compiler_that_works_passes(compiles_anew: Path) -> None:
    check_compiler(CPU)


def test_no_compiler_is_refused(compiles_anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    with pytest.raises(
        UsageError,
        match=r"--compile cannot work here \(.*[Cc]ompiler.*\); install a C\+\+ compiler",
    ):
        check_compiler(CPU)


@pytest.mark.skipif(not shutil.which("g++"), reason="this machine has no C++ compiler")
def test_a_folder_without_programs_is_refused(compiles_anew: Path) -> None:
    with (
        without_programs(compiles_anew),
        pytest.raises(UsageError, match="TORCHINDUCTOR_CACHE_DIR"),
    ):
        check_compiler(CPU)


def test_a_folder_that_cannot_be_written_is_refused(
    compiles_anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/compiled")
    with pytest.raises(UsageError, match="--compile cannot work here"):
        check_compiler(CPU)


# The command


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--set", "batch=1"], "batch = 1 cannot work: resnet50"),
        (["--set", "batch=8", "--accumulate", "8"], "batch = 8 in 8 micro-batches (--accumulate)"),
        (["--compile"], "--compile cannot work here"),
    ],
)
def test_nothing_is_claimed(
    small: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    said: str,
    more: list[str],
) -> None:
    if "--compile" in flags:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/compiled")
    run = str(tmp_path / "run")
    settings = [
        "model.name=resnet50",
        "data.size=32",
        "data.eval_size=32",
        "mix.mixup=0",
        "mix.cutmix=0",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    command = [
        "train",
        "--dataset",
        small,
        "--run",
        run,
        "--recipe",
        "small",
        *words,
        *flags,
        *more,
    ]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert [*open_store(run).list()] == []
