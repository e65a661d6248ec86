"""Tests that need a GPU, skipped by name elsewhere; and a GPU that PyTorch cannot use."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_engine import batch, recipe, trainer

from wds_train.checkpoint.run_manifest import Progress, Totals
from wds_train.errors import UsageError
from wds_train.loader.batch import Batch
from wds_train.loader.pipeline import copy_to_device
from wds_train.models.model import create_optimizer
from wds_train.training.engine import Trainer, refuse_nondeterministic
from wds_train.training.metrics_rows import MetricsRows
from wds_train.training.ranks import Ranks, refuse_unusable_gpu

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
needs_none = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU here, and PyTorch can use it"
)


@needs_gpu
@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("bf16", "sgd"), ("bf16", "adamw"), ("bf16", "lamb"), ("fp16", "sgd"), ("fp32", "sgd")],
)
def test_a_step_never_waits_for_the_gpu(precision: str, optimizer: str) -> None:
    chosen = recipe(
        "data.erasing=0.5",
        "model.drop_path=0.1",
        "optimizer.clip_norm=1",
        f"optimizer.name={optimizer}",
    )
    gpu = torch.device("cuda", 0)
    running = Trainer(chosen, 10, 10, gpu, precision=precision, accumulate=2)  # type: ignore[arg-type]
    batches = copy_to_device(map(_pinned, map(batch, range(6))), running.device)
    for _ in range(3):  # cuDNN chooses its algorithms
        running.step(next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            running.step(next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_batches_arrive_whole_and_in_order() -> None:
    """Their memory is reused, while the GPU is busy for longer than a copy takes."""
    device = torch.device("cuda", 0)
    busy = torch.randn(4096, 4096, device=device)
    sums = []
    for given in copy_to_device(map(_pinned, map(batch, range(50))), device):
        busy = (busy @ busy).clamp(-1, 1)
        sums.append((given.step, given.images.sum(dtype=torch.int64), given.labels.sum()))
    expected = [(step, int(each.images.sum(dtype=torch.int64)), int(each.labels.sum()))
                for step, each in ((step, batch(step)) for step in range(50))]  # fmt: skip
    assert [(step, int(pixels), int(labels)) for step, pixels, labels in sums] == expected


def _pinned(given: Batch) -> Batch:
    given.images.data = given.images.pin_memory()
    given.labels.data = given.labels.pin_memory()
    return given


def test_on_a_cpu_batches_are_handed_on_as_they_are() -> None:
    """And not one ahead: a commit's step is that of the last batch taken."""
    taken: list[int] = []

    def source() -> Iterator[Batch]:
        for step in range(2):
            taken.append(step)
            yield batch(step)

    batches = copy_to_device(source(), torch.device("cpu"))
    assert next(batches).step == 0
    assert taken == [0]


@needs_none
def test_a_gpu_that_pytorch_cannot_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    with pytest.raises(
        UsageError, match=r"has a GPU \(driver .+\) that PyTorch .+ cannot use: .+--device cpu"
    ) as refused:
        refuse_unusable_gpu(tmp_path)
    assert torch.__version__ in str(refused.value)
    assert "\n" not in str(refused.value)


@needs_none
@pytest.mark.parametrize("name", ["null", "nvidiactl", "nvidia-uvm"])
def test_without_a_gpu_nothing_is_refused(tmp_path: Path, name: str) -> None:
    """A driver may be installed on a machine that has none."""
    (tmp_path / name).touch()
    refuse_unusable_gpu(tmp_path)


def test_ranks_leave_the_gpu_alone_when_asked() -> None:
    assert Ranks(cpu=True).device == torch.device("cpu")


def test_a_checkpoint_does_not_say_how_the_next_device_computes() -> None:
    running = trainer()
    running.step(batch(0))
    snapshot = running.snapshot()
    assert snapshot is not None
    assert not [name for name in snapshot.extra["scalars"] if name.endswith(("/fused", "/foreach"))]
    snapshot.extra["scalars"] |= {
        "group/0/fused": True,
        "group/1/foreach": True,
    }  # as an older one, of a GPU, had them
    resumed = trainer()
    resumed.restore(snapshot)
    assert [(group["fused"], group["foreach"]) for group in resumed.optimizer.param_groups] == [
        (group["fused"], group["foreach"])
        for group in create_optimizer(running.recipe, running.model).param_groups
    ]


def test_the_pace_is_that_of_all_steps_since_the_last_record() -> None:
    logged: list[dict[str, float]] = []
    run = SimpleNamespace(
        manifest=SimpleNamespace(totals=Totals, fence=1),
        committer=SimpleNamespace(upload_s=None),
        uploader=SimpleNamespace(log=lambda row, at: None),
    )
    rows = MetricsRows(run, SimpleNamespace(log=logged.append), 8)
    rows.add_step(0.5, 0.5)
    rows.add_step(0.0, 3.0)
    rows.log_step({}, Progress())
    rows.add_step(0.0, 2.0)
    rows.log_step({}, Progress())
    assert [(row["time/img_s"], row["time/data_wait"]) for row in logged] == [
        (4.0, 0.125),
        (4.0, 0.0),
    ]


def test_what_has_no_deterministic_gradient_is_refused_before_the_first_step() -> None:
    blurred = recipe("model.blur_pool=true", "data.eval_size=64", "data.size=64")
    with pytest.raises(
        UsageError, match=r"--deterministic cannot work with model.blur_pool = True on a GPU"
    ):
        refuse_nondeterministic(blurred, torch.device("cuda"))
    refuse_nondeterministic(blurred, torch.device("cpu"))
    refuse_nondeterministic(recipe(), torch.device("cuda"))


@needs_none
def test_gpus_that_a_variable_hides_are_named_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UsageError, match=r"unset CUDA_VISIBLE_DEVICES \(now ''\)"):
        refuse_unusable_gpu(tmp_path)
