"""A training step computed twice, to find broken hardware.

Hardware that is broken, or works at its limit, gives two results.

The step is taken, the state is put back to what it was, and the step is taken again. All that it
works out must be the same to the last bit: the loss, the gradients, and every tensor that the step
changes. Only where the same arithmetic rounds in the same way each time does a difference say
something: on a CPU, or on a GPU with --deterministic.
"""

import contextlib
import copy
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from wds_train.checkpoint.lease import this_boot
from wds_train.checkpoint.run_manifest import Difference, Progress, RunManifest
from wds_train.errors import Miscomputed, UsageError
from wds_train.loader.batch import Batch
from wds_train.models.tensor_checks import section
from wds_train.training.engine import Trainer
from wds_train.training.ranks import Ranks
from wds_train.training.state import entries_of, load_optimizer

# Of one run, each on another machine: so many broken machines are less likely than a broken
# program.
MOST_DIFFERENCES = 3

Digests = dict[str, str]
"""The results of a step, in the order of their making: a digest of the bytes, by name."""


def refuse_unrepeatable(*, cpu: bool) -> None:
    """Raise `UsageError` where GPUs would be used, on which a step that is computed twice need not
    give the same bits.
    """
    if torch.cuda.is_available() and not cpu:
        raise UsageError(
            "--recheck cannot work on a GPU without --deterministic: its usual algorithms round "
            "in another way each time, so that a sound GPU would look like a broken one; give "
            "--deterministic, too, or leave out --recheck"
        )


def is_due(every: int, step: int, began_at: int, ranks: int) -> bool:
    """Return True if step number `step` (the first is 1) of a start that `began_at` a step is to be
    taken twice.

    With several ranks the first step of a start is not: PyTorch groups the gradients again after
    it, and adds them up in another order.
    """
    if not every or step % every:
        return False
    return ranks == 1 or step > began_at + 1


def take_step(trainer: Trainer, batch: Batch, every: int, began_at: int) -> torch.Tensor:
    """Take a step, twice where `is_due` says so; return its loss.

    Raises:
        Miscomputed: As `step_twice` raises it.
    """
    if is_due(every, batch.step + 1, began_at, trainer.ranks.size):
        return step_twice(trainer, batch)
    return trainer.step(batch)


def step_twice(trainer: Trainer, batch: Batch) -> torch.Tensor:
    """Take a step as `Trainer.step` does, and once more; return its loss. All ranks take part.

    Raises:
        Miscomputed: The two differ on any rank. Every rank raises it, with the same words. The
            state is then that of the second time, and must not be committed.
    """
    before = _State.of(trainer)
    first, _ = _take_and_digest(trainer, batch)
    before.give_back(trainer)
    second, loss = _take_and_digest(trainer, batch)
    differing = [name for name in first | second if first.get(name) != second.get(name)]
    _agree(trainer.ranks, trainer.progress.step, list(second), differing)
    return loss


def judge(error: Miscomputed, run: RunManifest) -> tuple[str, bool]:
    """Judge a step that gave two results, in a run which may have met others before.

    Returns:
        The message, and True if the run may go on.
    """
    found = error.difference
    earlier = run.differences
    newest = f"step {run.step}" if run.checkpoints else "the beginning"
    if any(each.is_of_machine(found.host, found.boot) for each in earlier):
        return (
            f"{error}. This is the second time on {found.host}: leave this machine, whose CPU, GPU "
            f"or memory computes wrongly; the same command on another machine goes on from {newest}"
        ), False
    if len(earlier) + 1 >= MOST_DIFFERENCES:
        hosts = ", ".join(each.host for each in (*earlier, found))
        return (
            f"{error}. So did steps on other machines ({hosts}): that is rather a fault of the "
            "program than of all of them; please report it. The same command without --recheck "
            "goes on"
        ), False
    return (
        f"{error}. The same command goes back to {newest}, and goes on from there; a second "
        f"difference on {found.host} ends the run as failed"
    ), True


@dataclass
class _State:
    """All that a step changes, as copies in host memory: the device's is for the step."""

    entries: dict[str, Any]
    settings: list[set[str]]
    """The names of what each of the optimizer's groups holds: some optimizers add a count at their
    first step.
    """
    scaler: dict[str, Any]
    sums: tuple[torch.Tensor, torch.Tensor]
    progress: Progress

    @classmethod
    def of(cls, trainer: Trainer) -> "_State":
        entries = entries_of(trainer.model, trainer.ema.module, trainer.optimizer)
        kept = {name: _copy(value) for name, value in entries.items()}
        sums = (trainer.loss_sum.clone(), trainer.largest_norm.clone())
        settings = [set(group) for group in trainer.optimizer.param_groups]
        return cls(
            kept, settings, copy.deepcopy(trainer.scaler.state_dict()), sums, trainer.progress
        )

    def give_back(self, trainer: Trainer) -> None:
        """Put the trainer back to this state, by the same means as a resume."""
        trainer.model.load_state_dict(section(self.entries, "model/"))
        trainer.ema.module.load_state_dict(section(self.entries, "ema/"))
        for group, names in zip(trainer.optimizer.param_groups, self.settings, strict=True):
            for added in group.keys() - names:
                del group[added]
        load_optimizer(trainer.optimizer, self.entries)
        if self.scaler:  # empty where it is not enabled
            trainer.scaler.load_state_dict(self.scaler)
        loss_sum, trainer.largest_norm = self.sums
        trainer.loss_sum.copy_(loss_sum)
        trainer.progress = self.progress


