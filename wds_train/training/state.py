"""A training's state, by the names that a checkpoint has for it."""

from typing import Any

import torch
from torch import nn

from wds_train.models.tensor_checks import section

# Of an optimizer's groups: its weights, and how the device at hand computes, which is not for the
# next one to repeat.
_OF_THE_DEVICE = ("params", "fused", "foreach")


def entries_of(
    model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return all that a training's state is made of, by the names that a checkpoint has for it.

    They are "model/NAME", "ema/NAME", "optimizer/PARAMETER/SLOT" and "group/GROUP/NAME". Tensors
    are the very ones of the training.
    """
    entries = {f"model/{name}": value for name, value in model.state_dict().items()}
    entries |= {f"ema/{name}": value for name, value in average.state_dict().items()}
    state, groups = optimizer.state_dict().values()
    for number, slots in state.items():
        for slot, value in slots.items():
            entries[f"optimizer/{number}/{slot}"] = value
    # The groups too: timm's LAMB counts its steps there, and would repeat its bias correction after
    # a resume.
    for number, group in enumerate(groups):
        for name, value in group.items():
            if name not in _OF_THE_DEVICE:
                entries[f"group/{number}/{name}"] = value
    return entries


def copy_entries(
    model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return copies of the state's tensors in host memory, and what of it is no tensor.

    Each tensor is copied alone: safetensors refuses views and shared storage, and the training goes
    on writing.
    """
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, value in entries_of(model, average, optimizer).items():
        if torch.is_tensor(value):
            tensors[name] = _copy_to_host(value)
        elif not isinstance(value, torch.dtype):
            # A dtype among a group's settings (timm's Adafactor) is as the optimizer was made.
            scalars[name] = value
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return tensors, scalars


def load_optimizer(optimizer: torch.optim.Optimizer, entries: dict[str, Any]) -> None:
    """Give `optimizer` what `entries_of` took from another of its kind."""
    parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, saved in section(entries, "optimizer/").items():
        number, slot = name.split("/")
        parameter = parameters[int(number)]
        value = saved
        if torch.is_tensor(saved) and saved.shape == parameter.shape:
            # In the parameter's own memory layout; otherwise every later update would mix layouts,
            # slowly.
            value = torch.empty_like(parameter).copy_(saved)
        state.setdefault(int(number), {})[slot] = value
    groups = optimizer.state_dict()["param_groups"]
    for position, group in enumerate(groups):
        group.update(_saved_group(entries, position))
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@torch.no_grad()
def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in host memory, complete after the next synchronisation.

    Pinned memory, which PyTorch keeps for the next snapshot, lets all tensors be copied in one go.
    """
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def _saved_group(entries: dict[str, Any], number: int) -> dict[str, Any]:
    """Return the saved settings of a group, without those of a device, which older ones hold."""
    saved = section(entries, f"group/{number}/")
    return {name: value for name, value in saved.items() if name not in _OF_THE_DEVICE}
