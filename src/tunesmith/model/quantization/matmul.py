"""Matmul with a dequantised weight that is recomputed in the backward pass instead of kept.

Libraries choose by mode, device and batch how they multiply: some round activations too, or look
for outliers over all rows of a call. Then a document's result would depend on what is computed
beside it, and evaluation would see another model than training. The weight made plain is multiplied
as any other, so rows don't meet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tunesmith.model.ops.bf16_upcast import needs_upcast


def multiply(module: Any, x: Tensor) -> Tensor:
    """`x` times the plain weight of `module`, which gives it as `plain_weight(dtype)`."""
    return _Product.apply(x, module.bias, module)  # pyright: ignore


class _Product(torch.autograd.Function):
    """The plain weight lives while a product runs, and is made anew for the backward pass."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, module: Any) -> Tensor:
        ctx.module, ctx.dtype = module, input.dtype
        weight = module.plain_weight(input.dtype)
        bias = None if bias is None else bias.to(input.dtype)
        if not needs_upcast(input):
            return functional.linear(input, weight, bias)
        wide = None if bias is None else bias.float()
        return functional.linear(input.float(), weight.float(), wide).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, need = grads[0], ctx.needs_input_grad
        found = None
        if need[0]:
            weight = ctx.module.plain_weight(ctx.dtype)
            if needs_upcast(grad):
                found = (grad.float() @ weight.float()).to(ctx.dtype)
            else:
                found = grad @ weight
        rows = grad.float().reshape(-1, grad.shape[-1]).sum(0) if need[1] else None
        return found, rows, None
