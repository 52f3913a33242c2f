"""Ranks that hold a model's layers in parts and run each micro-batch together (Shoeybi et al.,
arXiv 1909.08053).

Of a pair of linear maps the first gives each rank some of its outputs, the second takes those as
inputs: what the ranks then have are terms of a sum. So one message between all ranks of a copy
ends each pair, in the forward pass its outputs' and in the backward pass its inputs'. Between pairs
every rank has the whole hidden states, and computes norms and residuals as one process does.

The targets of a micro-batch are dealt to the ranks, each of which has the whole head. What a rank's
targets ask of the hidden states is added up before the last layer's backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.distributed.model_parallel_group import ModelParallelGroup


@dataclass(frozen=True, slots=True)
class TensorParallel(ModelParallelGroup):
    """Ranks with one copy of the layers together, of which this one has part `place`."""

    dp_group: Any = None  # the ranks with the same part of other copies


class TPRegion:
    """Where the divided and the whole part of a model meet, on each rank alike."""

    def __init__(self, tp: TensorParallel) -> None:
        self.split = tp
        self._last: tuple[Tensor, Tensor, bool] | None = None

    def copy_to(self, whole: Tensor) -> Tensor:
        """What each rank goes on with in its own way; the gradients of all are added up. Maps that
        begin with the same tensor one after the other share that sum.
        """
        graded = torch.is_grad_enabled()
        if self._last is None or self._last[0] is not whole or self._last[2] != graded:
            entered: Tensor = _CopyTo.apply(whole, self.split)  # pyright: ignore
            self._last = whole, entered, graded
        return self._last[1]

    def reduce_from(self, term: Tensor) -> Tensor:
        """The sum of every rank's term; each of them gets the whole gradient."""
        return _ReduceFrom.apply(term, self.split)  # pyright: ignore

    def grad_on_first(self, whole: Tensor) -> Tensor:
        """What all ranks compute alike, its gradient on the first of them alone: sums over all
        ranks count it once.
        """
        return whole if self.split.rank == 0 else _StopGradient.apply(whole)  # pyright: ignore

    def clear(self) -> None:
        """Hold no activation any longer."""
        self._last = None


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, tp: TensorParallel) -> Tensor:
        ctx.split = tp
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _all_reduce_copy(ctx.split, grads[0]), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, term: Tensor, tp: TensorParallel) -> Tensor:
        return _all_reduce_copy(tp, term)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _StopGradient(torch.autograd.Function):
    """Zeros and not nothing: the backward pass must reach what ranks wait for each other in."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor) -> Tensor:
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


def _all_reduce_copy(tp: TensorParallel, own: Tensor) -> Tensor:
    """In a tensor of its own: whoever gave `own` may keep it."""
    return tp.all_reduce(own.clone(memory_format=torch.contiguous_format))
