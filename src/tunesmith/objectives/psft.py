"""Proximal supervised fine-tuning (arXiv 2508.17784)."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.objectives.chunk import Chunk


def psft(chunk: Chunk, *, eps_low: float = 0.2, eps_high: float = 0.28) -> Tensor:
    """-min(r, clip(r, 1 - eps_low, 1 + eps_high)), r = p(target) / p at the start of the outer
    batch.

    The lower bound never binds, for the minimum takes the ratio there: as long as a demonstrated
    token becomes less likely it is learned from in full. The share of such targets is reported.
    Without `old_logprob` the policy is its own start, and the gradient that of nll.
    """
    old = chunk.logprob.detach() if chunk.old_logprob is None else chunk.old_logprob
    ratio = (chunk.logprob - old).exp()
    clipped = ratio.detach() > 1 + eps_high
    chunk.note("clipped", clipped.float())
    chunk.note("fallen", (ratio.detach() < 1 - eps_low).float())
    chunk.set_grad_weight(ratio.detach().masked_fill(clipped, 0.0))
    return -torch.minimum(ratio, ratio.clamp(1 - eps_low, 1 + eps_high))
