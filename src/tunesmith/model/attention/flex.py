"""Tree attention on GPU with torch's FlexAttention (arXiv 2412.05496): one fused kernel for all
chains.

Token k is seen by token q exactly when k <= q < visible_until[k]. Blocks of keys that no token of a
block of queries sees are left out, and those that all of them see are not masked. Which these are
follows from each block's least and largest `visible_until`, so no [T, T] mask is ever made.

Letters: H query heads, K key/value heads, T packed tokens, D head size, N blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from tunesmith.model.attention.layout_cache import LayoutCache
from tunesmith.model.attention.parity import Fused
from tunesmith.model.attention.window import AttentionWindow
from tunesmith.transfer import to_device
from tunesmith.types import Layout

BLOCK = 128
KINDS = 4
"""Masks that are kept: of a micro-batch's layers with and without a window, and of one more."""

_masks: LayoutCache[BlockMask] = LayoutCache(KINDS)


def flex_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: AttentionWindow | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[1, H, T, D]; query [1, H, T, D], key and value [1, K, T, D], sinks [H].

    A sink is one more logit without a value: it scales the output by sigmoid(log-sum-exp - sink).
    """
    found = _kernel(query.device.type)(
        query.contiguous(), key.contiguous(), value.contiguous(),
        score_mod=_capped(softcap) if softcap else None,
        block_mask=block_mask(layout, window, query.device), scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )  # fmt: skip
    if sinks is None:
        return found
    output, more = found
    share = torch.sigmoid(more.lse.float() - sinks.float().reshape(1, -1, 1))
    return (output.float() * share.unsqueeze(-1)).to(output.dtype)


@functools.cache
def _kernel(device: str) -> Any:
    # uncompiled it makes whole scores, which only tests on a CPU may want
    return flex_attention if device == "cpu" else torch.compile(flex_attention)


@functools.cache
def _capped(softcap: float) -> Any:
    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return cap


def block_mask(layout: Layout, window: AttentionWindow | None, device: torch.device) -> BlockMask:
    """Which blocks of keys each block of queries looks at, and what it sees inside of them; made
    once for all layers of a micro-batch.
    """
    return _masks.get(layout, (window, device), lambda: _block_mask(layout, window, device))


def _block_mask(layout: Layout, window: AttentionWindow | None, device: torch.device) -> BlockMask:
    total = len(layout.position)
    missing = -total % BLOCK
    until = np.pad(layout.visible_until, (0, missing))  # tokens past the end are seen by nobody
    position = np.pad(layout.position, (0, missing), mode="edge")
    seen, whole = _blocks(until.reshape(-1, BLOCK), position.reshape(-1, BLOCK), window)
    number, indices = _ordered(seen & ~whole, device)
    whole_number, whole_indices = _ordered(whole, device)
    return BlockMask.from_kv_blocks(
        number, indices, whole_number, whole_indices, BLOCK_SIZE=BLOCK,
        mask_mod=_rule(to_device(until, device), to_device(position, device), window),
        seq_lengths=(total, total),
    )  # fmt: skip


def _blocks(until: Any, position: Any, window: AttentionWindow | None) -> tuple[Any, Any]:
    """[N, N] booleans, queries by keys, from [N, BLOCK]: blocks with a pair that may be visible,
    and those of which all pairs are.
    """
    number = np.arange(len(until))
    first = number[:, None] * BLOCK
    seen = (number[None] <= number[:, None]) & (until.max(1)[None] > first)
    whole = (number[None] < number[:, None]) & (until.min(1)[None] >= first + BLOCK)
    if window is None:
        return seen, whole
    newest, oldest = position.max(1)[None], position.min(1)[:, None]
    if window.chunked:
        near = newest // window.size >= oldest // window.size
    else:
        near = newest > oldest - window.size
    return seen & near, np.zeros_like(whole)


def _ordered(blocks: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """[1, 1, N] how many, and [1, 1, N, N] which ones first."""
    number = to_device(blocks.sum(1).astype(np.int32), device)
    indices = to_device(np.argsort(~blocks, axis=1, kind="stable").astype(np.int32), device)
    return number[None, None], indices[None, None]


def _rule(until: Tensor, position: Tensor, window: AttentionWindow | None) -> Any:
    def seen(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < until[key])

    if window is None:
        return seen
    size, chunked = window.size, window.chunked

    def near(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        one, other = position[query], position[key]
        close = one // size == other // size if chunked else other > one - size
        return seen(b, h, query, key) & close

    return near


FLEX = Fused(
    "FlexAttention", flex_tree_attention, branches=True, instead="chains are computed one by one"
)
