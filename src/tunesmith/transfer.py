"""Copies between host and device that do not block: pinned memory and non-blocking transfers.

A GPU works through what the host has queued. Each time the host asks it for a value, the queue runs
empty, and a copy out of ordinary memory has to be finished before the host may go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any] | Tensor, device: torch.device | str) -> Tensor:
    """The values on a device; the copy is queued there, and the host goes on.

    Torch gives the pinned memory that a queued copy reads to nobody else before it is done,
    whatever becomes of the tensor.
    """
    device = torch.device(device)
    return pinned(torch.as_tensor(values), device).to(device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in memory that the device reads by itself, where there is such and the system
    gives it.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        with suppress(RuntimeError):  # the system pins only so much
            return tensor.pin_memory()
    return tensor


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The floating tensors of one device in the host's memory, by one copy that is waited for."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.detach() for tensor in tensors]
    joined = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    parts = joined.to("cpu").split([tensor.numel() for tensor in tensors])
    return [p.to(t.dtype).view(t.shape) for p, t in zip(parts, tensors, strict=True)]
