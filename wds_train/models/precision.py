"""The precision that a model computes in, in training as in evaluation."""

import torch

from wds_train.config.precision import Precision


def amp_dtype(device: torch.device, precision: Precision = "auto") -> torch.dtype | None:
    """Return the dtype that autocast computes in, None for float32.

    `auto` is, on a GPU, bf16, which has float32's range and needs no scaler; those before Ampere
    have only fp16.
    """
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def autocast(device: torch.device, amp: torch.dtype | None) -> torch.autocast:
    """Return a context in which models on `device` compute in `amp`, one of `amp_dtype`."""
    return torch.autocast(device.type, dtype=amp, enabled=amp is not None)
