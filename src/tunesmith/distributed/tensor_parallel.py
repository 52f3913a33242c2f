"""A model whose layers are divided over neighbouring ranks, by what a plan says of its linear maps.

A rank's parameters are plain tensors: of a divided map its part, and everything else whole. After
a step's backward passes the gradient of a divided map is that of this copy's micro-batches, to be
added up over the ranks with the same part. Of what is whole each rank has either the whole
gradient, of which one rank's is taken, or a term of it: the head's from its own targets, a norm's
from its own heads. So one sum over all ranks makes those whole, and the same bits everywhere (P3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.distributed.grad_sync import ShardedSync
from tunesmith.distributed.tensor_parallel_ops import TensorParallel, TPRegion
from tunesmith.distributed.world import World

COPY, PART = "copy", "part"


@dataclass(frozen=True, slots=True)
class TPPlan:
    """Which modules of a model are divided."""

    colwise: Sequence[nn.Module]  # linear maps of which each rank has some outputs
    rowwise: Sequence[nn.Module]  # of which it has some inputs
    sharded: Sequence[tuple[Tensor, int]]  # their parameters, and along which dimension
    partial_grad: Sequence[nn.Module]  # whole, and each rank has a term of their gradients
    embedding: nn.Module

    def shard_dim(self, parameter: Tensor) -> int | None:
        """Along which the parameter is divided; None if it isn't."""
        return next((n for other, n in self.sharded if other is parameter), None)

    def shard_dims(self, root: nn.Module) -> dict[str, int | None]:
        """The same for all parameters of `root`, by name."""
        found = {id(parameter): n for parameter, n in self.sharded}
        return {name: found.get(id(p)) for name, p in root.named_parameters()}

    def partial_grad_names(self, root: nn.Module) -> set[str]:
        """Names of the parameters of whose gradients each rank has a term."""
        found = {id(p) for module in self.partial_grad for p in module.parameters()}
        return {name for name, p in root.named_parameters() if id(p) in found}


def apply_tensor_parallel(plan: TPPlan, tp: TensorParallel) -> TPRegion:
    """Cut the maps down to this rank's part, in place, and let the ranks meet around them.

    The final hidden states are still to be led through `Seams.enter` by whoever goes on with them.
    """
    region = TPRegion(tp)
    for parameter, dimension in plan.sharded:
        part = parameter.detach().chunk(tp.size, dimension)[tp.rank]
        parameter.data = part.clone(memory_format=torch.contiguous_format)
    for module in plan.colwise:
        module.forward = partial(_colwise, region, module)
    for module in plan.rowwise:
        module.forward = partial(_rowwise, region, module)
    plan.embedding.forward = partial(_replicated, region, plan.embedding)
    return region


def _colwise(region: TPRegion, module: nn.Module, whole: Tensor) -> Tensor:
    return type(module).forward(module, region.copy_to(whole))


def _rowwise(region: TPRegion, module: Any, part: Tensor) -> Tensor:
    """The bias comes once, on top of the sum."""
    own = getattr(module, "base_layer", module)._parameters
    bias, own["bias"] = own["bias"], None
    try:
        term = type(module).forward(module, part)
    finally:
        own["bias"] = bias
    whole = region.reduce_from(term)
    return whole if bias is None else whole + bias


def _replicated(region: TPRegion, module: nn.Module, ids: Tensor) -> Tensor:
    return region.grad_on_first(type(module).forward(module, ids))


def tensor_parallelize(
    root: nn.Module, plan: TPPlan, world: World, device: torch.device
) -> TensorParallelSync:
    """Divide `root`, which every rank has with the same weights, and move it to its device."""
    region = apply_tensor_parallel(plan, world.tp)
    root.to(device)
    return TensorParallelSync(world, root, plan, region)


class TensorParallelSync(ShardedSync):
    """Every rank has its part of each divided map, and everything else."""

    def __init__(self, world: World, root: nn.Module, plan: TPPlan, region: TPRegion) -> None:
        self._root, self._plan, self._region = root, plan, region
        self._places, self._termed = plan.shard_dims(root), plan.partial_grad_names(root)
        self._named: dict[str, nn.Parameter] = dict(root.named_parameters())
        trained = {n: p for n, p in self._named.items() if p.requires_grad}
        super().__init__(world, _as_dtensors(trained, self._places, world), dict(trained))

    @property
    def sharded_fraction(self) -> float:
        """Of the whole model's parameters those that are divided."""
        sizes = {n: (p.numel(), self._places[n] is not None) for n, p in self._named.items()}
        divided = self._world.tp.size * sum(size for size, cut in sizes.values() if cut)
        return divided / (divided + sum(size for size, cut in sizes.values() if not cut))

    @property
    def region(self) -> TPRegion:
        """Where the model's ranks meet."""
        return self._region

    def clear(self) -> None:
        """Hold no activation of the last pass."""
        self._region.clear()

    def _trained(self, *, divided: bool) -> list[Tensor]:
        return [p for n, p in self.parts.items() if (self._places[n] is not None) == divided]

    @torch.no_grad()
    def sync_gradients(self) -> None:
        """Every rank has the same gradients of what is whole afterwards, to the bit."""
        self._region.clear()
        split = self._world.tp
        if split.rank > 0:
            for name, parameter in self.parts.items():
                if self._places[name] is None and name not in self._termed:
                    parameter.grad = None  # the first one's counts
        self.all_reduce_gradients(self._trained(divided=False))
        if self._world.dp_size > 1:
            self.all_reduce_gradients(self._trained(divided=True), group=split.dp_group)

    @torch.no_grad()
    def grad_norm(self, own: Tensor) -> Tensor:
        """The norm of the whole gradient: each part's squares, and once those of what is whole."""
        whole, parts = (_square(self._trained(divided=kind), own) for kind in (False, True))
        with self._world.naming_lost_rank():
            return (whole + self._world.tp.all_reduce(parts)).sqrt().float()

    @torch.no_grad()
    def gather_model(self) -> None:
        """As `Parted.gather`; the first rank's copy of the layers is taken."""
        import torch.distributed as dist

        split = self._world.tp
        if self._world.dp_rank > 0:
            return
        for name, parameter in self._named.items():
            dimension = self._places[name]
            if dimension is not None:
                parts = [torch.empty_like(parameter) for _ in range(split.size)]
                with self._world.naming_lost_rank():
                    dist.all_gather(parts, parameter.detach().contiguous(), group=split.group)
                if split.rank == 0:
                    parameter.grad = None
                    parameter.data = torch.cat([part.cpu() for part in parts], dimension)
        if split.rank == 0:
            self._root.to("cpu")
            plan = self._plan
            for module in (*plan.colwise, *plan.rowwise, plan.embedding):
                del module.forward


def _square(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum of squares of their gradients, float64."""
    grads = [t.grad for t in tensors if t.grad is not None]
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=like.device)
    return torch.stack([g.float().norm().double().square() for g in grads]).sum()


def _as_dtensors(
    trained: Mapping[str, Tensor], places: Mapping[str, int | None], world: World
) -> dict[str, Any]:
    """What each trained parameter is a part of, without contents."""
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
