"""Packed attention with FlashAttention's varlen kernels (cu_seqlens), for layouts without branches.

A layout without branches is what these kernels were made for: they know where each document begins
and need no mask. The one of the package flash-attn is taken where it is installed, else torch's
own. What has branches goes to FlexAttention (`flex.py`).

Letters: H query heads, K key/value heads, T packed tokens, D head size, N documents.
"""

from __future__ import annotations

import importlib
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from tunesmith.model.attention.layout_cache import LayoutCache
from tunesmith.model.attention.parity import AttentionFeatures, Fused
from tunesmith.model.attention.window import AttentionWindow
from tunesmith.transfer import to_device
from tunesmith.types import Layout

DTYPES = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 256
HEAD_STEP = 8
"""Of the flash kernels: other precisions and head sizes they refuse."""
HOPPER = 9
"""Major compute capability of the chips that flash-attn's third version is for."""

_starts_kept: LayoutCache[Tensor] = LayoutCache(2)


def varlen_kernels(query: Tensor, layout: Layout, asked: AttentionFeatures) -> tuple[Fused, ...]:
    """Those that know of all that this attention asks for, best first; query [1, H, T, D]."""
    width = query.shape[-1]
    fits = query.dtype in DTYPES and width <= WIDEST_HEAD and width % HEAD_STEP == 0
    if not fits or asked.blocks or asked.sinks or not is_flat(layout):
        return ()
    builtin = () if asked.softcap else (VARLEN,)
    package = _flash_attn(query.device)
    return builtin if package is None else (package, *builtin)


def is_flat(layout: Layout) -> bool:
    """Whether no chain continues another."""
    return not any(chain.prefix for chain in layout.chains)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: AttentionWindow | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    package: str | None = None,
) -> Tensor:
    """[1, H, T, D]; query [1, H, T, D], key and value [1, K, T, D]. By torch's kernel, without soft
    caps, or by that of a package; sinks by neither.
    """
    assert sinks is None
    # a window of `size` tokens holds the token itself, which the kernels do not count
    reach = (-1, 0) if window is None else (window.size - 1, 0)
    starts, longest = _starts(layout, query.device), _longest(layout)
    rows: list[Any] = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    ends: Any = (starts, starts, longest, longest)
    if package is not None:
        found = importlib.import_module(package).flash_attn_varlen_func(
            *rows, *ends, softmax_scale=scale, causal=True, window_size=reach,
            softcap=softcap or 0.0, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    else:
        assert softcap is None
        kernel: Any = varlen_attn
        found = kernel(
            *rows, *ends, scale=scale, window_size=reach,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    assert isinstance(found, Tensor)
    return found.transpose(0, 1).unsqueeze(0)


def _longest(layout: Layout) -> int:
    return max(chain.end - chain.start for chain in layout.chains)


def _starts(layout: Layout, device: torch.device) -> Tensor:
    """[N + 1] where each document begins, and the end; made once for all layers."""

    def make() -> Tensor:
        ends = [0, *(chain.end for chain in layout.chains)]
        return to_device(np.array(ends, np.int32), device)

    return _starts_kept.get(layout, device, make)


VARLEN = Fused(
    "torch's varlen attention", varlen_attention, branches=False,
    instead="documents side by side are treated like those with branches",
)  # fmt: skip


@cache
def _flash_attn(device: torch.device) -> Fused | None:
    """The package flash-attn as installed here, for this device."""
    third = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER
    for name in ("flash_attn_interface", "flash_attn")[not third :]:
        if find_spec(name) is not None:
            attend = partial(varlen_attention, package=name)
            return Fused(name, attend, branches=False, instead="torch's own kernels are")
    return None
