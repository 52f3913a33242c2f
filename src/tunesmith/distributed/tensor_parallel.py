"""Megatron tensor parallelism (arXiv 1909.08053): colwise and rowwise linears after transformers'
`base_model_tp_plan`.

A rank's parameters are plain tensors: its shard of a sharded linear, and everything else in full.
After the backward passes of a step, the gradient of a shard covers the micro-batches of this copy,
and is summed over the ranks that hold the same shard of other copies. For a replicated parameter
each rank has either the full gradient, of which one rank's is used, or a partial gradient: the
head's from this rank's targets, a norm's from its heads. One sum over all ranks completes both
kinds and gives the same bits everywhere (P3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.distributed.grad_sync import ShardedSync
from tunesmith.distributed.tensor_parallel_ops import TensorParallel, TPRegion
from tunesmith.distributed.world import World
from tunesmith.module_swap import ModuleSwap

SWAP = ModuleSwap("tensor parallelism")
COPY, PART = "copy", "part"


@dataclass(frozen=True, slots=True)
class TPPlan:
    """The modules of a model that are sharded, by how."""

    colwise: Sequence[nn.Module]  # linears of which each rank holds some outputs
    rowwise: Sequence[nn.Module]  # linears of which each rank holds some inputs
    sharded: Sequence[tuple[Tensor, int]]  # their parameters, with the sharded dimension
    partial_grad: Sequence[nn.Module]  # replicated; each rank has a part of the gradient sum
    embedding: nn.Module
    before_head: nn.Module  # what the final hidden states go through, an identity

    def shard_dim(self, parameter: Tensor) -> int | None:
        """The dimension along which the parameter is sharded; None if it is replicated."""
        return next((n for other, n in self.sharded if other is parameter), None)

    def shard_dims(self, root: nn.Module) -> dict[str, int | None]:
        """`shard_dim` of all parameters of `root`, by name."""
        found = {id(parameter): n for parameter, n in self.sharded}
        return {name: found.get(id(p)) for name, p in root.named_parameters()}

    def partial_grad_names(self, root: nn.Module) -> set[str]:
        """Names of the replicated parameters of whose gradient each rank has a part."""
        found = {id(p) for module in self.partial_grad for p in module.parameters()}
        return {name for name, p in root.named_parameters() if id(p) in found}


def apply_tensor_parallel(plan: TPPlan, tp: TensorParallel) -> TPRegion:
    """Shard the linears in place and wrap their forwards with the collectives of the region.

    The head is replicated and each rank has its own targets, so the gradient of the final hidden
    states is summed over the ranks too: `before_head` does that.
    """
    region = TPRegion(tp)
    for parameter, dimension in plan.sharded:
        part = parameter.detach().chunk(tp.size, dimension)[tp.rank]
        parameter.data = part.clone(memory_format=torch.contiguous_format)
    for module in plan.colwise:
        SWAP.set_forward(module, _colwise(region))
    for module in plan.rowwise:
        SWAP.set_forward(module, _rowwise(region))
    SWAP.set_forward(plan.embedding, _replicated(region))
    SWAP.set_forward(plan.before_head, lambda _, hidden: region.copy_to(hidden))
    return region


def _colwise(region: TPRegion) -> Callable[..., Tensor]:
    def forward(module: nn.Module, whole: Tensor) -> Tensor:
        return type(module).forward(module, region.copy_to(whole))

    return forward


def _rowwise(region: TPRegion) -> Callable[..., Tensor]:
    def forward(module: Any, part: Tensor) -> Tensor:
        # the bias is added once, after the all-reduce, and not by each rank
        parameters = getattr(module, "base_layer", module)._parameters
        bias, parameters["bias"] = parameters["bias"], None
        try:
            term = type(module).forward(module, part)
        finally:
            parameters["bias"] = bias
        whole = region.reduce_from(term)
        return whole if bias is None else whole + bias

    return forward


def _replicated(region: TPRegion) -> Callable[..., Tensor]:
    def forward(module: nn.Module, ids: Tensor) -> Tensor:
        return region.grad_on_first(type(module).forward(module, ids))

    return forward


def tensor_parallelize(
    root: nn.Module, plan: TPPlan, world: World, device: torch.device
) -> TensorParallelSync:
    """Shard `root`, which has the same weights on every rank, and move it to the device."""
    region = apply_tensor_parallel(plan, world.tp)
    root.to(device)
    return TensorParallelSync(world, root, plan, region)


class TensorParallelSync(ShardedSync):
    """Gradients under tensor parallelism: sharded linears, everything else replicated."""

    def __init__(self, world: World, root: nn.Module, plan: TPPlan, region: TPRegion) -> None:
        self._root, self._region = root, region
        self._shard_dims, self._partial_grad = plan.shard_dims(root), plan.partial_grad_names(root)
        self._named: dict[str, nn.Parameter] = dict(root.named_parameters())
        trained = {n: p for n, p in self._named.items() if p.requires_grad}
        super().__init__(world, _as_dtensors(trained, self._shard_dims, world), dict(trained))

    @property
    def sharded_fraction(self) -> float:
        """The fraction of the full model's parameters that is sharded."""
        sizes = {n: (p.numel(), self._shard_dims[n] is not None) for n, p in self._named.items()}
        divided = self._world.tp.size * sum(size for size, cut in sizes.values() if cut)
        return divided / (divided + sum(size for size, cut in sizes.values() if not cut))

    @property
    def region(self) -> TPRegion:
        """The collectives around the sharded linears."""
        return self._region

    def clear(self) -> None:
        """Drop the activation kept from the last pass."""
        self._region.clear()

    def _trained(self, *, divided: bool) -> list[Tensor]:
        return [p for n, p in self.parts.items() if (self._shard_dims[n] is not None) == divided]

    @torch.no_grad()
    def sync_gradients(self) -> None:
        """Complete all gradients. Replicated parameters get the same bits on every rank."""
        self._region.clear()
        split = self._world.tp
        if split.rank > 0:
            for name, parameter in self.parts.items():
                if self._shard_dims[name] is None and name not in self._partial_grad:
                    parameter.grad = None  # every rank has all of it: count rank 0's
        self.all_reduce_gradients(self._trained(divided=False))
        if self._world.dp_size > 1:
            self.all_reduce_gradients(self._trained(divided=True), group=split.dp_group)

    @torch.no_grad()
    def grad_norm(self, local_norm: Tensor) -> Tensor:
        """The norm of the full gradient: squares of all shards, and those of replicated ones
        once.
        """
        whole, parts = (_square(self._trained(divided=kind), local_norm) for kind in (False, True))
        with self._world.naming_lost_rank():
            return (whole + self._world.tp.all_reduce(parts)).sqrt().float()

    @torch.no_grad()
    def gather_model(self) -> None:
        """As `ShardedSync.gather_model`; the copy of the layers that rank 0 belongs to is used."""
        import torch.distributed as dist

        split = self._world.tp
        if self._world.dp_rank > 0:
            return
        for name, parameter in self._named.items():
            dimension = self._shard_dims[name]
            if dimension is not None:
                parts = [torch.empty_like(parameter) for _ in range(split.size)]
                with self._world.naming_lost_rank():
                    dist.all_gather(parts, parameter.detach().contiguous(), group=split.group)
                if split.rank == 0:
                    parameter.grad = None
                    parameter.data = torch.cat([part.cpu() for part in parts], dimension)
        if split.rank == 0:
            self._root.to("cpu")
            SWAP.restore(self._root)


def _square(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum of squares of the tensors' gradients, a float64 scalar."""
    grads = [t.grad for t in tensors if t.grad is not None]
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=like.device)
    return torch.stack([g.float().norm().double().square() for g in grads]).sum()


def _as_dtensors(
    trained: Mapping[str, Tensor], places: Mapping[str, int | None], world: World
) -> dict[str, Any]:
    """The full tensor of each trained parameter as a DTensor on the meta device."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

    split = world.tp
    mesh = DeviceMesh.from_group(
        [split.dp_group, split.group],
        next(iter(trained.values())).device.type,
        mesh=torch.arange(world.size).view(-1, split.size),
        mesh_dim_names=(COPY, PART),
    )
    found: dict[str, Any] = {}
    for name, parameter in trained.items():
        dimension = places[name]
        shape = list(parameter.shape)
        place: Placement = Replicate()
        if dimension is not None:
            shape[dimension] *= split.size
            place = Shard(dimension)
        whole = torch.empty(shape, device="meta")
        found[name] = DTensor.from_local(
            torch.empty(parameter.shape, device="meta"), mesh, [Replicate(), place],
            run_check=False, shape=whole.shape, stride=whole.stride(),
        )  # fmt: skip
    return found
