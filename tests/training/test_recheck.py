"""Hardware that computes wrongly at times: `--recheck` finds it, and nothing wrong is committed."""

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from machines import Machine, manifest_of
from outcomes import assert_same_end
from test_engine import assert_same_state, batch, trainer

from wds_train.checkpoint.run_manifest import Difference, RunManifest
from wds_train.errors import Miscomputed, UsageError
from wds_train.training.recheck import (
    MOST_DIFFERENCES,
    is_due,
    judge,
    refuse_unrepeatable,
    step_twice,
)

# A trainer in which one bit flips: of `what`, in the nth time that a step is computed, on one rank.
SCRIPT = '''
import json, os, sys, time

import torch

from wds_train.cli import entry
from wds_train.training.engine import Trainer
from wds_train.models.model import Ema

fault = json.loads(os.environ["FAULT"])
torch.set_num_threads(1)
here = int(os.environ.get("RANK", "0")) == fault.get("rank", 0)
passes = {}


def flip(tensor):
    with torch.no_grad():
        tensor.flatten()[:1].view(torch.int32).bitwise_xor_(1)  # the least of 32 bits


def now(trainer):
    """Return True at the moment of the fault: one of the two times that the step is computed."""
    step = trainer.progress.step
    passes[step] = passes.get(step, 0) + 1
    once = "mark" not in fault or not os.path.exists(fault["mark"])
    is_due = step + 1 in fault.get("steps", []) and passes[step] == fault.get("time", 1)
    if not (here and once and is_due):
        return False
    if "mark" in fault:
        time.sleep(2)  # so that the commit of the epoch before is done, on a busy machine too
    if "mark" in fault:
        open(fault["mark"], "w").close()
    return True


gradients, update, backward = Trainer.gradients, Trainer.update, torch.Tensor.backward
wrong = False


def wrong_gradients(self, batch):
    global wrong
    wrong = now(self)
    loss = gradients(self, batch)
    parameters = dict(self.model.named_parameters())
    if wrong and fault.get("what") == "gradient":
        flip(next(iter(parameters.values())).grad)
    if wrong and fault.get("what") == "loss":
        loss = loss.clone()
        flip(loss)
    if wrong and fault.get("what") == "buffer":
        flip(next(value for name, value in self.model.named_buffers() if "mean" in name))
    return loss


def wrong_update(self, batch, loss):
    update(self, batch, loss)
    if wrong and fault.get("what") == "parameter":
        flip(next(self.model.parameters()))
    if wrong and fault.get("what") == "average":
        flip(next(self.ema.module.parameters()))
    if wrong and fault.get("what") == "optimizer":
        flip(next(iter(self.optimizer.state.values()))["momentum_buffer"])


class Wrong(torch.autograd.Function):
    """Passes a value on, and a gradient with a bit flipped: before the ranks exchange it."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        gradient = gradient.clone()
        flip(gradient)
        return gradient


loss_of = Trainer.loss


def wrong_loss(self, model, images, targets):
    loss = loss_of(self, model, images, targets)
    return Wrong.apply(loss) if wrong and fault.get("what") == "own gradient" else loss


Trainer.gradients, Trainer.update, Trainer.loss = wrong_gradients, wrong_update, wrong_loss
entry()
'''


