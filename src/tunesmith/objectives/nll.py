"""Negative log-likelihood, the loss of supervised fine-tuning: -log p(target)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def nll(logits: Tensor, target: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each row. Shapes: logits [n, V] float32, target [n]; returns
    [n].
    """
    return functional.cross_entropy(logits, target, reduction="none")
