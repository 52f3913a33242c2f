"""Packed 4- and 8-bit weights, recognised without importing the package that made them."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn

_NAMES = ("Params4bit", "Int8Params")
_TORCHAO = "TorchAOBaseTensor"


def is_quantized(module: Any) -> bool:
    """True for a linear map whose weight is kept in fewer bits, in one piece or in parts."""
    weight = getattr(module, "weight", None)
    if getattr(weight, "quant_state", None) is not None:
        return True
    kind = type(weight)
    return kind.__name__ in _NAMES or any(base.__name__ == _TORCHAO for base in kind.__mro__)


def is_packed(module: Any) -> bool:
    """True where the weight is in a form that only Tunesmith knows: torchao's 4 bits, packed."""
    return type(getattr(module, "weight", None)).__name__ == "PackedInt4"


def parameter_count(parameter: Any) -> int:
    """Weights in a tensor; 4-bit ones are packed, two to a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else prod(state.shape)


def quantized_share(model: nn.Module) -> float:
    """Of all weights, those kept in fewer bits."""
    total = sum(map(parameter_count, model.parameters()))
    inside = {id(m.weight): parameter_count(m.weight) for m in model.modules() if is_quantized(m)}
    return sum(inside.values()) / total
