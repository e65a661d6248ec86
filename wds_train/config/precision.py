"""The precision of the arithmetic: the choice of a machine, not of a recipe.

It stands alone because the command line offers it without importing PyTorch.
"""

from typing import Literal

Precision = Literal["auto", "bf16", "fp16", "fp32"]
