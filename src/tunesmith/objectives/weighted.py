"""Losses that weight each target's log-likelihood by what the model makes of it at the moment, with
no gradient through the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.objectives.chunk import Chunk
from tunesmith.objectives.nll import cross_entropy

TOP = 20
"""How many of the likeliest tokens `eaft` takes the entropy of."""

ENTROPY_SCALE = 3.0
"""About log(20), the largest entropy that 20 tokens can have."""


def dft(chunk: Chunk, *, smoothing: float = 0.0) -> Tensor:
    """-p(target) * log p(target), p without gradient (Wu et al., arXiv 2508.05629)."""
    return _weighted(chunk, chunk.logprob.detach().exp(), smoothing)


def eaft(chunk: Chunk, *, alpha: float = 1.0, smoothing: float = 0.0) -> Tensor:
    """-h^alpha * log p(target), h the entropy of the 20 likeliest tokens, renormalised, over 3, no
    gradient (arXiv 2601.02151).
    """
    with torch.no_grad():
        top = chunk.logits.topk(min(TOP, chunk.logits.shape[1]), -1).values
        log_p = top.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
    return _weighted(chunk, (entropy / ENTROPY_SCALE) ** alpha, smoothing)


def _weighted(chunk: Chunk, grad_weight: Tensor, smoothing: float) -> Tensor:
    chunk.note("mean_weight", grad_weight)
    chunk.set_grad_weight(grad_weight)
    return grad_weight * cross_entropy(chunk, smoothing)
