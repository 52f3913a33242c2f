"""FSDP2 (torch.distributed.fsdp.fully_shard): weights, gradients and optimizer state sharded
over ranks.

Each layer is all-gathered while it computes. What is outside the layers (embedding, final norm,
head) belongs to the root module and is gathered once a step. Trained weights are stored in float32
as the masters of the weights that are computed with.

Invariant (P3): a gradient is the sum over the ranks, in float32. FSDP averages by default, so the
divide factor is set to 1 and sums are forced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from tunesmith.distributed.grad_sync import ShardedSync
from tunesmith.distributed.oom import CollectiveOOM, all_ranks_or_none
from tunesmith.distributed.peer_check import can_retry, check_all_peers, check_before_collectives
from tunesmith.distributed.world import World
from tunesmith.errors import ModelError
from tunesmith.types import LossOutput

SHARD, REPLICATE = "shard", "replicate"

Read = Callable[[str, Sequence[int], Sequence[int]], Tensor]
"""Gives the part of a parameter, by its name, at these offsets and of these sizes."""


@dataclass(frozen=True, slots=True)
class FSDPOptions:
    """How a model is sharded."""

    compute: torch.dtype  # what it computes in
    hybrid: bool = False  # HYBRID_SHARD: a copy on each machine, sharded inside it
    offload: bool = False  # CPU offload: shards are stored in host memory


def apply_fsdp(
    root: nn.Module,
    layers: Sequence[nn.Module],
    world: World,
    how: FSDPOptions,
    *,
    device: torch.device,
    read: Read | None = None,
) -> FSDPSync:
    """Shard `root` in place; `layers` are the modules inside it that are gathered one at a time.

    Every rank must have the same weights. Trained weights become float32 first, a layer at a time,
    so that at most one layer is held twice. For weights on the meta device, each rank calls `read`
    for its own shard only.

    Raises:
        ModelError: what was read is not finite.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    _show_tensors_of(LossOutput)
    if how.hybrid:
        shape = (world.size // world.local_size, world.local_size)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=(REPLICATE, SHARD))
    else:
        mesh = init_device_mesh(device.type, (world.size,), mesh_dim_names=(SHARD,))
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=how.compute, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")
        if how.offload
        else OffloadPolicy(),
    }
    dtypes = {name: parameter.dtype for name, parameter in root.named_parameters()}
    for layer in layers:
        _upcast_trained(layer)
        fully_shard(layer, **options)
    _upcast_trained(root)
    fully_shard(root, **options)
    checks_peers = can_retry(world.size, device.type)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if checks_peers:
                check_before_collectives(module)
    if read is not None:
        _materialize(root, torch.device("cpu") if how.offload else device, dtypes, read=read)
        _check_finite(root, world)
    return FSDPSync(world, root, mesh[SHARD], dtypes, checks_peers=checks_peers)


@torch.no_grad()
def _materialize(
    root: nn.Module, home: torch.device, dtypes: Mapping[str, torch.dtype], *, read: Read
) -> None:
    """Allocate this rank's shards of meta tensors and read their values."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    empty = [name for name, parameter in root.named_parameters() if parameter.is_meta]
    root._apply(lambda t: torch.empty_like(t, device=home) if t.is_meta else t)
    parameters: dict[str, Any] = dict(root.named_parameters())
    for name in empty:
        whole = parameters[name]
        sizes, offsets = compute_local_shape_and_global_offset(
            whole.shape, whole.device_mesh, whole.placements
        )
        if 0 not in sizes:
            # through the model's own precision, as a model that is loaded whole
            whole.to_local().copy_(read(name, offsets, sizes).to(dtypes[name]))


@torch.no_grad()
def _check_finite(root: nn.Module, world: World) -> None:
    parameters: list[Any] = list(root.parameters())
    broken = not all(bool(p.to_local().isfinite().all()) for p in parameters)
    if world.all_reduce_max([broken])[0]:
        raise ModelError(
            "its weights hold what is not a number (NaN) or infinite",
            hint="the files may be damaged: get the model again",
        )


def _upcast_trained(module: nn.Module) -> None:
    for parameter in module.parameters():
        if (
            parameter.requires_grad
            and parameter.dtype != torch.float32
            and not _is_sharded_tensor(parameter)
        ):
            parameter.grad_dtype = None
            parameter.data = parameter.data.float()
            parameter.grad_dtype = torch.float32


def _is_sharded_tensor(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _show_tensors_of(kind: type) -> None:
    """Register a dataclass as a pytree, so that FSDP's hooks find the tensors a forward returns."""
    if kind not in _pytree.SUPPORTED_NODES:
        _pytree.register_dataclass(kind)