@pytest.fixture
def machine(small: str, tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(SCRIPT, small, tmp_path, settings=("schedule.epochs=2",))
    yield machine
    machine.end()


@pytest.fixture(scope="module")
def undisturbed(small: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """A run of one rank and one of two that no fault befell."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runs = {}
    for ranks in (1, 2):
        runs[ranks] = str(folder / f"run{ranks}")
        code, said = Machine(SCRIPT, small, folder, ranks, ("schedule.epochs=2",)).train(
            runs[ranks]
        )
        assert code == 0, said
    return runs


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_recheck_changes_no_bit(machine: Machine, tmp_path: Path, ranks: int) -> None:
    """With mixing, drop path, BatchNorm, micro-batches, clipping and an average of the weights."""
    there = replace(machine, ranks=ranks, settings=(*machine.settings, "optimizer.clip_norm=0.5"))
    for name, arguments in (
        ("plain", ()),
        ("checked", ("--recheck", "1")),
        ("third", ("--recheck", "3")),
    ):
        code, said = there.train(str(tmp_path / name), "--accumulate", "2", *arguments)
        assert code == 0, said
    assert_same_end(str(tmp_path / "plain"), str(tmp_path / "checked"))
    assert_same_end(str(tmp_path / "plain"), str(tmp_path / "third"))
    assert manifest_of(str(tmp_path / "checked")).differences == ()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("ranks", "what", "named"),
    [
        (1, "gradient", r"the gradient of conv1\.\S+"),
        (1, "own gradient", r"the gradient of \S+ and in \d+ other tensors"),
        (1, "loss", r"the loss"),
        (1, "buffer", r"the buffer \S*running_mean"),
        (1, "parameter", r"the parameter conv1\S+"),
        (1, "average", r"the average of conv1\S+"),
        (1, "optimizer", r"the optimizer's momentum_buffer of \S+"),
        (2, "gradient", r"the averaged gradient of conv1\.\S+"),
        (2, "own gradient", r"its own gradient of \S+ and in \d+ other tensors"),
    ],
)
def test_a_bit_that_flips_once_is_named_and_trained_again(
    machine: Machine,
    undisturbed: dict[int, str],
    tmp_path: Path,
    *,
    ranks: int,
    what: str,
    named: str,
) -> None:
    there = replace(machine, ranks=ranks)
    last = ranks - 1
    run = str(tmp_path / "run")
    fault = {"what": what, "steps": [16], "rank": last, "mark": str(tmp_path / "flipped")}
    code, said = there.train(run, "--recheck", "4", **fault)
    assert code == 75, said
    where = (
        rf"step 16, computed twice on rank {last} \({socket.gethostname()}, process \d+\), "
        r"gave two results"
    )
    assert re.search(rf"wds-train: {where}: they differ in {named}", said), said
    assert "goes back to step 11, and goes on from there" in said
    manifest = manifest_of(run)
    assert manifest.status == "interrupted"
    assert [checkpoint.progress.step for checkpoint in manifest.checkpoints] == [11]
    assert [(found.step, found.rank) for found in manifest.differences] == [(16, last)]
    code, said = there.train(run, "--recheck", "4", **fault)
    assert code == 0, said
    assert "resuming at step 11 of 22" in said
    assert_same_end(undisturbed[ranks], run)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "time", [1, 2], ids=["the first time is wrong", "the second time is wrong"]
)
def test_a_machine_that_goes_on_computing_wrongly_is_left(
    machine: Machine, tmp_path: Path, ranks: int, time: int
) -> None:
    there = replace(machine, ranks=ranks)
    run = str(tmp_path / "run")
    fault = {"what": "gradient", "steps": list(range(12, 30)), "time": time}
    assert there.train(run, "--recheck", "4", **fault)[0] == 75
    code, said = there.train(run, "--recheck", "4", **fault)
    assert code == 1, said
    assert f"This is the second time on {socket.gethostname()}: leave this machine" in said
    assert "goes on from step 11" in said
    manifest = manifest_of(run)
    assert (manifest.status, manifest.step, len(manifest.differences)) == ("failed", 11, 2)
    # A sound machine goes on; here it is one whose fault is over.
    assert there.train(run)[0] == 0


@pytest.mark.timeout(900)
def test_a_difference_before_the_first_checkpoint_begins_anew(
    machine: Machine, tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    code, said = machine.train(run, "--recheck", "1", what="gradient", steps=[1])
    assert code == 75, said
    assert "The same command goes back to the beginning" in said
    assert manifest_of(run).checkpoints == ()


def found_on(host: str, boot: str) -> Miscomputed:
    return Miscomputed("step 9 differs", Difference(9, 0, "the loss", host, boot))


@pytest.mark.parametrize(
    ("earlier", "goes_on", "said"),
    [
        ([], True, "goes back to"),
        ([("other", "b2")], True, "goes back to"),
        ([("here", "b2")], False, "leave this machine"),  # booted anew
        (
            [("container", "b1")],
            False,
            "leave this machine",
        ),  # another container of the same machine
        ([("other", "b2"), ("here", "b1")], False, "leave this machine"),
        ([("other", "b2"), ("third", "b3")], False, "fault of the program"),
        ([("other", ""), ("third", "")], False, "fault of the program"),
    ],
)
def test_another_machine_has_a_chance_of_its_own(
    earlier: list[tuple[str, str]], goes_on: bool, said: str
) -> None:
    differences = tuple(Difference(4, 1, "the loss", host, boot) for host, boot in earlier)
    manifest = RunManifest("run", {}, {}, "", differences=differences)
    told, may = judge(found_on("here", "b1"), manifest)
    assert may is goes_on
    assert said in told
    assert len(earlier) < MOST_DIFFERENCES


@pytest.mark.parametrize(
    ("every", "step", "began_at", "ranks", "due"),
    [
        (0, 5, 0, 1, False),
        (1, 1, 0, 1, True),
        (1, 1, 0, 2, False),
        (1, 2, 0, 2, True),
        (4, 8, 7, 2, False),
        (4, 8, 6, 2, True),
    ],
)
def test_which_steps_are_taken_twice(
    every: int, step: int, began_at: int, ranks: int, due: bool
) -> None:
    assert is_due(every, step, began_at, ranks) is due


@pytest.mark.parametrize(
    ("gpu", "cpu", "refused"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_gpu_whose_rounding_varies_is_refused(
    monkeypatch: pytest.MonkeyPatch, *, gpu: bool, cpu: bool, refused: bool
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    expected = (
        pytest.raises(UsageError, match="give --deterministic, too")
        if refused
        else contextlib.nullcontext()
    )
    with expected:
        refuse_unrepeatable(cpu=cpu)


def test_a_manifest_of_before_goes_on(tmp_path: Path) -> None:
    """One that knows no differences, and one that has met some, as they are written and read."""
    found = Difference(4, 1, "the loss", "vm", "b1")
    manifest = RunManifest(
        "run", {"ema": {"every": 1}}, {"fingerprint": "f"}, "", differences=(found,)
    )
    assert RunManifest.from_json(manifest.to_json(), "here").differences == (found,)
    older = json.loads(manifest.to_json())
    del older["differences"]
    assert RunManifest.from_json(json.dumps(older).encode(), "here").differences == ()


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer.name=sgd",),
        ("optimizer.name=adamw", "ema.kind=swa", "ema.every=2", "ema.swa_start=0.2"),
        ("optimizer.name=lamb", "optimizer.clip_norm=0.5", "optimizer.layer_decay=0.8"),
        ("optimizer.name=adafactor",),
        ("optimizer.name=nadamw", "loss.kind=bce", "data.erasing=0.5"),
        ("optimizer.name=muon",),
        ("optimizer.name=adamw", "model.name=test_convnext"),
    ],
    ids=" ".join,
)
def test_a_step_taken_twice_leaves_what_one_leaves(settings: tuple[str, ...]) -> None:
    """Also the first step, when the optimizer has no state. Some keep numbers in their groups."""
    usual, checked = (
        trainer("optimizer.lr=0.01", "model.drop_path=0.2", *settings) for _ in range(2)
    )
    for number in range(4):
        loss = usual.step(batch(number))
        assert torch.equal(step_twice(checked, batch(number)), loss)
        assert torch.equal(checked.grad_norm, usual.grad_norm)
        assert checked.epoch_loss() == usual.epoch_loss()
        assert_same_state(usual, checked)
        assert checked.progress == usual.progress
