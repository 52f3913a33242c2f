"""The chunked loss head: hidden states in, sums of losses out, logits of a few targets at a time,
never [N, V].

Invariant: loss and gradients equal those of `objective(logits(hidden[source] @ W.T + b))` summed
with the weights, while no more than a chunk of logits exists at once and positions without a target
cost nothing. Each chunk's gradients are taken while its logits are there, so the vocabulary
is gone through once: three matrix products in all.

Letters: T packed tokens, N targets, n targets of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from tunesmith.objectives.losses import Chunk, Objective, make_chunk
from tunesmith.types import LossOutput

Transform = Callable[[Tensor], Tensor]
"""What a model does to its raw logits (soft cap, scale), elementwise."""

CHUNK_BYTES = 64 * 2**20
CHUNK_ROWS = 256
"""A chunk holds so many bytes of logits, but these rows at least: products of fewer are slow."""

STATS = ("accuracy", "entropy", "logprob")
"""What is reported whatever the objective."""


class ReferenceHidden(NamedTuple):
    """What the base model makes of the same tokens: hidden states, and the head over them."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


@dataclass(frozen=True, slots=True)
class ObjectiveInputs:
    """What some objectives need besides the logits."""

    progress: float = 0.0  # share of the run's steps that are done
    old_logprob: Tensor | None = None  # [N]
    reference: ReferenceHidden | None = None


@dataclass(slots=True)
class _HeadCall:
    """What one call of the head is about, and what it finds besides the sum."""

    target: Tensor
    target_weight: Tensor
    objective: Objective
    transform: Transform | None
    rows: int
    progress: float
    old_logprob: Tensor | None
    reference: ReferenceHidden | None  # its hidden states gathered: [N, D]
    token_loss: Tensor
    log_effective_weight: Tensor
    stats: dict[str, Tensor]

    def logits(self, part: slice, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Raw products of the head, [n, V] in float32 (float64 stays)."""
        raw = hidden[part] @ weight.T
        if bias is not None:
            raw += bias
        return raw if raw.dtype == torch.float64 else raw.float()

    def chunk(self, part: slice, logits: Tensor) -> Chunk:
        base = None
        if self.reference is not None:
            with torch.no_grad():
                base = self.logits(part, *self.reference)
                base = base if self.transform is None else self.transform(base)
        old = None if self.old_logprob is None else self.old_logprob[part]
        return make_chunk(
            logits, self.target[part], progress=self.progress, old_logprob=old, base_logits=base
        )

    def take(self, part: slice, chunk: Chunk, loss: Tensor) -> None:
        """Note the chunk's losses and statistics."""
        weight = self.target_weight[part]
        self.token_loss[part] = loss.detach()
        surprise = -chunk.logprob.detach()
        if chunk.grad_weight is not None:
            self.log_effective_weight[part] = surprise + chunk.grad_weight.log()
        else:
            self.log_effective_weight[part] = torch.nan
        values = {
            "accuracy": chunk.argmax == chunk.target,
            "entropy": chunk.entropy.detach(),
            "logprob": -surprise,
            **chunk.notes,
        }
        for name, value in values.items():
            added = (weight * value).sum()
            self.stats[name] = self.stats.get(name, 0.0) + added


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
    inputs: ObjectiveInputs | None = None,
    chunk_bytes: int | None = None,
) -> LossOutput:
    """Sum of weight * loss over the targets, with stats, never holding [N, V].

    Shapes: hidden [T, D], weight [V, D], bias [V], source, target and target_weight [N].
    `chunk_bytes` bounds the float32 logits held at once, in place of the usual choice.
    """
    inputs = inputs or ObjectiveInputs()
    if not torch.is_grad_enabled():
        # a custom function would else be asked for gradients of parameters that could have some
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    # index_select and not hidden[source]: its backward adds repeated sources in a fixed order
    gathered = hidden.index_select(0, source)
    base = inputs.reference and inputs.reference._replace(
        hidden=inputs.reference.hidden.index_select(0, source)
    )
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    work = _HeadCall(
        target=target,
        target_weight=target_weight.to(dtype),
        objective=objective,
        transform=transform,
        rows=_chunk_rows(len(weight), chunk_bytes),
        progress=inputs.progress,
        old_logprob=inputs.old_logprob,
        reference=base,
        token_loss=torch.empty(len(target), dtype=dtype, device=hidden.device),
        log_effective_weight=torch.empty(len(target), dtype=dtype, device=hidden.device),
        stats={name: torch.zeros((), dtype=dtype, device=hidden.device) for name in STATS},
    )
    loss_sum = cast(
        Tensor,
        _HeadLoss.apply(gathered, weight, bias, work),  # pyright: ignore[reportUnknownMemberType]
    )
    return LossOutput(
        loss_sum=loss_sum,
        weight_sum=work.target_weight.sum(),
        token_loss=work.token_loss,
        stats=work.stats,
        log_effective_weight=work.log_effective_weight,
    )


class _HeadLoss(torch.autograd.Function):
    """Forward computes the gradients too (for an incoming gradient of 1); backward only scales
    them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _HeadCall):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype = work.token_loss.dtype
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = (
            torch.zeros(weight.shape[0], dtype=dtype, device=weight.device) if need_bias else None
        )
        for start in range(0, len(work.target), work.rows):
            part = slice(start, start + work.rows)
            raw = work.logits(part, hidden, weight, bias)
            grad = _through(raw, part, work, differentiate=any(ctx.needs_input_grad))
            if grad is None:
                continue
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if need_weight:
                grad_weight = _plus_product(grad_weight, grad, hidden[part], dtype)
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=dtype)
            del raw, grad  # before the next chunk's are made
        if need_weight and grad_weight is None:
            grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return (work.token_loss * work.target_weight).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale),
            None if grad_weight is None else grad_weight.mul_(scale),
            None if grad_bias is None else grad_bias.mul_(scale),
            None,
        )


def _through(raw: Tensor, part: slice, work: _HeadCall, *, differentiate: bool) -> Tensor | None:
    """Notes loss and statistics of a chunk; its gradient in the raw logits [n, V]."""
    with torch.set_grad_enabled(differentiate):
        leaf = raw.requires_grad_(differentiate)
        chunk = work.chunk(part, leaf if work.transform is None else work.transform(leaf))
        loss = work.objective(chunk)
        work.take(part, chunk, loss)
        if not differentiate:
            return None
        (grad,) = torch.autograd.grad(loss, leaf, work.target_weight[part])
    return grad


def _plus_product(total: Tensor | None, grad: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """total + grad.T @ hidden in `dtype`, in place."""
    if total is None:
        return (grad.T @ hidden).to(dtype)
    if grad.dtype == dtype:
        return total.addmm_(grad.T, hidden)
    total += grad.T @ hidden
    return total


def _chunk_rows(vocabulary: int, chunk_bytes: int | None) -> int:
    if chunk_bytes is None:
        return max(CHUNK_ROWS, CHUNK_BYTES // (4 * vocabulary))
    return max(1, chunk_bytes // (4 * vocabulary))


@torch.no_grad()
def argmax_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    source: Tensor,
    transform: Transform | None = None,
    **_: Any,
) -> Tensor:
    """The id [N] that the model itself would go on with after each source."""
    gathered = hidden.index_select(0, source)
    rows = _chunk_rows(len(weight), None)
    found: list[Tensor] = []
    for start in range(0, len(gathered), rows):
        raw = gathered[start : start + rows] @ weight.T
        raw = raw if bias is None else raw + bias
        found.append((raw if transform is None else transform(raw.float())).argmax(-1))
    return torch.cat(found) if found else source
