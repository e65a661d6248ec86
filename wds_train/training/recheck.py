"""`--recheck`: training steps computed twice, to find broken hardware.

Hardware that is broken, or works at its limit, gives two results. The step is taken, the state is
put back, and the step is taken again. All results must be the same to the last bit: the loss, the
gradients, and every tensor that the step changes. A difference means something only where the same
arithmetic rounds in the same way each time: on a CPU, or on a GPU with --deterministic.
"""

import contextlib
import copy
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
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

# The results of a step, in the order in which they come up: a digest of the bytes, by name.
Digests = dict[str, str]


def refuse_unrepeatable(*, cpu: bool) -> None:
    """Raise `UsageError` where a step need not give the same bits twice: on a GPU."""
    if torch.cuda.is_available() and not cpu:
        raise UsageError(
            "--recheck cannot work on a GPU without --deterministic: its usual algorithms round "
            "in another way each time, so that a sound GPU would look like a broken one; give "
            "--deterministic, too, or leave out --recheck"
        )


def is_due(every: int, step: int, began_at: int, ranks: int) -> bool:
    """Return True if a step is to be taken twice.

    With several ranks the first step of a start is not: PyTorch groups the gradients again after
    it, and adds them up in another order.

    Args:
        every: Every so many'th step is due; 0: none.
        step: The number of the step; the first is 1.
        began_at: The steps that were done before this start.
        ranks: The number of processes.
    """
    if not every or step % every:
        return False
    return ranks == 1 or step > began_at + 1


def take_step(trainer: Trainer, batch: Batch, every: int, began_at: int) -> torch.Tensor:
    """Take a step, twice where it is due; return its loss.

    Args:
        trainer: The trainer.
        batch: The batch.
        every: Take every so many'th step twice; 0: none.
        began_at: The steps that were done before this start.

    Raises:
        Miscomputed: As `step_twice`.
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
    # Also a tensor that only one of the two has.
    differing = []
    for name in first | second:
        if first.get(name) != second.get(name):
            differing.append(name)
    _agree(trainer.ranks, trainer.progress.step, list(second), differing)
    return loss


def judge(error: Miscomputed, run: RunManifest) -> tuple[str, bool]:
    """Judge a step that gave two results, by those that the run has met before.

    Returns:
        The message, and True if the run may go on.
    """
    found = error.difference
    earlier = run.differences
    newest = "the beginning"
    if run.checkpoints:
        newest = f"step {run.step}"

    # Twice on one machine: the machine is broken.
    if _has_met_machine(earlier, found):
        return (
            f"{error}. This is the second time on {found.host}: leave this machine, whose CPU, GPU "
            f"or memory computes wrongly; the same command on another machine goes on from {newest}"
        ), False

    # On so many machines: the program is broken.
    if len(earlier) + 1 >= MOST_DIFFERENCES:
        hosts = ", ".join(each.host for each in (*earlier, found))
        return (
            f"{error}. So did steps on other machines ({hosts}): that is rather a fault of the "
            "program than of all of them; please report it. The same command without --recheck "
            "goes on"
        ), False

    # The first on this machine: it may be chance.
    return (
        f"{error}. The same command goes back to {newest}, and goes on from there; a second "
        f"difference on {found.host} ends the run as failed"
    ), True


def _has_met_machine(earlier: Sequence[Difference], found: Difference) -> bool:
    """Return True if an earlier difference was seen on the machine of `found`."""
    return any(each.is_of_machine(found.host, found.boot) for each in earlier)


@dataclass
class _State:
    """All values that a step changes, as copies in host memory: the GPU's is for the step.

    Attributes:
        entries: The model, its average and the optimizer, as `entries_of` returns them.
        settings: The names of the values of each of the optimizer's groups: some optimizers add a
            count at their first step.
        scaler: The scaler's state; empty where it is not enabled.
        sums: The epoch's sum of losses, and the largest norm of the gradients.
        progress: The steps and epochs so far.
    """

    entries: dict[str, Any]
    settings: list[set[str]]
    scaler: dict[str, Any]
    sums: tuple[torch.Tensor, torch.Tensor]
    progress: Progress

    @classmethod
    def of(cls, trainer: Trainer) -> "_State":
        """Copy the state of a trainer."""
        entries = {}
        state = entries_of(trainer.model, trainer.ema.module, trainer.optimizer)
        for name, value in state.items():
            entries[name] = _copy(value)
        return cls(
            entries,
            settings=[set(group) for group in trainer.optimizer.param_groups],
            scaler=copy.deepcopy(trainer.scaler.state_dict()),
            sums=(trainer.loss_sum.clone(), trainer.largest_norm.clone()),
            progress=trainer.progress,
        )

    def give_back(self, trainer: Trainer) -> None:
        """Put the trainer back to this state, by the same means as a resume."""
        trainer.model.load_state_dict(section(self.entries, "model/"))
        trainer.ema.module.load_state_dict(section(self.entries, "ema/"))
        # Without the values that the step added: the second time would begin with them.
        for group, names in zip(trainer.optimizer.param_groups, self.settings, strict=True):
            for added in group.keys() - names:
                del group[added]
        load_optimizer(trainer.optimizer, self.entries)
        if self.scaler:
            trainer.scaler.load_state_dict(self.scaler)
        loss_sum, trainer.largest_norm = self.sums
        trainer.loss_sum.copy_(loss_sum)
        trainer.progress = self.progress


def _copy(value: Any) -> Any:
    """Return a copy in host memory, in the same memory layout."""
    if not torch.is_tensor(value):
        return copy.deepcopy(value)
    return torch.empty_like(value, device="cpu").copy_(value.detach())


def _take_and_digest(trainer: Trainer, batch: Batch) -> tuple[Digests, torch.Tensor]:
    """Take the step; return the digests of its results, and its loss."""
    # The loss, and this rank's own gradients.
    seen: Digests = {}
    with _digest_own_gradients(trainer, seen):
        loss = trainer.gradients(batch)
    seen = {"the loss": _digest(loss)} | seen
    # The gradients before clipping: its factor depends on all, and would spread a difference.
    for name, weight in trainer.model.named_parameters():
        if weight.grad is not None:
            seen[_gradient(trainer.ranks, name)] = _digest(weight.grad)
    # The state after the update.
    trainer.update(batch, loss)
    names = _names(trainer)
    for entry, value in entries_of(trainer.model, trainer.ema.module, trainer.optimizer).items():
        seen[_describe(entry, names)] = _digest(value)
    return seen, loss


@contextlib.contextmanager
def _digest_own_gradients(trainer: Trainer, seen: Digests) -> Iterator[None]:
    """Put the digests of this rank's own gradients into `seen`, inside the block.

    A step leaves only the averaged ones, which are wrong on every rank where one rank's are wrong.
    """
    if trainer.ranks.size == 1:
        yield
        return
    handles = []

    def watch(name: str, weight: torch.Tensor) -> None:
        # At the node where autograd adds up the gradient: torch.compile would see a hook of the
        # tensor itself.
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
    """Return the name of a parameter's gradient, in words."""
    if ranks.size == 1:
        return f"the gradient of {name}"
    return f"the averaged gradient of {name}"


