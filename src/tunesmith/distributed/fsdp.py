"""A model whose weights, gradients and optimizer state are spread over the ranks, by torch's FSDP2.

Each layer is gathered while it computes; what is outside of the layers (embedding, final norm,
head) belongs to the root module and is gathered once a step. Weights that are trained rest in
float32, the masters of what is computed with.

Invariant (P3): a gradient is the sum over the ranks, in float32. FSDP would average, and only with
a divisor of 1 and plain sums asked for is that undone.
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
    """How a model is spread."""

    compute: torch.dtype  # what it computes in
    across: bool = False  # whole copies on each machine, spread over the ranks of one
    offload: bool = False  # shards rest in the host's memory


def apply_fsdp(
    root: nn.Module,
    layers: Sequence[nn.Module],
    world: World,
    how: FSDPOptions,
    *,
    device: torch.device,
    read: Read | None = None,
) -> FSDPSync:
    """Spread `root` in place; `layers` are the modules inside it that are gathered one at a time.

    Every rank must come with the same weights. Those that are trained become float32 first, a
    layer at a time, so that never more than a layer is there twice. Of weights without memory, on
    torch's meta device, each rank has `read` its own part and no more.

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
    if how.across:
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
    asks = can_retry(world.size, device.type)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if asks:
                check_before_collectives(module)
    if read is not None:
        _materialize(root, torch.device("cpu") if how.offload else device, dtypes, read=read)
        _check_restartable(root, world)
    return FSDPSync(world, root, mesh[SHARD], dtypes, asks=asks)


@torch.no_grad()
def _materialize(
    root: nn.Module, home: torch.device, dtypes: Mapping[str, torch.dtype], *, read: Read
) -> None:
    """Give the parts of this rank memory, and what belongs in it."""
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
def _check_restartable(root: nn.Module, world: World) -> None:
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
    """Let FSDP find the tensors in a dataclass that a forward returns."""
    if kind not in _pytree.SUPPORTED_NODES:
        _pytree.register_dataclass(kind)


class FSDPSync(ShardedSync):
    """Every rank has a part of each weight, and the optimizer works on that part alone.

    `parts` are the trained parameters of this rank by name: plain float32 tensors that share the
    memory of the shards.
    """

    def __init__(
        self,
        world: World,
        root: nn.Module,
        mesh: Any,
        dtypes: Mapping[str, torch.dtype],
        *,
        asks: bool,
    ) -> None:
        whole: dict[str, Any] = dict(root.named_parameters())
        parts: dict[str, Tensor] = {
            name: parameter.to_local().detach().requires_grad_()
            for name, parameter in whole.items()
            if parameter.requires_grad
        }
        super().__init__(world, whole, parts)
        self._asks = asks
        self._root: Any = root
        self._mesh = mesh
        self._dtypes = dtypes

    @contextmanager
    def all_ranks_or_none(self) -> Iterator[None]:
        """Ranks wait for each other in every layer; where they don't ask before, one that has
        failed can't be followed.
        """
        if not self._asks:
            yield
            return
        try:
            with all_ranks_or_none(self._world, check_all_peers):
                yield
        except CollectiveOOM:
            self._abort_pass()
            raise

    def _abort_pass(self) -> None:
        """Forget a forward or backward that was left in the middle, and what is gathered."""
        for parameter in self._root.parameters():
            parameter.grad = None  # of a layer that is gathered now, not yet added up
        if self._root._get_fsdp_state()._is_root:  # else there was no pass yet
            self._root.reset_iter_state()
        self.discard_gradients()

    def begin_microbatch(self, *, last: bool) -> None:
        """Between micro-batches the root's own weights stay gathered, and nothing else."""
        self._root.set_reshard_after_backward(last, recurse=False)

    @torch.no_grad()
    def sync_gradients(self) -> None:
        """Hand the gradients, which FSDP has added up, to the parts."""
        self._root.reshard()
        for name, part in self.parts.items():
            grad = self._whole[name].grad
            part.grad = None if grad is None else grad.to_local()
            self._whole[name].grad = None

    def reshard(self) -> None:
        """Give back what a pass outside of a step has gathered."""
        self._root.reshard()

    def discard_gradients(self) -> None:
        """Forget gradients that no step has taken."""
        for name in self.parts:
            self._whole[name].grad = None

    def grad_norm(self, own: Tensor) -> Tensor:
        """The norm of all parts' gradients, from that of this rank's."""
        import torch.distributed as dist

        square = own.double().square().to(self._mesh.device_type)
        with self._world.naming_lost_rank():
            dist.all_reduce(square, group=self._mesh.get_group())
        return square.sqrt().float()

    @torch.no_grad()
    def gather_model(self) -> None:
        """Give the first rank the whole model, in its own precision and the host's memory, no
        longer sharded; the model of the others is of no more use.
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
            module.__class__ = type(module).__mro__[2]  # after FSDP's own two
    for module in root.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.cpu()
