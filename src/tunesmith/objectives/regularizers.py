"""Terms that go on top of any loss."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tunesmith.objectives.chunk import Chunk


def z_loss(chunk: Chunk) -> Tensor:
    """log_sum squared: keeps the logits from drifting (Chowdhery et al., arXiv 2204.02311)."""
    return chunk.log_sum.square()


def divergence(chunk: Chunk) -> Tensor:
    """KL(base || model) in nats over the whole vocabulary; overwrites `chunk.base_logits`."""
    assert chunk.base_logits is not None, "the base model's logits were not asked for"
    found = cast(
        Tensor,
        _Divergence.apply(  # pyright: ignore[reportUnknownMemberType]
            chunk.logits, chunk.log_sum, chunk.base_logits
        ),
    )
    chunk.base_logits = None
    chunk.note("kl", found)
    return found


class _Divergence(torch.autograd.Function):
    """sum q * (log q - logits + log_sum): d logits = -q, d log_sum = 1."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_sum: Tensor, base: Tensor) -> Tensor:
        q = torch.softmax(base, -1)
        base -= base.logsumexp(-1, keepdim=True)
        base -= logits
        base += log_sum[:, None]
        ctx.save_for_backward(q)
        return torch.bmm(q[:, None], base[:, :, None]).view(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (q,) = ctx.saved_tensors
        return q.mul_(-grads[0][:, None]), grads[0], None
