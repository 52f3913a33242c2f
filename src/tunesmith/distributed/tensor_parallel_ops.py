"""The autograd operations of tensor parallelism: Megatron's f and g (Shoeybi et al., arXiv
1909.08053).

Of a pair of linears the first is colwise: each rank computes some outputs. The second is rowwise
and takes these as its inputs, so that each rank has a term of a sum. One all-reduce ends each pair,
in the forward pass of its outputs and in the backward pass of its inputs. Between pairs every rank
has the full hidden states and computes norms and residuals as a single process does.

The targets of a micro-batch are divided over the ranks, each of which has the full head. The
gradients of the hidden states from all targets are summed before the last layer's backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.distributed.model_parallel_group import ModelParallelGroup


@dataclass(frozen=True, slots=True)
class TensorParallel(ModelParallelGroup):
    """The ranks that hold one copy of the layers, of which this one has shard `rank`."""

    dp_group: Any = None  # ranks with the same shard of other copies


class TPRegion:
    """The collectives between replicated and sharded parts of a model, the same on each rank."""

    def __init__(self, tp: TensorParallel) -> None:
        self.tp = tp
        self._last: tuple[Tensor, Tensor, bool] | None = None

    def copy_to(self, whole: Tensor) -> Tensor:
        """Megatron's f: identity forward, all-reduce of gradients backward. Consecutive linears
        that take the same tensor (q, k and v) share one all-reduce.
        """
        graded = torch.is_grad_enabled()
        if self._last is None or self._last[0] is not whole or self._last[2] != graded:
            entered: Tensor = _CopyTo.apply(whole, self.tp)  # pyright: ignore
            self._last = whole, entered, graded
        return self._last[1]

    def reduce_from(self, term: Tensor) -> Tensor:
        """Megatron's g: all-reduce forward, identity backward."""
        return _ReduceFrom.apply(term, self.tp)  # pyright: ignore

    def grad_on_first(self, whole: Tensor) -> Tensor:
        """Identity forward; the gradient is kept on rank 0 of the group alone. All ranks compute
        the same value, and a sum over all ranks must count its gradient once.
        """
        return whole if self.tp.rank == 0 else _StopGradient.apply(whole)  # pyright: ignore

    def clear(self) -> None:
        """Drop the activation kept for sharing."""
        self._last = None


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _all_reduce_copy(ctx.tp, grads[0]), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, term: Tensor, tp: TensorParallel) -> Tensor:
        return _all_reduce_copy(tp, term)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _StopGradient(torch.autograd.Function):
    """Zeros instead of no gradient: the backward pass must reach the collectives before it."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor) -> Tensor:
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


def _all_reduce_copy(tp: TensorParallel, local: Tensor) -> Tensor:
    """The sum over the group, in a new tensor, so that the caller keeps its argument."""
    return tp.all_reduce(local.clone(memory_format=torch.contiguous_format))
