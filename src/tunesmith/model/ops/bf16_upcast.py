"""Upcasts bf16 matmuls to float32 on CPUs without bf16 units; the weights stay in bf16.

There torch multiplies bfloat16 matrices ten times slower and more than float32 ones. A product of
two bfloat16 numbers is exact in float32, so what hardware for bfloat16 computes, sums in float32
rounded once at the end, comes out of the float32 units as well. Weights and activations stay in
bfloat16; only a product's operands are widened while it runs. Gradients of weights are never
rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.model.ops.dtype import cpu_bfloat16
from tunesmith.module_swap import ModuleSwap

SWAP = ModuleSwap("bfloat16 upcast")


def needs_upcast(tensor: Tensor) -> bool:
    """Whether products of this tensor are better widened: bfloat16 on a CPU that has no units for
    it.
    """
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not cpu_bfloat16()


class UpcastLinear(nn.Linear):
    """A linear map that multiplies bfloat16 in float32; in any other precision `nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != torch.bfloat16 or self.weight.dtype != torch.bfloat16:
            return super().forward(input)
        return _UpcastProduct.apply(input, self.weight, self.bias)  # pyright: ignore


def upcast_linear_layers(model: nn.Module) -> int:
    """Make every slow linear map of the model a wide one; returns how many.

    Subclasses of `nn.Linear` are left alone: they may compute something else.
    """
    slow = [m for m in model.modules() if type(m) is nn.Linear and needs_upcast(m.weight)]
    for module in slow:
        SWAP.set_class(module, UpcastLinear)
    return len(slow)


def restore_linear_layers(model: nn.Module) -> None:
    """Undo `upcast_linear_layers`."""
    SWAP.restore(model)


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in float32; its gradient flows back in float32, unrounded."""
    return _Upcast.apply(tensor)  # pyright: ignore


class _UpcastProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        upcast_bias = None if bias is None else bias.float()
        return functional.linear(input.float(), weight.float(), upcast_bias).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad = grads[0].float()
        need_input, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            (grad @ weight.float()).to(input.dtype) if need_input else None,
            rows.T @ input.reshape(-1, input.shape[-1]).float() if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


class _Upcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