class FSDPSync(ShardedSync):
    """Gradients of an FSDP2 model: every rank holds a shard of each weight and updates it alone.

    `parts` are this rank's trained shards by name: plain float32 tensors that share the memory of
    the DTensors.
    """

    def __init__(
        self,
        world: World,
        root: nn.Module,
        mesh: Any,
        dtypes: Mapping[str, torch.dtype],
        *,
        checks_peers: bool,
    ) -> None:
        whole: dict[str, Any] = dict(root.named_parameters())
        parts: dict[str, Tensor] = {
            name: parameter.to_local().detach().requires_grad_()
            for name, parameter in whole.items()
            if parameter.requires_grad
        }
        super().__init__(world, whole, parts)
        self._checks_peers = checks_peers
        self._root: Any = root
        self._mesh = mesh
        self._dtypes = dtypes

    @contextmanager
    def all_ranks_or_none(self) -> Iterator[None]:
        """Ranks wait for each other in every layer. Without a check before each collective the
        others cannot learn of a failed rank, so nothing is caught then.
        """
        if not self._checks_peers:
            yield
            return
        try:
            with all_ranks_or_none(self._world, check_all_peers):
                yield
        except CollectiveOOM:
            self._abort_pass()
            raise

    def _abort_pass(self) -> None:
        """Clean up after an aborted forward or backward pass: gradients and gathered weights."""
        for parameter in self._root.parameters():
            parameter.grad = None  # of a layer that is gathered now, not yet added up
        if self._root._get_fsdp_state()._is_root:  # else there was no pass yet
            self._root.reset_iter_state()
        self.discard_gradients()

    def begin_microbatch(self, *, last: bool) -> None:
        """Keep the root's own weights gathered between the micro-batches of a step, nothing
        else.
        """
        self._root.set_reshard_after_backward(last, recurse=False)

    @torch.no_grad()
    def sync_gradients(self) -> None:
        """Hand the gradients, which FSDP has reduce-scattered, to the shards."""
        self._root.reshard()
        for name, part in self.parts.items():
            grad = self._whole[name].grad
            part.grad = None if grad is None else grad.to_local()
            self._whole[name].grad = None

    def reshard(self) -> None:
        """Free the weights that a pass outside a step has gathered."""
        self._root.reshard()

    def discard_gradients(self) -> None:
        """Discard gradients that no step has used."""
        for name in self.parts:
            self._whole[name].grad = None

    def grad_norm(self, local_norm: Tensor) -> Tensor:
        """The norm of all parts' gradients, from that of this rank's."""
        import torch.distributed as dist

        square = local_norm.double().square().to(self._mesh.device_type)
        with self._world.naming_lost_rank():
            dist.all_reduce(square, group=self._mesh.get_group())
        return square.sqrt().float()

    @torch.no_grad()
    def gather_model(self) -> None:
        """Gather the full model on rank 0, in its own precision and in host memory, and remove FSDP
        from it. The model of the other ranks cannot be used afterwards.
        """
        from torch.distributed.fsdp import FSDPModule

        self._root.reshard()
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        made: dict[int, nn.Parameter] = {}
        for name, parameter in self._whole.items():
            with self._world.naming_lost_rank():
                full = parameter.full_tensor()
            if self._world.is_main:
                full = full.to("cpu", self._dtypes[name])
                made[id(parameter)] = nn.Parameter(full, parameter.requires_grad)
        if self._world.is_main:
            _unwrap(self._root, made)


def _unwrap(root: nn.Module, made: Mapping[int, nn.Parameter]) -> None:
    from torch.distributed.fsdp import FSDPModule

    for module in list(root.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in made:
                module._parameters[name] = made[id(parameter)]
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            for handle in ("_pre_forward_hook_handle", "_post_forward_hook_handle"):
                found = getattr(state, handle, None)
                if found is not None:
                    found.remove()
            # torch's fully_shard changed the class, and has no call that undoes it. The class
            # that was there before comes after FSDP's own two.
            module.__class__ = type(module).__mro__[2]
    for module in root.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.cpu()
