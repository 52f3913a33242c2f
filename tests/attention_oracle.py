"""Attention by its definition: a softmax over one mask [T, T]; it knows of no chains."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.types import Layout


def visible(layout: Layout, *, size: int | None = None, chunked: bool = False) -> Tensor:
    """[T, T] booleans by the definition of `visible_until` and of windows; no chains."""
    total = len(layout.position)
    mask = torch.zeros(total, total, dtype=torch.bool)
    for query in range(total):
        for key in range(query + 1):
            at, to = int(layout.position[query]), int(layout.position[key])
            near = size is None or (at // size == to // size if chunked else to > at - size)
            mask[query, key] = near and query < int(layout.visible_until[key])
    return mask


def softmax_over_mask(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The attention of each query [1, heads, T, width] to what its row of the mask shows."""
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for head in range(query.shape[1]):
        scores = scale * query[0, head] @ key[0, head // groups].T
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp() * mask
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + sinks[head].exp()
        outputs.append(weights / total @ value[0, head // groups])
    return torch.stack(outputs, 1)[None]
