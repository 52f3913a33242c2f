"""The attention function registered with transformers' AttentionInterface; every decoder calls it
with the layout as a keyword.

On CUDA it is one kernel, for documents side by side (`varlen.py`) or with a block mask (`flex.py`),
where a trial shows that it is right there (`attention_trial.py`).
On a CPU each chain of the layout is one causal call over its own tokens plus one unmasked call
against each span of its ancestors; the partial results are merged by their log-sum-exp, which is
exact (Milakov and Gimelshein, arXiv 1805.02867, section 3.1). The backward of each part uses the
merged output and log-sum-exp, so it needs no mask either.

Letters: B = 1, H query heads, K key/value heads, T packed tokens, D head size, n tokens of a chain.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.model.attention.cpu_flash import flash_tree_attention
from tunesmith.model.attention.parity import AttentionFeatures, Fused, agrees
from tunesmith.model.attention.window import AttentionWindow, chain_mask
from tunesmith.types import Chain, Layout

NAME = "tunesmith"


@dataclass(frozen=True, slots=True)
class MaskRule:
    """What a layer's mask allows besides the layout: how far back a token sees. None: to the start
    of its path.
    """

    local_size: int | None


def register(*, apart: bool = False) -> None:
    """Make `attn_implementation="tunesmith"` known to transformers; `apart`: from now on as what
    torch's compiler leaves out of its graphs.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    apart = apart or _kept_apart.cache_info().currsize > 0
    AttentionInterface.register(NAME, _kept_apart() if apart else layout_attention)
    AttentionMaskInterface.register(NAME, _mask_rule)


@functools.cache
def _kept_apart() -> Any:
    return torch.compiler.disable(layout_attention)  # imports the compiler, which takes seconds


def _mask_rule(*_: Any, local_size: int | None = None, **__: Any) -> MaskRule:
    # transformers' own mask function must not be evaluated: it counts packed rows, not positions of
    # a path
    return MaskRule(local_size)


def layout_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each packed token to its ancestors and itself.

    Shapes: query [1, H, T, D], key and value [1, K, T, D]; returns [1, T, H, D]. Where ranks share
    the tokens these are of this rank's, and what is between is of all tokens and some heads.

    Raises:
        ModelError: the model did not hand the layout down, or asks for what this function can't
        honour.
    """
    if layout is None:
        raise ModelError("this architecture does not hand keyword arguments down to its attention")
    if dropout and module.training:
        raise ModelError("attention dropout is on; set it to 0 in the model's config")
    window = _window(module, attention_mask, sliding_window, layout)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout.shard is not None:
        query, key, value = layout.shard.seq_to_heads(query, key, value)
        s_aux = None if s_aux is None else layout.shard.local_heads(s_aux)
    alike = value.shape[-1] == query.shape[-1] and query.dtype != torch.float64  # kernels' limits
    options: dict[str, Any] = {"window": window, "scale": scale, "sinks": s_aux}
    fused = _fused(query, layout, softcap, options) if alike and query.is_cuda else None
    if fused is not None:
        output = fused.attend(query, key, value, layout, softcap=softcap, **options)
    elif softcap or not alike or query.device.type != "cpu":
        output = _plain(query, key, value, layout, softcap=softcap, **options)
    else:
        output = flash_tree_attention(query, key, value, layout.chains, **options)
    if layout.shard is not None:
        output = layout.shard.heads_to_seq(output)
    return output.transpose(1, 2).contiguous(), None


def _fused(
    query: Tensor, layout: Layout, softcap: float | None, options: dict[str, Any]
) -> Fused | None:
    """The kernel for this attention on a GPU, if a trial there shows it right."""
    from tunesmith.model.attention.flex import FLEX
    from tunesmith.model.attention.varlen import varlen_kernels

    window, sinks = options["window"], options["sinks"]
    asked = AttentionFeatures(
        window=window is not None and not window.chunked,
        blocks=window is not None and window.chunked,
        softcap=bool(softcap),
        sinks=sinks is not None,
    )
    for kernel in (*varlen_kernels(query, layout, asked), FLEX):
        if agrees(kernel, _plain, asked, device=query.device, dtype=query.dtype):
            return kernel
    return None


def _window(
    module: nn.Module, rule: Any, sliding_window: int | None, layout: Layout
) -> AttentionWindow | None:
    size = rule.local_size if isinstance(rule, MaskRule) else None
    if sliding_window is not None and sliding_window != size:
        raise ModelError(f"the layer asks for a window of {sliding_window}, its mask for {size}")
    if size is None or int(layout.position.max(initial=0)) < size:
        return None
    kinds = getattr(module.config, "layer_types", None) or []
    return AttentionWindow(size, chunked="chunked_attention" in kinds)


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    window: AttentionWindow | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Chain by chain in elementary operations: any device, softcap, sinks, unequal head sizes."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outputs: list[Tensor] = []
    for chain in layout.chains:
        outputs.append(
            _plain_chain(
                query,
                key,
                value,
                chain,
                window=window,
                scale=scale,
                softcap=softcap,
                sinks=sinks,
            )
        )
    return torch.cat(outputs, 2)


def _plain_chain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chain: Chain,
    *,
    window: AttentionWindow | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    spans = [*chain.prefix, (chain.start, chain.end)]
    queries = query[:, :, chain.start : chain.end]
    keys = torch.cat([key[:, :, a:b] for a, b in spans], 2)
    values = torch.cat([value[:, :, a:b] for a, b in spans], 2)
    if softcap is None and sinks is None and window is None and not chain.prefix:
        return nn.functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale
        )
    allowed = chain_mask(chain, window, query.device)
    if softcap is None and sinks is None:
        return nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=allowed, scale=scale
        )
    scores = (queries @ keys.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.float().reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return weights.to(values.dtype) @ values
