"""Checks of a training's first step, before its run is claimed.

`training/setup.py` calls them: a batch, a model or a machine that cannot work is refused within
seconds, and no run is created.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from wds_train.errors import UsageError
from wds_train.global_rng import generators_kept
from wds_train.training.engine import Trainer

# Parameters that a message names.
NAMED = 3
# Characters of an error of the compiler, which may be a page.
CAUSE_LENGTH = 300
# For a first compilation, on a slow disk.
COMPILE_SECONDS = 300.0
# The beginning of the error of PyTorch's normalisation layers.
ONE_VALUE = "Expected more than 1 "
# The ends of the names of errors in a traceback's last lines.
ERRORS = ("Error", "Compiler", "Exception")

# Run in another process: compiling starts threads and uses the GPU, and loader workers may
# inherit neither.
COMPILE = """
import sys, torch
double = torch.compile(lambda x: x * 2 + 1, backend="inductor")
assert double(torch.ones(64, device=sys.argv[1])).sum().item() == 192
"""


@dataclass(frozen=True)
class _Part:
    """A rank's smallest micro-batch: `samples` images of `side` pixels, as `setting` says."""

    setting: str
    side: int
    samples: int


def check_first_step(trainer: Trainer) -> None:
    """Take a forward and a backward pass of a rank's smallest micro-batch, in training mode.

    Args:
        trainer: A trainer on the device "meta", which computes shapes alone.

    Raises:
        UsageError: The pass fails, or with several ranks, it does not reach all parameters.
    """
    model = trainer.model.train()
    for part in _parts(trainer):
        try:
            with generators_kept(torch.device("cpu")):
                _pass_over(trainer, model, part)
        except (ValueError, RuntimeError, AssertionError, IndexError) as error:
            # Undecided: the first step itself will show it.
            if _needs_memory(error):
                return
            raise UsageError(_describe(trainer, part, error)) from error
        _check_all_reached(trainer, model)


def check_compiler(device: torch.device) -> None:
    """Compile a small function for `device`, in another process.

    Raises:
        UsageError: There is no compiler, or what it makes cannot run where PyTorch puts it.
    """
    command = [sys.executable, "-c", COMPILE, device.type]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        # Slow, but it may well work.
        return
    if done.returncode == 0:
        return

    # Name the cause, and the three remedies that have helped.
    cause = _cause_of(done.stderr) or f"exit code {done.returncode}"
    raise UsageError(
        f"--compile cannot work here ({cause}); install a C++ compiler (for example `apt install "
        "g++`), let TORCHINDUCTOR_CACHE_DIR name a folder in which programs may be written and "
        "run, or leave out --compile"
    )


def _parts(trainer: Trainer) -> Iterator[_Part]:
    """Yield the smallest micro-batch for each size of training images."""
    data = trainer.recipe.data
    # Micro-batches differ by one sample at most: this is the smaller size.
    samples = trainer.samples // trainer.accumulate
    yield _Part("data.size", data.size, samples)
    if data.start_size not in (0, data.size):
        yield _Part("data.start_size", data.start_size, samples)


def _pass_over(trainer: Trainer, model: nn.Module, part: _Part) -> None:
    """Take a forward and a backward pass; raise `ValueError` for logits of another shape."""
    shape = (part.samples, part.side, part.side, 3)
    images = trainer.normalise(torch.zeros(shape, dtype=torch.uint8, device="meta"))
    labels = torch.zeros(part.samples, dtype=torch.int64, device="meta")
    model.zero_grad(set_to_none=True)
    logits = model(images)
    expected = [part.samples, trainer.classes]
    found: object = type(logits).__name__
    if isinstance(logits, torch.Tensor):
        found = [*logits.shape]
    if found != expected:
        raise ValueError(f"it gives {found}, where logits of shape {expected} are needed")
    trainer.criterion(logits.float(), labels).backward()


def _needs_memory(error: Exception) -> bool:
    """Return True if a pass failed only because "meta" has no values.

    A model may well look at them, and work on a device with memory.
    """
    return isinstance(error, NotImplementedError) or "meta tensor" in str(error)


def _check_all_reached(trainer: Trainer, model: nn.Module) -> None:
    """Raise `UsageError` for parameters without a gradient, which the ranks would wait for."""
    if trainer.ranks.size == 1:
        return
    unreached = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            unreached.append(name)
    if unreached:
        named = ", ".join(unreached[:NAMED])
        if len(unreached) > NAMED:
            named += ", ..."
        raise UsageError(
            f"{trainer.recipe.model.name} cannot be trained by {trainer.ranks.size} ranks: the "
            f"loss does not reach {len(unreached)} of its parameters ({named}), whose gradients "
            "the ranks would wait for; train with one process (--processes 1), or choose another "
            "model"
        )


def _describe(trainer: Trainer, part: _Part, error: Exception) -> str:
    """Return the message for an `error` of a pass over `part`."""
    # The settings that make the micro-batch, and its size.
    name = trainer.recipe.model.name
    cut = f"batch = {trainer.recipe.batch}"
    if trainer.ranks.size > 1:
        cut += f" over {trainer.ranks.size} ranks"
    if trainer.accumulate > 1:
        cut += f" in {trainer.accumulate} micro-batches (--accumulate)"
    images = f"{part.samples} images of {part.setting} = {part.side} pixels"
    if part.samples == 1:
        images = f"1 image of {part.setting} = {part.side} pixels"

    # The remedy: a batch of one small image, or a model of another kind.
    if str(error).startswith(ONE_VALUE):
        return (
            f"{cut} cannot work: {name} works on {images} at a time, which leave one of its "
            f"normalisation layers a single value for each channel ({error}); use a larger batch, "
            "fewer ranks, a smaller --accumulate or larger images"
        )
    return (
        f"{cut} cannot work: {name} takes no training step on {images} ({error}); choose another "
        "model or size"
    )


def _cause_of(output: str) -> str:
    """Return the last line of a traceback that names an error; else the last line; else ""."""
    last = ""
    for line in reversed(output.splitlines()):
        text = line.strip()
        name = text.split(":")[0].rsplit(".", 1)[-1]
        if name.endswith(ERRORS):
            return text[:CAUSE_LENGTH]
        last = last or text
    return last[:CAUSE_LENGTH]
