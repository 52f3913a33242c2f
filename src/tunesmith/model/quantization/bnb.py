"""bitsandbytes linear layers (LLM.int8, NF4, FP4) that multiply by their dequantised weight.

bitsandbytes itself rounds activations to 8 bits in evaluation (and on a GPU in training). On CPUs
with AVX512-BF16 it repacks 4-bit weights in evaluation, rounds to bfloat16, and fails on widths
that its blocks do not divide. So evaluation and training would compute different functions.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from tunesmith.model.quantization.matmul import multiply


class Dequantized4bit(Linear4bit):
    """A 4-bit linear map times its dequantised weight."""

    def forward(self, x: Tensor) -> Tensor:
        return multiply(self, x)

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the map stands for."""
        weight: Any = self.weight
        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)


class Dequantized8bit(Linear8bitLt):
    """An 8-bit linear map times its dequantised weight; activations are not rounded."""

    def forward(self, x: Tensor) -> Tensor:
        return multiply(self, x)

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the map stands for."""
        weight: Any = self.weight
        scale: Any = weight.SCB if getattr(weight, "SCB", None) is not None else self.state.SCB
        return weight.data.to(dtype).mul_(scale.unsqueeze(1).mul(1.0 / 127.0))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    Linear4bit: Dequantized4bit,
    Linear8bitLt: Dequantized8bit,
}


def multiply_dequantized(model: nn.Module) -> list[Any]:
    """Turn every bitsandbytes layer of the model into one of these classes; returns them."""
    found = [module for module in model.modules() if type(module) in _CLASSES]
    for module in found:
        module.__class__ = _CLASSES[type(module)]
        # On a CPU with AVX512-BF16, bitsandbytes' own forward pass in evaluation packs the weight
        # anew, for good: scales and products are then rounded to bfloat16, and an input width that
        # is no multiple of 64, or an output width that is none of 32, is an error. These classes
        # have their own forward pass; whoever calls the inherited one must not pack either.
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return found