def _copy(value: Any) -> Any:
    if not torch.is_tensor(value):
        return copy.deepcopy(value)
    return torch.empty_like(value, device="cpu").copy_(value.detach())


def _take_and_digest(trainer: Trainer, batch: Batch) -> tuple[Digests, torch.Tensor]:
    """Take the step; return what it worked out, and its loss."""
    seen: Digests = {}
    with _watching_own_gradients(trainer, seen):
        loss = trainer.gradients(batch)
    seen = {"the loss": _digest(loss)} | seen
    # Before they are clipped, by a factor that holds all of them.
    for name, weight in trainer.model.named_parameters():
        if weight.grad is not None:
            seen[_gradient(trainer.ranks, name)] = _digest(weight.grad)
    trainer.update(batch, loss)
    names = _names(trainer)
    for entry, value in entries_of(trainer.model, trainer.ema.module, trainer.optimizer).items():
        seen[_describe(entry, names)] = _digest(value)
    return seen, loss


@contextlib.contextmanager
def _watching_own_gradients(trainer: Trainer, seen: Digests) -> Iterator[None]:
    """Put this rank's own gradients into `seen`, as they come up within.

    The averaged ones, which is all that a step leaves, are wrong on every rank where one rank's are
    wrong.
    """
    if trainer.ranks.size == 1:
        yield
        return
    handles = []

    def watch(name: str, weight: torch.Tensor) -> None:
        # Where autograd adds up the gradient: a hook of the tensor's own would be seen by
        # torch.compile.
        used = weight.expand_as(weight).grad_fn
        assert used is not None
        node = used.next_functions[0][0]
        assert node is not None

        def look(gradients: tuple[torch.Tensor, ...]) -> None:
            key = f"its own gradient of {name}"
            seen[key] = seen.get(key, "") + _digest(gradients[0])

        handles.append((node, node.register_prehook(look)))

    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            watch(name, weight)
    try:
        yield
    finally:
        for _, handle in handles:
            handle.remove()


def _gradient(ranks: Ranks, name: str) -> str:
    return f"the gradient of {name}" if ranks.size == 1 else f"the averaged gradient of {name}"


def _names(trainer: Trainer) -> list[str]:
    """Return the parameters' names, in the order in which the optimizer numbers them."""
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    return [
        names[id(weight)] for group in trainer.optimizer.param_groups for weight in group["params"]
    ]


def _describe(entry: str, names: list[str]) -> str:
    """Return an entry of the state in words; `names` are those of the optimizer's parameters."""
    kind, _, rest = entry.partition("/")
    if kind == "model":
        return f"the {'parameter' if rest in names else 'buffer'} {rest}"
    if kind == "ema":
        return f"the average of {rest}"
    number, _, slot = rest.partition("/")
    if kind == "optimizer":
        return f"the optimizer's {slot} of {names[int(number)]}"
    return f"the optimizer's {slot} (group {number})"


def _digest(value: Any) -> str:
    """Return a digest of a value's bytes: 0.0 and -0.0 differ, and a NaN is equal to itself."""
    if not torch.is_tensor(value):
        return hashlib.sha256(repr(value).encode()).hexdigest()
    return hashlib.sha256(value.detach().flatten().cpu().view(torch.uint8).numpy().data).hexdigest()


def _agree(ranks: Ranks, step: int, order: list[str], differing: list[str]) -> None:
    """Raise `Miscomputed` on all ranks where any of them has `differing` tensors.

    A wrong gradient of one rank's own is in the averages of all. The rank is named whose first
    difference is the earliest in a step's `order`.
    """
    if not ranks.total(len(differing))[0]:
        return

    # Every rank tells the others its own first difference, or that it has none.
    first = len(order)
    if differing and differing[0] in order:
        first = order.index(differing[0])
    own = {
        "at": first,
        "rank": ranks.rank,
        "host": socket.gethostname(),
        "boot": this_boot(),
        "pid": os.getpid(),
    }
    own |= {"tensor": differing[0] if differing else "", "others": len(differing) - 1}
    words = [json.loads(word) for word in ranks.exchange(f"recheck-{step}", json.dumps(own))]

    # All come to the same earliest one.
    different = [word for word in words if word["tensor"]]
    worst = min(different, key=lambda word: (word["at"], word["rank"]))
    more = f" and in {worst['others']:,} other tensors" if worst["others"] else ""
    raise Miscomputed(
        f"step {step}, computed twice on rank {worst['rank']} ({worst['host']}, process "
        f"{worst['pid']}), gave two results: they differ in {worst['tensor']}{more}. Nothing of it "
        "was committed",
        Difference(step, worst["rank"], worst["tensor"], worst["host"], worst["boot"]),
    )
