"""Copies of tensors in the host's memory, as they were at one moment."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Snapshot:
    """Copies that later changes of the tensors don't touch.

    Their memory is used again by the next ones: getting it anew from the system would take longer
    than the copying. For tensors of a GPU it is pinned where that can be had.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors by name as they are now; valid until the next call."""
        found: dict[str, Tensor] = {}
        devices: set[torch.device] = set()
        for name, tensor in tensors:
            held = self._held.get(name)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                held = _memory_like(tensor)
            found[name] = held.copy_(tensor, non_blocking=tensor.is_cuda)
            devices.add(tensor.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self._held = found
        return dict(found)


def _memory_like(tensor: Tensor) -> Tensor:
    shape, dtype = tensor.shape, tensor.dtype
    if tensor.is_cuda:
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError:  # the system pins only so much
            pass
    return torch.empty(shape, dtype=dtype)
