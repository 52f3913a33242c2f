"""Linear maps of bitsandbytes that multiply by their dequantised weight, on every device.

bitsandbytes chooses by mode, device and batch: it rounds activations to 8 bits in evaluation (and
on a GPU in training), looks for outliers over all rows of a call, and repacks weights for some
CPUs. Then a document's result would depend on what is computed beside it, and evaluation would see
another model than training. The weight made plain is multiplied as any other, so rows don't meet.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.model.wide import is_slow


class Dequantized4bit(Linear4bit):
    """A 4-bit linear map times its dequantised weight."""

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.bias, self)  # pyright: ignore


class Dequantized8bit(Linear8bitLt):
    """An 8-bit linear map times its dequantised weight; activations are not rounded."""

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.bias, self)  # pyright: ignore


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    Linear4bit: Dequantized4bit,
    Linear8bitLt: Dequantized8bit,
}


def multiply_dequantized(model: nn.Module) -> list[Any]:
    """Make every map of bitsandbytes in the model one of these; returns them."""
    found = [module for module in model.modules() if type(module) in _CLASSES]
    for module in found:
        module.__class__ = _CLASSES[type(module)]
    return found


def dequantized(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that the map stands for."""
    weight = module.weight
    if isinstance(module, Linear4bit):
        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    scale = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
    return weight.data.to(dtype).mul_(scale.unsqueeze(1).mul(1.0 / 127.0))


class _Product(torch.autograd.Function):
    """The plain weight lives while a product runs, and is made anew for the backward pass."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, module: Any) -> Tensor:
        ctx.module, ctx.dtype = module, input.dtype
        weight = dequantized(module, input.dtype)
        bias = None if bias is None else bias.to(input.dtype)
        if not is_slow(input):
            return functional.linear(input, weight, bias)
        wide = None if bias is None else bias.float()
        return functional.linear(input.float(), weight.float(), wide).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, need = grads[0], ctx.needs_input_grad
        found = None
        if need[0]:
            weight = dequantized(ctx.module, ctx.dtype)
            if is_slow(grad):
                found = (grad.float() @ weight.float()).to(ctx.dtype)
            else:
                found = grad @ weight
        rows = grad.float().reshape(-1, grad.shape[-1]).sum(0) if need[1] else None
        return found, rows, None
