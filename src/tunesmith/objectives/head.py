"""The loss head: hidden states in, sums of losses out, logits of a few targets at a time.

Invariant: loss and gradients equal those of `objective(logits(hidden[source] @ W.T + b))` summed
with the weights, while no more than `CHUNK_BYTES` of logits exist at once and positions without a
target cost nothing. Each chunk's gradients are taken while its logits are there, so the vocabulary
is gone through once: three matrix products in all.

Letters: T packed tokens, N targets, n targets of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from tunesmith.types import LossOutput

Objective = Callable[[Tensor, Tensor], Tensor]
"""A loss: (logits [n, V] float32, target [n]) -> loss of each target [n], differentiable in the
logits.
"""

Transform = Callable[[Tensor], Tensor]
"""What a model does to its raw logits (soft cap, scale), elementwise."""

CHUNK_BYTES = 64 * 2**20
STATS = ("accuracy", "entropy", "logprob")


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    source: Tensor,
    target: Tensor,
    target_weight: Tensor,
    objective: Objective,
    transform: Transform | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> LossOutput:
    """Sum of weight * loss over the targets, with stats, never holding [N, V].

    Shapes: hidden [T, D], weight [V, D], bias [V], source, target and target_weight [N].
    """
    # index_select and not hidden[source]: its backward adds repeated sources in a fixed order
    gathered = hidden.index_select(0, source)
    rows = max(1, chunk_bytes // (4 * weight.shape[0]))
    loss_sum, token_loss, stats = cast(
        "tuple[Tensor, Tensor, Tensor]",
        _HeadLoss.apply(  # pyright: ignore[reportUnknownMemberType]
            gathered, weight, bias, target, target_weight, objective, transform, rows
        ),
    )
    return LossOutput(
        loss_sum=loss_sum,
        weight_sum=target_weight.sum(),
        token_loss=token_loss,
        stats=dict(zip(STATS, stats.unbind(), strict=True)),
    )


class _HeadLoss(torch.autograd.Function):
    """Forward computes the gradients too (for an incoming gradient of 1); backward only scales
    them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        target_weight: Tensor,
        objective: Objective,
        transform: Transform | None,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            if need_weight
            else None
        )
        grad_bias = (
            torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
            if need_bias
            else None
        )
        token_loss = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
        stats = torch.zeros(len(STATS), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(target), rows):
            part = slice(start, start + rows)
            grad, token_loss[part] = _chunk(
                hidden[part], weight, bias, target[part], target_weight[part],
                objective=objective, transform=transform, stats=stats,
                differentiate=any(ctx.needs_input_grad),
            )  # fmt: skip
            if grad is None:
                continue
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad, hidden[part])
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(token_loss, stats)
        return (token_loss * target_weight).sum(), token_loss, stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale),
            None if grad_weight is None else grad_weight.mul_(scale),
            None if grad_bias is None else grad_bias.mul_(scale),
            None, None, None, None, None,
        )  # fmt: skip


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_weight: Tensor,
    *,
    objective: Objective,
    transform: Transform | None,
    stats: Tensor,
    differentiate: bool,
) -> tuple[Tensor | None, Tensor]:
    """(gradient of the raw logits [n, V] or None, loss [n]); adds to `stats`."""
    raw = hidden @ weight.T
    if bias is not None:
        raw += bias
    raw = raw.float()
    with torch.enable_grad():
        leaf = raw.requires_grad_(differentiate)
        logits = leaf if transform is None else transform(leaf)
        loss = objective(logits, target)
        stats += _stats(logits.detach(), target, target_weight)
        if not differentiate:
            return None, loss
        (grad,) = torch.autograd.grad(loss, leaf, target_weight)
    return grad, loss.detach()


def _stats(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of: the target is the likeliest, entropy in nats, log-probability of the
    target.
    """
    log_sum = logits.logsumexp(-1)
    chosen = logits.gather(1, target[:, None]).squeeze(1)
    expected = (torch.softmax(logits, -1) * logits).sum(-1)
    correct = (logits.argmax(-1) == target).float()
    return torch.stack(
        [(weight * s).sum() for s in (correct, log_sum - expected, chosen - log_sum)]
    )


def _add_product(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total += grad.T @ hidden, in float32."""
    if grad.dtype == torch.float32:
        total.addmm_(grad.T, hidden)
    else:
        total += grad.T @ hidden
