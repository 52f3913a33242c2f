"""How a step's sums and gradients become those of all ranks.

Invariant (P3): gradients are added, never averaged. A step divides its loss by the weight of all
ranks beforehand, so the sum over the ranks is the gradient of the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.distributed.oom import all_ranks_or_none
from tunesmith.distributed.world import World

BUCKET = 1 << 24
"""Elements that are sent at a time: 64 MiB of float32."""


class NoSync:
    """One process: its sums are the step's."""

    @property
    def sharded(self) -> ShardedSync | None:
        """Itself where each rank has a part of the weights."""
        return None

    @property
    def is_main(self) -> bool:
        """Whether this rank's numbers stand for those that all ranks have."""
        return True

    def all_ranks_or_none(self) -> AbstractContextManager[None]:
        """Where micro-batches run that all ranks must finish for a step to be taken."""
        return nullcontext()

    def all_reduce_sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The values as they are."""
        return values

    def begin_microbatch(self, *, last: bool) -> None:
        """Nothing is to be done before a micro-batch."""

    def sync_gradients(self) -> None:
        """The gradients are whole."""


class DataParallelSync(NoSync):
    """Every rank has all weights; gradients are added once a step, in float32.

    A parameter without a gradient sends zeros, since another rank may have one.
    """

    def __init__(self, world: World, parameters: Sequence[Tensor]) -> None:
        self._world = world
        self._parameters = [p for p in parameters if p.requires_grad]

    @property
    def is_main(self) -> bool:
        return self._world.is_main

    def all_ranks_or_none(self) -> AbstractContextManager[None]:
        """Only ranks that work on a micro-batch together wait for each other inside; where they
        don't ask before, one that has failed can't be followed.
        """
        group = self._world.model_parallel
        if group.size == 1:
            return all_ranks_or_none(self._world)
        return (
            nullcontext()
            if group.check_group is None
            else all_ranks_or_none(self._world, group.check_peers)
        )

    def all_reduce_sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over the ranks."""
        return self._world.all_reduce_sum(values)

    @torch.no_grad()
    def sync_gradients(self) -> None:
        """Every rank has the same gradients afterwards, to the bit."""
        self.all_reduce_gradients(self._parameters)

    @torch.no_grad()
    def all_reduce_gradients(self, parameters: Sequence[Tensor], *, group: Any = None) -> None:
        """Sums of the parameters' gradients over all ranks, or those of a group."""
        import torch.distributed as dist

        for bucket in buckets(parameters):
            flat = torch.cat([_flat_gradient(p) for p in bucket])
            with self._world.naming_lost_rank():
                dist.all_reduce(flat, group=group)
            start = 0
            for parameter in bucket:
                part = flat[start : start + parameter.numel()].view(parameter.shape)
                start += parameter.numel()
                if parameter.grad is None:
                    parameter.grad = part.to(parameter.grad_dtype or parameter.dtype)
                else:
                    parameter.grad.copy_(part)


def _flat_gradient(parameter: Tensor) -> Tensor:
    """float32 (float64 stays), [n]."""
    if parameter.grad is None:
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        return torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
    grad = parameter.grad.reshape(-1)
    return grad if grad.dtype == torch.float64 else grad.float()


def buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive parameters on one device, of `BUCKET` elements or a single one that is larger."""
    held: list[Tensor] = []
    size = 0
    for parameter in parameters:
        other = held and (
            parameter.device != held[0].device
            or (parameter.dtype == torch.float64) != (held[0].dtype == torch.float64)
        )
        if held and (other or size + parameter.numel() > BUCKET):
            yield held
            held, size = [], 0
        held.append(parameter)
        size += parameter.numel()
    if held:
        yield held


class ShardedSync(DataParallelSync):
    """Ranks of which each has a part of some weights, and whose optimizer works on that alone.

    Args:
        whole: what the parameters are parts of, by name, as tensors that know where; their contents
            are not looked at.
        parts: the trained parameters of this rank by name, plain tensors.
    """

    def __init__(self, world: World, whole: Mapping[str, Any], parts: dict[str, Tensor]) -> None:
        super().__init__(world, [])
        self._whole = whole
        self.parts = parts

    @property
    def sharded(self) -> ShardedSync:
        """Itself."""
        return self

    @property
    def world(self) -> World:
        """Those that hold the parts."""
        return self._world

    def grad_norm(self, own: Tensor) -> Tensor:
        """The norm of all parts' gradients, from that of this rank's."""
        raise NotImplementedError

    def discard_gradients(self) -> None:
        """Forget gradients that have not reached the parts."""

    def gather_model(self) -> None:
        """Give the first rank the whole model, in its own precision and the host's memory; the
        model of the others is of no more use.
        """
        raise NotImplementedError

    def to_dtensors(self, state: Mapping[str, Tensor], *, bare: bool = False) -> dict[str, Tensor]:
        """An optimizer's state over the parts as tensors that know their place in the whole.

        Keys are KIND.NAME; they share the memory of what is given, or `bare` have none.
        """
        from torch.distributed.tensor import DTensor

        found: dict[str, Tensor] = {}
        for key, tensor in state.items():
            whole = self._whole.get(key.partition(".")[2])
            if whole is None:
                found[key] = tensor
                continue
            found[key] = DTensor.from_local(
                tensor.to("meta") if bare else tensor,
                whole.device_mesh,
                whole.placements,
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
        return found

    def local_parts(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of an optimizer's state; keys are KIND.NAME."""
        from torch.distributed.tensor import distribute_tensor

        found: dict[str, Tensor] = {}
        for key, tensor in whole.items():
            name = key.partition(".")[2]
            like = self._whole.get(name)
            if like is None:
                found[key] = tensor
                continue
            placed = distribute_tensor(
                tensor.to(self.parts[name].device),
                like.device_mesh,
                like.placements,
                src_data_rank=None,
            )
            found[key] = placed.to_local()
        return found
