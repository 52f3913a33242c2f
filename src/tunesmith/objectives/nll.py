"""Negative log-likelihood, the loss of supervised fine-tuning, and label smoothing."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.objectives.chunk import Chunk


def nll(chunk: Chunk) -> Tensor:
    """-log p(target)."""
    chunk.set_grad_weight(torch.ones_like(chunk.logprob))
    return -chunk.logprob


def cross_entropy(chunk: Chunk, smoothing: float) -> Tensor:
    """-sum over the vocabulary of q * log p, where q is 1 - smoothing on the target plus smoothing
    / V everywhere (Szegedy et al., arXiv 1512.00567).
    """
    if smoothing == 0:
        return -chunk.logprob
    everywhere = chunk.log_sum - chunk.logits.mean(-1)
    return smoothing * everywhere - (1 - smoothing) * chunk.logprob
