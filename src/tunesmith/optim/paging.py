"""Paged optimizer state: it stays in host memory or in a mapped file between steps (as
bitsandbytes' paged optimizers).

On a CPU it lies in files that are mapped into memory: the system may write their pages out while
forward and backward passes need the room, and reads them when a step comes by. The files have no
name any more once they are mapped, so nothing is left of them however the process ends. On other
devices it lies in the host's memory and comes to the device one parameter at a time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tunesmith.errors import InputError, first_line

SMALL = 2**16
"""Bytes below which a tensor stays where it is."""


class HoldsState(Protocol):
    """A parameter, and what a rule keeps of it."""

    parameter: Tensor
    state: dict[str, Tensor]


class Pages:
    """Where state rests. `folder`: for the files, on a disk and not in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes = 0
        """What rests here."""
        self._device: torch.device | None = None  # from which copies are under way

    def zeros(self, flat: Tensor) -> Tensor:
        """float32 zeros for what is kept of a parameter `flat` [n] on its device.

        Raises:
            InputError: the folder has no room for them.
        """
        if 4 * flat.numel() < SMALL:
            return torch.zeros_like(flat, dtype=torch.float32)
        place, clean = self._place(flat.numel(), torch.float32, flat.device)
        return place if clean else place.zero_()

    def paged(self, tensor: Tensor) -> Tensor:
        """The tensor [n], moved here if it is large.

        Raises:
            InputError: the folder has no room for it.
        """
        if tensor.numel() * tensor.element_size() < SMALL:
            return tensor
        place, _ = self._place(tensor.numel(), tensor.dtype, tensor.device)
        return place.copy_(tensor)

    @contextmanager
    def at_hand(self, param: HoldsState) -> Iterator[None]:
        """Have the slot's state on its parameter's device inside; changes are kept."""
        device, resting = param.parameter.device, param.state
        if device.type == "cpu":
            yield
            return
        self._device = device
        param.state = {name: t.to(device, non_blocking=True) for name, t in resting.items()}
        try:
            yield
        finally:
            for name, tensor in resting.items():
                if tensor.device != device:
                    # What reads it on the device again is queued behind this; see `settle`.
                    tensor.copy_(param.state[name], non_blocking=True)
            param.state = resting

    def settle(self) -> None:
        """Wait until what was changed on a device has arrived, once for all parameters."""
        if self._device is not None:
            torch.accelerator.synchronize(self._device)
            self._device = None

    def _place(self, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, bool]:
        """Memory [count], and whether it holds zeros."""
        self.bytes += count * dtype.itemsize
        if device.type == "cpu":
            return self._mapped(count, dtype), True
        return _in_host(count, dtype, pinned=device.type == "cuda"), False

    def _mapped(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory [count] of a file without a name; its pages are made when they are used."""
        try:
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".optimizer-")
        except OSError as error:
            raise _refused(error, self.folder) from error
        try:
            reserve(handle, count * dtype.itemsize)
            return torch.from_file(name, shared=True, size=count, dtype=dtype)
        except (OSError, RuntimeError) as error:
            raise _refused(error, self.folder) from error
        finally:
            os.close(handle)
            with suppress(OSError):  # where a mapped file can't lose its name
                os.unlink(name)


def reserve(handle: int, size: int) -> None:
    """Take the file's room now: a page without room would end the process when it is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)


def _in_host(count: int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """Memory [count] of the host, pinned where the system allows it."""
    if pinned:
        with suppress(RuntimeError):  # the system pins only so much
            return torch.empty(count, dtype=dtype, pin_memory=True)
    return torch.empty(count, dtype=dtype)


def _refused(error: Exception, folder: Path) -> InputError:
    return InputError(
        f"the optimizer's state can't be kept in {folder}: {first_line(error)}",
        where="device.paged_optimizer",
        hint="more room on that disk, or device.paged_optimizer=false",
    )
