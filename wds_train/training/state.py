"""A training's state, by the names that a checkpoint has for it.

A name that changes here makes the checkpoints of earlier runs unreadable.
"""

from typing import Any

import torch
from torch import nn

from wds_train.models.tensor_checks import section

# The entries of an optimizer's groups that are not saved: the weights, and the choices of
# implementation for the present device. The next start may be on another one.
_OF_THE_DEVICE = ("params", "fused", "foreach")


def entries_of(
    model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return a training's state by the names that a checkpoint has for it.

    The names are "model/NAME", "ema/NAME", "optimizer/PARAMETER/SLOT" and "group/GROUP/NAME". The
    tensors are those of the training itself, not copies.
    """
    # The model and its average.
    entries = {f"model/{name}": value for name, value in model.state_dict().items()}
    entries |= {f"ema/{name}": value for name, value in average.state_dict().items()}
    # The optimizer's state of each parameter, by the parameter's number.
    state, groups = optimizer.state_dict().values()
    for number, slots in state.items():
        for slot, value in slots.items():
            entries[f"optimizer/{number}/{slot}"] = value
    # The groups, too: timm's LAMB counts its steps there, and would repeat its bias correction
    # after a resume.
    for number, group in enumerate(groups):
        for name, value in group.items():
            if name not in _OF_THE_DEVICE:
                entries[f"group/{number}/{name}"] = value
    return entries


def copy_entries(
    model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Copy the state to host memory; return its tensors, and its other values.

    Each tensor is copied alone: safetensors refuses views and shared storage, and the training goes
    on changing the originals.
    """
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, value in entries_of(model, average, optimizer).items():
        if torch.is_tensor(value):
            tensors[name] = _copy_to_host(value)
        # A dtype (of timm's Adafactor) comes from the optimizer's constructor, and is not saved.
        elif not isinstance(value, torch.dtype):
            scalars[name] = value
    # The copies from a GPU are asynchronous.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return tensors, scalars


def load_optimizer(optimizer: torch.optim.Optimizer, entries: dict[str, Any]) -> None:
    """Load into `optimizer` the entries that `entries_of` returned for another one of its kind."""
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]

    # The state of each parameter.
    state: dict[int, dict[str, Any]] = {}
    for name, saved in section(entries, "optimizer/").items():
        number, slot = name.split("/")
        parameter = parameters[int(number)]
        value = saved
        if torch.is_tensor(saved) and saved.shape == parameter.shape:
            # In the parameter's own memory layout: an update that mixes layouts is slow.
            value = torch.empty_like(parameter).copy_(saved)
        state.setdefault(int(number), {})[slot] = value

    # The settings of each group.
    groups = optimizer.state_dict()["param_groups"]
    for position, group in enumerate(groups):
        group.update(_saved_group(entries, position))
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@torch.no_grad()
def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in host memory, complete after the next synchronisation."""
    # Pinned memory lets the copies run without the CPU; PyTorch keeps it for the next snapshot.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def _saved_group(entries: dict[str, Any], number: int) -> dict[str, Any]:
    """Return the saved settings of a group."""
    settings = {}
    for name, value in section(entries, f"group/{number}/").items():
        # Older checkpoints hold those of their device, too.
        if name not in _OF_THE_DEVICE:
            settings[name] = value
    return settings
