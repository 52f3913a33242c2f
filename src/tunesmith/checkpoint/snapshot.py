"""Snapshots of tensors in host memory, so that training goes on while they are written."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Snapshot:
    """Copies that later changes of the tensors don't touch.

    Their memory is used again by the next ones: getting it anew from the system would take longer
    than the copying, and a tensor that grows would leave holes behind. For tensors of a GPU it is
    pinned where that can be had.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}  # flat, as long as the longest so far or longer

    @torch.no_grad()
    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors by name as they are now; valid until the next call."""
        found: dict[str, Tensor] = {}
        devices: set[torch.device] = set()
        for name, tensor in tensors:
            place = self._place(name, tensor)
            found[name] = place.copy_(tensor, non_blocking=tensor.is_cuda)
            devices.add(tensor.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self._held = {name: self._held[name] for name in found}
        return found

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        """Memory for a copy of the tensor; twice what it needs if it has grown."""
        held, count = self._held.get(name), tensor.numel()
        if held is None or held.dtype != tensor.dtype:
            held = _memory(count, tensor)
        elif held.numel() < count:
            held = _memory(2 * count, tensor)
        self._held[name] = held
        return held[:count].view(tensor.shape)


def _memory(count: int, like: Tensor) -> Tensor:
    if like.is_cuda:
        try:
            return torch.empty(count, dtype=like.dtype, pin_memory=True)
        except RuntimeError:  # the system pins only so much
            pass
    return torch.empty(count, dtype=like.dtype)
