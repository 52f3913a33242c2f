"""Activation offload: saved tensors wait for the backward pass in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_SMALLEST = 2**16  # bytes; below, the copy costs more than the room

Kept = Tensor | tuple[torch.device, Tensor]


@contextmanager
def offloaded(
    model: nn.Module, *, copied: Callable[[Tensor], None] | None = None
) -> Iterator[None]:
    """Copy what autograd saves inside to the host, and back when it is asked for.

    The model's own weights and small tensors stay where they are. `copied` is told each tensor
    that is moved.
    """
    stays = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Kept:
        small = tensor.numel() * tensor.element_size() < _SMALLEST
        if small or tensor.untyped_storage().data_ptr() in stays:
            return tensor
        pinned = tensor.device.type == "cuda" and not tensor.is_sparse
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        # nobody reads it here: what brings it back is queued behind this
        host.copy_(tensor, non_blocking=pinned)
        if copied is not None:
            copied(tensor)
        return tensor.device, host

    def unpack(stateful: Kept) -> Tensor:
        if isinstance(stateful, Tensor):
            return stateful
        device, host = stateful
        return host.to(device, non_blocking=host.is_pinned())

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