def _names(trainer: Trainer) -> list[str]:
    """Return the parameters' names, in the order in which the optimizer numbers them."""
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    ordered = []
    for group in trainer.optimizer.param_groups:
        for weight in group["params"]:
            ordered.append(names[id(weight)])
    return ordered


def _describe(entry: str, names: list[str]) -> str:
    """Return an entry of the state in words; `names` are those of the optimizer's parameters."""
    kind, _, rest = entry.partition("/")
    if kind == "model" and rest in names:
        return f"the parameter {rest}"
    if kind == "model":
        return f"the buffer {rest}"
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
    """Raise `Miscomputed` on all ranks if any of them has `differing` tensors.

    A wrong gradient of one rank is in the averages of all. The message names the rank whose first
    difference is the earliest in the step.

    Args:
        ranks: The processes.
        step: The number of the step; the first is 1.
        order: All results of the step, in their order.
        differing: Those of this rank that differ.
    """
    if not ranks.total(len(differing))[0]:
        return

    # Send this rank's first difference to the others, or that it has none.
    tensor = ""
    if differing:
        tensor = differing[0]
    first = len(order)
    if tensor in order:
        first = order.index(tensor)
    own = {
        "at": first,
        "rank": ranks.rank,
        "host": socket.gethostname(),
        "boot": this_boot(),
        "pid": os.getpid(),
        "tensor": tensor,
        "others": len(differing) - 1,
    }

    # Choose the earliest of all ranks; every rank comes to the same one.
    different = []
    for answer in ranks.exchange(f"recheck-{step}", json.dumps(own)):
        word = json.loads(answer)
        if word["tensor"]:
            different.append(word)
    worst = min(different, key=lambda word: (word["at"], word["rank"]))
    more = ""
    if worst["others"]:
        more = f" and in {worst['others']:,} other tensors"
    raise Miscomputed(
        f"step {step}, computed twice on rank {worst['rank']} ({worst['host']}, process "
        f"{worst['pid']}), gave two results: they differ in {worst['tensor']}{more}. Nothing of it "
        "was committed",
        Difference(step, worst["rank"], worst["tensor"], worst["host"], worst["boot"]),
    )
