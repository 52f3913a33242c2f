"""Paged optimizer state (as bitsandbytes' paged optimizers, arXiv 2305.14314): it is kept
outside of device memory between steps, since it is needed once a step.

On a CPU it lies in memory-mapped files: the system may write their pages to disk while forward and
backward passes need the memory, and reads them back at the next step. The files are unlinked as
soon as they are mapped, so nothing is left of them however the process ends. On other devices it
lies in pinned host memory and is copied to the device one parameter at a time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.errors import InputError, first_line
from tunesmith.optim.param_state import ParamState

SMALL = 2**16
"""Bytes below which a tensor is not paged."""


class Pages:
    """The memory of paged state. `folder` is for the mapped files and must be on a disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes = 0
        """Bytes of all paged tensors."""
        self._device: torch.device | None = None  # the device with copies in flight

    def zeros(self, flat: Tensor) -> Tensor:
        """A state tensor of float32 zeros for a parameter `flat` [n] on its device.

        Raises:
            InputError: the folder has no room for them.
        """
        if 4 * flat.numel() < SMALL:
            return torch.zeros_like(flat, dtype=torch.float32)
        memory, zeroed = self._allocate(flat.numel(), torch.float32, flat.device)
        return memory if zeroed else memory.zero_()

    def paged(self, tensor: Tensor) -> Tensor:
        """The tensor [n], moved into paged memory if it is large.

        Raises:
            InputError: the folder has no room for it.
        """
        if tensor.numel() * tensor.element_size() < SMALL:
            return tensor
        memory, _ = self._allocate(tensor.numel(), tensor.dtype, tensor.device)
        return memory.copy_(tensor)

    @contextmanager
    def on_device(self, param: ParamState) -> Iterator[None]:
        """Inside, the parameter's state is on the parameter's device; changes are copied back."""
        device, paged = param.parameter.device, param.state
        if device.type == "cpu":
            yield
            return
        self._device = device
        param.state = {name: t.to(device, non_blocking=True) for name, t in paged.items()}
        try:
            yield
        finally:
            for name, tensor in paged.items():
                if tensor.device != device:
                    # The next copy to the device is queued behind this one; `synchronize` is for
                    # the host.
                    tensor.copy_(param.state[name], non_blocking=True)
            param.state = paged

    def synchronize(self) -> None:
        """Wait until all copies from the device are done, once for all parameters of a step."""
        if self._device is not None:
            torch.accelerator.synchronize(self._device)
            self._device = None

    def _allocate(
        self, count: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, bool]:
        """Memory [count], and whether it is zeroed."""
        self.bytes += count * dtype.itemsize
        if device.type == "cpu":
            return self._mapped(count, dtype), True
        return _in_host(count, dtype, pinned=device.type == "cuda"), False

    def _mapped(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory [count] of an unlinked file; its pages are allocated on first use."""
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
            with suppress(OSError):  # some systems cannot unlink a mapped file
                os.unlink(name)


def reserve(handle: int, size: int) -> None:
    """Allocate the file's blocks now; on a full disk a page written later would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)


def _in_host(count: int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """Host memory [count], pinned where the system allows it."""
    if pinned:
        with suppress(RuntimeError):  # the system limits how much memory is pinned
            return torch.empty(count, dtype=dtype, pin_memory=True)
    return torch.empty(count, dtype=dtype)


def _refused(error: Exception, folder: Path) -> InputError:
    return InputError(
        f"the optimizer's state can't be kept in {folder}: {first_line(error)}",
        where="device.paged_optimizer",
        hint="free space on that disk, or set device.paged_optimizer=false",
    )
