"""Attention by its definition: a softmax over one mask [T, T]; it knows of no chains."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.types import Chain, Layout

TREE = (
    (7, ()),
    (12, (0,)),
    (5, (0, 1)),
    (1, (0, 1)),
    (9, (0,)),
    (3, ()),
    (21, ()),
)
"""Segments as (tokens, ancestors): two levels of branches, then two more documents."""


def make_layout(tree: Any = TREE) -> Layout:
    ends = np.cumsum([length for length, _ in tree])
    spans = [(int(end) - length, int(end)) for end, (length, _) in zip(ends, tree, strict=True)]
    chains, position = [], []
    for (start, end), (length, above) in zip(spans, tree, strict=True):
        first = sum(tree[number][0] for number in above)
        chains.append(Chain(start, end, tuple(spans[number] for number in above)))
        position += range(first, first + length)
    total = len(position)
    until = np.zeros(total, np.int32)
    for number, (start, end) in enumerate(spans):
        last = max(e for n, (_, e) in enumerate(spans) if n == number or number in tree[n][1])
        until[start:end] = last
    return Layout(tuple(chains), until, np.array(position, np.int32))


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
