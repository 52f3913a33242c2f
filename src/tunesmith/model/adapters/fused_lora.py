"""LoRA (arXiv 2106.09685) added to a linear layer's output in one pass over memory.

peft writes the addition, scales it, and adds it in a third pass; backward does the same. Here the
product with B adds to the map's own result, and only the input and its product with A are kept.

Letters: n tokens, i and o width of input and output, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tunesmith.model.ops.bf16_upcast import needs_upcast
from tunesmith.module_swap import ModuleSwap

SWAP = ModuleSwap("fused LoRA")
_PLAIN = (Tensor, nn.Parameter)


def fuse_low_rank(model: nn.Module) -> int:
    """Let every linear map with a plain LoRA on it add up this way; returns how many there are.

    Only `forward` of the single module is replaced. It falls back to peft's own for what it does
    not know: dora and other variants, merged or several adapters, weights in parts.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    known = [
        module
        for module in model.modules()
        if isinstance(module, LoraLayer)
        and not isinstance(module, ParamWrapper)
        and isinstance(module.get_base_layer(), nn.Linear)
    ]
    for module in known:
        SWAP.set_forward(module, _forward)
    return len(known)


def _forward(self: Any, x: Tensor, *args: Any, **named: Any) -> Tensor:
    found = None if args or named else _additions(self, x)
    if found is None:
        return type(self).forward(self, x, *args, **named)
    down, up, dropout, scale = found
    result = self.base_layer(x)
    if result.dtype != x.dtype:
        return type(self).forward(self, x)
    # what a quantised map returns may be a view, and a mode (selective recomputation) keeps what
    # each operation returned
    over = type(self.base_layer) is nn.Linear and _get_current_dispatch_mode() is None
    return _PlusLowRank.apply(result, dropout(x), down, up, scale, over)  # pyright: ignore


def _additions(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, nn.Module, float] | None:
    """A [r, i], B [o, r], the dropout before A, and what scales their product."""
    if layer.disable_adapters or layer.merged or needs_upcast(x):
        return None
    if torch.is_autocast_enabled() or torch.compiler.is_compiling():  # a compiler fuses by itself
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant:
        return None
    maps = layer.lora_A[active[0]], layer.lora_B[active[0]]
    if not all(_is_plain(one, x) for one in maps):
        return None
    down, up = (one.weight for one in maps)
    return down, up, layer.lora_dropout[active[0]], float(layer.scaling[active[0]])


def _is_plain(linear: Any, x: Tensor) -> bool:
    """Whether calling it does no more than multiply with a weight that is here as a whole."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks
    plain = type(linear) is nn.Linear and linear.bias is None and not hooked
    return plain and type(linear.weight) in _PLAIN and linear.weight.dtype == x.dtype


class _PlusLowRank(torch.autograd.Function):
    """result + scale * (input A') B', written over `result` where it may be; result [..., o], input
    [..., i].
    """

    @staticmethod
    def forward(
        ctx: Any, result: Tensor, input: Tensor, down: Tensor, up: Tensor, scale: float, over: bool
    ) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        hidden = rows @ down.T
        flat = result.view(-1, result.shape[-1])
        ctx.save_for_backward(input, hidden, down, up)
        ctx.scale = scale
        if not over:
            added = torch.addmm(flat, hidden, up.T, alpha=scale)
            # A view out of a function of ours could not be added to in place, as falcon does.
            return torch.ops.aten._unsafe_view(added, result.shape)
        ctx.mark_dirty(result)
        flat.addmm_(hidden, up.T, alpha=scale)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, hidden, down, up = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        _, need_input, need_down, need_up, *_ = ctx.needs_input_grad
        # of the forms of thin products those that are up to four times as quick on a CPU
        grad_hidden = (grad @ up.T.contiguous().T).mul_(ctx.scale)
        return (
            grads[0],
            (grad_hidden @ down).view(input.shape) if need_input else None,
            grad_hidden.T @ input.reshape(-1, input.shape[-1]) if need_down else None,
            (hidden.T @ grad).mul_(ctx.scale).T if need_up else None,
            None,
            None,
        )
