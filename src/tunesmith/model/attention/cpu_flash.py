"""Tree attention on CPU from torch's FlashAttention kernels (arXiv 2205.14135), merged by
log-sum-exp: no mask, no copied prefix, gradients added in place.

For a chain with queries q, the scores against its own tokens and against each ancestor span are
softmax-normalised together. With l the log-sum-exp of all of them and o the merged output, each
part's share of the gradient follows from (q, k_part, v_part, o, l) alone (Dao et al., arXiv
2205.14135, appendix B.4), so the kernels' own backward serves every part. A sink is one more logit
without a value: it changes l to logaddexp(l, sink) and scales o.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tunesmith.model.attention.window import AttentionWindow
from tunesmith.model.ops.bf16_upcast import needs_upcast
from tunesmith.types import Chain

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chains: Sequence[Chain],
    *,
    scale: float,
    window: AttentionWindow | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[1, H, T, D] outputs of all chains; query [1, H, T, D], key and value [1, K, T, D], sinks
    [H].
    """
    if needs_upcast(query):
        wide = flash_tree_attention(
            query.float(), key.float(), value.float(), chains,
            scale=scale, window=window, sinks=sinks,
        )  # fmt: skip
        return wide.to(query.dtype)
    return _FlashTree.apply(query, key, value, sinks, tuple(chains), scale, window)  # pyright: ignore


class _FlashTree(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        chains: tuple[Chain, ...],
        scale: float,
        window: AttentionWindow | None,
    ) -> Tensor:
        output = torch.empty(query.shape, dtype=query.dtype)
        log_sum = torch.empty(query.shape[:3], dtype=torch.float32)
        for chain in chains:
            span = slice(chain.start, chain.end)
            queries = query[:, :, span]
            merged: tuple[Tensor, Tensor] | None = None
            for keys, causal, mask in _parts(chain, window):
                part = _forward(
                    queries,
                    key[:, :, keys],
                    value[:, :, keys],
                    0.0,
                    causal,
                    attn_mask=mask,
                    scale=scale,
                )
                merged = part if merged is None else _merge(merged, part)
            assert merged is not None
            out, log = merged
            if sinks is not None:
                with_sink = torch.logaddexp(log, sinks.float().reshape(1, -1, 1))
                out = (out.float() * torch.exp(log - with_sink).unsqueeze(-1)).to(out.dtype)
                log = with_sink
            output[:, :, span] = out
            log_sum[:, :, span] = log
        ctx.save_for_backward(query, key, value, sinks, output, log_sum)
        ctx.chains, ctx.scale, ctx.window = chains, scale, window
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, log_sum = ctx.saved_tensors
        grad_output = grads[0]
        wide = torch.float32 if any(chain.prefix for chain in ctx.chains) else query.dtype
        grad_query = torch.empty(query.shape, dtype=query.dtype)
        grad_key, grad_value = (
            torch.zeros(key.shape, dtype=wide),
            torch.zeros(value.shape, dtype=wide),
        )
        for chain in ctx.chains:
            span = slice(chain.start, chain.end)
            queries, out, log = (
                query[:, :, span],
                output[:, :, span],
                log_sum[:, :, span].contiguous(),
            )
            grad_out, total = grad_output[:, :, span], None
            for keys, causal, mask in _parts(chain, ctx.window):
                q, k, v = _backward(
                    grad_out, queries, key[:, :, keys], value[:, :, keys], out, log, 0.0, causal,
                    attn_mask=mask, scale=ctx.scale,
                )  # fmt: skip
                total = q if total is None else total + q
                grad_key[:, :, keys] += k
                grad_value[:, :, keys] += v
            assert total is not None
            grad_query[:, :, span] = total
        grad_sinks = _sink_gradient(sinks, grad_output, output, log_sum)
        return (
            grad_query,
            grad_key.to(key.dtype),
            grad_value.to(value.dtype),
            grad_sinks,
            None,
            None,
            None,
        )


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (out_a, log_a), (out_b, log_b) = a, b
    log = torch.logaddexp(log_a, log_b)
    share_a, share_b = torch.exp(log_a - log).unsqueeze(-1), torch.exp(log_b - log).unsqueeze(-1)
    return (out_a.float() * share_a + out_b.float() * share_b).to(out_a.dtype), log


def _parts(
    chain: Chain, window: AttentionWindow | None
) -> Iterator[tuple[slice, bool, Tensor | None]]:
    """(keys, causal, additive mask) of each kernel call of a chain: its own tokens first, then its
    ancestors.
    """
    length = chain.end - chain.start
    first = sum(end - start for start, end in chain.prefix)
    span = slice(chain.start, chain.end)
    if window is None:
        yield span, True, None
        for start, end in chain.prefix:
            yield slice(start, end), False, None
        return
    query = torch.arange(first, first + length)
    allowed = window.allowed(query, query) & (query[None] <= query[:, None])
    yield span, False, _additive(allowed)
    position = 0
    for start, end in chain.prefix:
        allowed = window.allowed(query, torch.arange(position, position + end - start))
        position += end - start
        if bool(allowed.any()):
            yield slice(start, end), False, _additive(allowed)


def _additive(allowed: Tensor) -> Tensor:
    # a finite floor: a row that sees nothing of this part gets a log-sum-exp so low that its share
    # is exactly zero
    return torch.zeros(allowed.shape).masked_fill_(~allowed, -1e30)


def _sink_gradient(
    sinks: Tensor | None, grad_output: Tensor, output: Tensor, log_sum: Tensor
) -> Tensor | None:
    if sinks is None:
        return None
    delta = (grad_output.float() * output.float()).sum(-1)
    share = torch.exp(sinks.float().reshape(1, -1, 1) - log_sum)
    return -(share * delta).sum((0, 2)).to(sinks.dtype)
