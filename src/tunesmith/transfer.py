"""Copies between host and device that do not block (pinned memory, `non_blocking=True`).

A GPU works through the queue of kernels that the host fills. When the host reads a value from it,
the queue runs empty, and a copy from pageable memory must finish before the host continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any] | Tensor, device: torch.device | str) -> Tensor:
    """Copy values to a device without waiting for the copy.

    torch's caching allocator does not reuse the pinned memory of a queued copy before it is done,
    even if the tensor is freed.
    """
    device = torch.device(device)
    return pinned(torch.as_tensor(values), device).to(device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in pinned memory if the device is a GPU and the system allows it, else as it
    is.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        with suppress(RuntimeError):  # the system limits how much memory is pinned
            return tensor.pin_memory()
    return tensor


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy floating-point tensors of one device to host memory with a single synchronizing copy."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.detach() for tensor in tensors]
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    parts = flat.to("cpu").split([tensor.numel() for tensor in tensors])
    return [p.to(t.dtype).view(t.shape) for p, t in zip(parts, tensors, strict=True)]
