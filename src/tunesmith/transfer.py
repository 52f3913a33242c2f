"""Host-device transfers through pinned memory (`pin_memory`, `non_blocking=True`).

A GPU executes operations that the host has queued. If the host reads a value from the GPU, it waits
until the queue is empty. A copy from memory that is not pinned blocks the host too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any] | Tensor, device: torch.device | str) -> Tensor:
    """The values on a device. The copy is queued, and the host does not wait for it.

    torch does not reuse pinned memory before a queued copy from it is done, even if the tensor has
    been freed.
    """
    device = torch.device(device)
    return pinned(torch.as_tensor(values), device).to(device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in pinned (page-locked) memory for a CUDA device, if the system allows it."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        with suppress(RuntimeError):  # the system limits the amount of pinned memory
            return tensor.pin_memory()
    return tensor


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Floating-point tensors of one device on the host, by one blocking copy for all of them."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.detach() for tensor in tensors]
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    parts = flat.to("cpu").split([tensor.numel() for tensor in tensors])
    return [p.to(t.dtype).view(t.shape) for p, t in zip(parts, tensors, strict=True)]
