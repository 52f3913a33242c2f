"""Causal depthwise convolution along the path of each token (the short convolutions of Mamba, of
linear attention and of LFM2).

The model's own convolution runs over all packed tokens. It is right wherever the tokens before are
those of the path. The few tokens behind a branch point or at the start of a document are computed
again from their own predecessors.

Letters: C channels, T tokens, W width of the convolution, b tokens that are computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.model.attention.layout_cache import LayoutCache
from tunesmith.model.recurrent.levels import run_tree
from tunesmith.types import Layout


@dataclass(frozen=True, slots=True)
class Edges:
    """Tokens within reach of a branch point or of a document's start, and what they look at."""

    tokens: Tensor  # [b]
    sources: Tensor  # [b * W] from the oldest to the token itself; any token where there is none
    absent: Tensor  # [b, W] true where the path has no such token


_EDGES: LayoutCache[Edges] = LayoutCache(8)


def path_convolution(
    convolve: Callable[[Tensor], Tensor],
    layout: Layout,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`convolve(inputs)`, [1, C, T], as if each token's path were alone; weight is [C, W]."""
    output = convolve(inputs)
    edges = path_edges(layout, weight.shape[-1], inputs.device)
    if not len(edges.tokens):
        return output
    seen = inputs[0].index_select(1, edges.sources).view(-1, *edges.absent.shape)
    seen = seen.masked_fill(edges.absent, 0)
    # summed in float32 and rounded once, as kernels do
    redone = (seen.float() * weight.float()[:, None, :]).sum(-1)
    if bias is not None:
        redone = redone + bias.float()[:, None]
    redone = redone.to(weight.dtype)
    if activation is not None:
        redone = activation(redone)
    return output.index_copy(2, edges.tokens, redone[None].to(output.dtype))


def path_edges(layout: Layout, width: int, device: torch.device) -> Edges:
    """The tokens whose last `width` tokens in the micro-batch are not those of their path."""
    return _EDGES.get(layout, (width, device), lambda: _find_edges(layout, width, device))


def _find_edges(layout: Layout, width: int, device: torch.device) -> Edges:
    before = run_tree(layout, device).predecessor.astype(np.int64)
    total = len(before)
    up = np.append(before, -1)  # the token -1 has none before it
    path = [np.arange(total)]
    for _ in range(width - 1):
        path.append(up[path[-1]])
    seen = np.stack(path[::-1], 1)
    packed = np.maximum(np.arange(total)[:, None] + np.arange(1 - width, 1), -1)
    tokens = np.flatnonzero((seen != packed).any(1))
    sources = torch.from_numpy(np.maximum(seen[tokens], 0).ravel())
    absent = torch.from_numpy(seen[tokens] < 0)
    return Edges(torch.from_numpy(tokens).to(device), sources.to(device), absent.to(device))
