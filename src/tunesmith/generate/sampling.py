"""Sampling of the next token with one random generator for each row.

The transformers loop takes the arg max of the scores it is given. Adding independent standard
Gumbel noise to log-probabilities makes that arg max a draw from them (Gumbel 1954; Maddison et al.,
arXiv 1411.0030), so sampling needs no loop of its own and no global random state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class RowSampler(LogitsProcessor):
    """Turns scores [B, V] into ones whose arg max is a sample at `temperature` from the nucleus
    `top_p`.

    Row b draws from a generator of its own, seeded by `seed` and `rows[b]`.
    """

    def __init__(self, rows: Sequence[int], *, temperature: float, top_p: float, seed: int) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self.generators = [torch.Generator().manual_seed(_mixed(seed, row)) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_p = torch.log_softmax(scores.float() / self.temperature, -1)
        log_p = _nucleus(log_p, self.top_p)
        # Drawn on the CPU, so that a row's numbers are the same on every device.
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])
        exponential = -torch.log(uniform.clamp_min(1e-20)).to(scores.device)
        return log_p - torch.log(exponential.clamp_min(1e-20))


def _nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """Only the fewest, most likely tokens whose probabilities reach `top_p` stay possible."""
    if top_p >= 1:
        return log_p
    ordered, order = log_p.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    outside = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return log_p.masked_fill(outside, float("-inf"))


def _mixed(seed: int, row: int) -> int:
    """A seed of 63 bits from two numbers; neighbours are far apart (multiplicative hashing)."""
    return (seed * 0x9E3779B97F4A7C15 + (row + 1) * 0xD1B54A32D192ED03) % (1 << 63)
