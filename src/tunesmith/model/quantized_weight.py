"""Weights that are kept in 4 or 8 bits, told apart without the package that made them."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor


def is_quantized(module: Any) -> bool:
    """True for a linear map whose weight is kept in fewer bits."""
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def parameter_count(parameter: Tensor) -> int:
    """Weights in a tensor; 4-bit ones are packed, two to a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else prod(state.shape)
