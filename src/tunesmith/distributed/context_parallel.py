"""Context parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): all-to-all between sequence shards and
head shards.

Each rank of a group holds a shard of the tokens for everything that computes one token at a time:
norms, feed-forward layers, head and loss. Before attention, an all-to-all turns sequence shards of
queries, keys and values into head shards; after it, a second one turns the outputs back. Attention
therefore sees the whole layout, so packing and prefix trees stay exact.

Invariant: a rank computes the loss of its own targets, and the backward of one all-to-all is the
other. So gradients summed over all ranks are the gradients of the whole step.

Shape legend: N ranks of a group, T tokens of the layout, t = T / N of a rank, H heads, h = H / N of
a rank, K key/value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tunesmith.distributed.model_parallel_group import ModelParallelGroup
from tunesmith.errors import ModelError
from tunesmith.types import Chain, Layout


@dataclass(frozen=True, slots=True)
class ContextParallel(ModelParallelGroup):
    """The ranks over which the tokens of a micro-batch are sharded. A group of one holds all
    tokens.

    Without a process `group`, communication is simulated for memory measurements: messages have
    their true sizes, and this rank's own values stand for those of the others.
    """

    def shard(self, layout: Layout) -> Layout:
        """The layout with its tokens cut into N shards of equal length.

        Up to N - 1 padding tokens are appended. Each sees only itself, and no other token sees it.
        """
        total = len(layout.position)
        size = -(-total // self.size)
        added = np.arange(total, size * self.size, dtype=np.int32)
        return replace(
            layout,
            chains=(*layout.chains, *(Chain(n, n + 1, ()) for n in added.tolist())),
            visible_until=np.concatenate([layout.visible_until, added + 1]),
            position=np.concatenate([layout.position, np.zeros_like(added)]),
            shard=UlyssesShard(self, slice(self.rank * size, (self.rank + 1) * size)),
        )


@dataclass(frozen=True, slots=True)
class UlyssesShard:
    """This rank's shard of a layout's tokens, and its two all-to-all exchanges for attention."""

    cp: ContextParallel
    local: slice

    def seq_to_heads(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[1, H, t, D] of this rank's tokens to [1, h, T, D] of its heads.

        Where N does not divide K, key and value heads are repeated up to the least common multiple
        of N and K. That number divides H, because N and K both do.

        Raises:
            ModelError: N does not divide H.
        """
        count, groups = self.cp.size, key.shape[1]
        if query.shape[1] % count:
            raise uneven_heads(query.shape[1], count)
        times = math.lcm(groups, count) // groups
        if times > 1:
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        return cast(
            "tuple[Tensor, Tensor, Tensor]", self._all_to_all(query, key, value, to_heads=True)
        )

    def heads_to_seq(self, output: Tensor) -> Tensor:
        """[1, h, T, D] back to [1, H, t, D]."""
        return self._all_to_all(output, to_heads=False)[0]

    def local_heads(self, values: Tensor) -> Tensor:
        """Of a value for each head those of this rank's heads, [H] to [h]."""
        size = len(values) // self.cp.size
        return values[self.cp.rank * size : (self.cp.rank + 1) * size]

    def _all_to_all(self, *tensors: Tensor, to_heads: bool) -> tuple[Tensor, ...]:
        return cast(
            "tuple[Tensor, ...]",
            _AllToAll.apply(self.cp, to_heads, *tensors),  # pyright: ignore[reportUnknownMemberType]
        )


def uneven_heads(heads: int, count: int) -> ModelError:
    """The error of a model whose heads can't be dealt."""
    fitting = [n for n in range(2, heads + 1) if heads % n == 0 and n <= count]
    return ModelError(
        f"{heads} attention heads can't be dealt to {count} ranks",
        where="device.context_parallel",
        hint=f"device.context_parallel={max(fitting, default=1)}",
    )


class _AllToAll(torch.autograd.Function):
    """Slices of tokens for slices of heads, or back; the gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, cp: ContextParallel, to_heads: bool, *tensors: Tensor):
        ctx.context, ctx.to_heads = cp, to_heads
        return all_to_all(cp, tensors, to_heads=to_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *all_to_all(ctx.context, grads, to_heads=not ctx.to_heads))


def all_to_all(
    cp: ContextParallel, tensors: Sequence[Tensor], *, to_heads: bool
) -> tuple[Tensor, ...]:
    """Every tensor [1, H, t, D] as [1, h, T, D], or the other way round, in one message."""
    import torch.distributed as dist

    count = cp.size
    parts = [_chunks_by_rank(tensor, count, to_heads=to_heads) for tensor in tensors]
    sent = torch.cat([part.reshape(count, -1) for part in parts], 1)
    received = torch.empty_like(sent)
    if cp.group is None:
        received.copy_(sent)
    else:
        cp.check_peers()
        dist.all_to_all_single(received, sent, group=cp.group)
    sizes = [part[0].numel() for part in parts]
    found: list[Tensor] = []
    for tensor, part, got in zip(tensors, parts, received.split(sizes, 1), strict=True):
        got = got.view(part.shape).to(tensor.dtype)
        if to_heads:  # [N, h, t, D], by the rank whose tokens they are
            got = got.transpose(0, 1)
        found.append(got.reshape(1, *_shape(tensor, count, to_heads=to_heads)))
    return tuple(found)


def _chunks_by_rank(tensor: Tensor, count: int, *, to_heads: bool) -> Tensor:
    """[N, h, t, D]: what goes to each rank."""
    _, heads, tokens, width = tensor.shape
    if to_heads:
        return tensor.reshape(count, heads // count, tokens, width)
    return tensor.reshape(heads, count, tokens // count, width).transpose(0, 1)


def _shape(tensor: Tensor, count: int, *, to_heads: bool) -> tuple[int, int, int]:
    _, heads, tokens, width = tensor.shape
    if to_heads:
        return heads // count, tokens * count, width
    return heads * count, tokens // count, width
