"""The precision that a model computes in, in training as in evaluation."""

import torch

from wds_train.config.precision import Precision


def amp_dtype(device: torch.device, precision: Precision = "auto") -> torch.dtype | None:
    """Return the dtype that autocast computes in; None for float32.

    Args:
        device: The device that computes.
        precision: "bf16", "fp16", "fp32", or "auto": on a GPU bf16, which has float32's range and
            needs no scaler, or fp16 on those older than Ampere; on a CPU float32.
    """
    if precision == "auto":
        if device.type != "cuda":
            return None
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16
        return torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def autocast(device: torch.device, amp: torch.dtype | None) -> torch.autocast:
    """Return a context in which models compute in another dtype.

    Args:
        device: The device of the models.
        amp: The dtype, from `amp_dtype`.
    """
    return torch.autocast(device.type, dtype=amp, enabled=amp is not None)
