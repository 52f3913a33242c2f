"""Sliding windows and attention chunks: which earlier positions a token may see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.types import Chain


@dataclass(frozen=True, slots=True)
class AttentionWindow:
    """Which earlier positions a token sees: the last `size` (sliding) or those of its own block of
    `size` (chunked).
    """

    size: int
    chunked: bool

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """[queries, keys] booleans from the positions of both."""
        if self.chunked:
            return query[:, None] // self.size == key[None] // self.size
        return key[None] > query[:, None] - self.size


def chain_mask(chain: Chain, window: AttentionWindow | None, device: torch.device | str) -> Tensor:
    """[n, ancestors + n] booleans: which keys each token of the chain sees."""
    rows = chain.end - chain.start
    above = sum(end - start for start, end in chain.prefix)
    query = torch.arange(above, above + rows, device=device)
    key = torch.arange(above + rows, device=device)
    allowed = key[None] <= query[:, None]
    if window is not None:
        allowed &= window.allowed(query, key)
    return allowed
