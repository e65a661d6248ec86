"""A training's state, by the names that a checkpoint has for it."""

from typing import Any

import torch
from torch import nn

from wds_train.models.tensor_checks import section

# Of an optimizer's groups: its weights, and how the device at hand computes, which is not for the next one to repeat.
_OF_THE_DEVICE = ("params", "fused", "foreach")


def entries_of(model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a training's state is made of, by the names that a checkpoint has for it."""
    entries = {f"model/{name}": value for name, value in model.state_dict().items()}
    entries |= {f"ema/{name}": value for name, value in average.state_dict().items()}
    state, groups = optimizer.state_dict().values()
    entries |= {f"optimizer/{i}/{slot}": value for i, slots in state.items() for slot, value in slots.items()}
    # The groups too: timm's LAMB counts its steps there, and would repeat its bias correction after a resume.
    for i, group in enumerate(groups):
        entries |= {f"group/{i}/{name}": value for name, value in group.items() if name not in _OF_THE_DEVICE}
    return entries


def load_optimizer(optimizer: torch.optim.Optimizer, entries: dict[str, Any]) -> None:
    """Give `optimizer` what `entries_of` took from another of its kind."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in section(entries, "optimizer/").items():
        index, slot = name.split("/")
        like = parameters[int(index)]
        if torch.is_tensor(value) and value.shape == like.shape:
            # In the parameter's own memory layout; otherwise every later update would mix layouts, slowly.
            value = torch.empty_like(like).copy_(value)  # noqa: PLW2901
        state.setdefault(int(index), {})[slot] = value
    groups = optimizer.state_dict()["param_groups"]
    groups = [group | _saved_group(entries, index) for index, group in enumerate(groups)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@torch.no_grad()
def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, complete after the next synchronisation. Pinned memory, which PyTorch keeps for the next
    snapshot, lets all tensors be copied in one go.
    """
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def _saved_group(entries: dict[str, Any], index: int) -> dict[str, Any]:
    saved = section(entries, f"group/{index}/")
    return {name: value for name, value in saved.items() if name not in _OF_THE_DEVICE}  # older checkpoints hold them
