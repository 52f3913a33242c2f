"""Gradient synchronisation over ranks: none, all-reduce (data parallelism), or sharded.

Invariant (P3): gradients are summed, never averaged. A step divides its loss by the weight sum of
all ranks beforehand, so the sum over the ranks is the gradient of the whole step.
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
    """A single process: nothing is sent."""

    @property
    def sharded(self) -> ShardedSync | None:
        """Itself where each rank holds a shard of the weights, else None."""
        return None

    @property
    def is_main(self) -> bool:
        """Whether this rank reports the numbers that all ranks have in common."""
        return True

    def all_ranks_or_none(self) -> AbstractContextManager[None]:
        """Around the micro-batches of a step, which all ranks must finish or none."""
        return nullcontext()

    def all_reduce_sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The values, unchanged."""
        return values

    def begin_microbatch(self, *, last: bool) -> None:
        """Called before each micro-batch; nothing to do."""

    def sync_gradients(self) -> None:
        """Called after the last micro-batch; the gradients are complete already."""


class DataParallelSync(NoSync):
    """Data parallelism (as DDP): every rank has all weights, and gradients are all-reduced once a
    step, in float32.

    A parameter without a gradient sends zeros, since another rank may have one.
    """

    def __init__(self, world: World, parameters: Sequence[Tensor]) -> None:
        self._world = world
        self._parameters = [p for p in parameters if p.requires_grad]

    @property
    def is_main(self) -> bool:
        return self._world.is_main

    def all_ranks_or_none(self) -> AbstractContextManager[None]:
        """Only ranks of a model-parallel group communicate inside. Without a check before their
        collectives the others cannot learn of a failed rank, so nothing is caught then.
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
        """Sums over all ranks."""
        return self._world.all_reduce_sum(values)

    @torch.no_grad()
    def sync_gradients(self) -> None:
        """All-reduce the gradients; every rank gets the same bits."""
        self.all_reduce_gradients(self._parameters)

    @torch.no_grad()
    def all_reduce_gradients(self, parameters: Sequence[Tensor], *, group: Any = None) -> None:
        """Sum the parameters' gradients over all ranks, or over a process `group`, in buckets."""
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
    """Each rank holds a shard of some weights, and its optimizer updates that shard alone.

    Args:
        whole: the full parameters by name, as DTensors that know the placement of each shard; their
            contents are not read.
        parts: the trained parameters of this rank by name, as plain tensors.
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
        """The ranks that hold the shards."""
        return self._world

    def grad_norm(self, local_norm: Tensor) -> Tensor:
        """The gradient norm over all shards, from the norm `local_norm` of this rank's."""
        raise NotImplementedError

    def discard_gradients(self) -> None:
        """Discard gradients that have not been handed to the shards."""

    def gather_model(self) -> None:
        """Gather the full model on rank 0, in its own precision and in host memory. The model of
        the other ranks cannot be used afterwards.
        """
        raise NotImplementedError

    def to_dtensors(self, state: Mapping[str, Tensor], *, bare: bool = False) -> dict[str, Tensor]:
        """This rank's optimizer state as DTensors, which know their place in the full tensors.

        Keys are KIND.NAME. The DTensors share the memory of `state`, or have none if `bare`.
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
        """This rank's shards of a full optimizer state; keys are KIND.NAME."""
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
