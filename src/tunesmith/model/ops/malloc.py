"""glibc mallopt: keep freed buffers mapped, which saves page faults in every step. Other C
libraries are left alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of mallopt(3)."""
_SMALL, _USUAL, _ALL = 2**18, 2**25, 2**30
"""Bytes from which a buffer is the system's again once it is freed; glibc raises its own limit up
to the second by what it sees.
"""
_limit = _USUAL


def keep_freed_memory() -> None:
    """Make glibc keep big buffers that were freed, so that the next step does not fault them in.

    By its default it gives every buffer above a few megabytes back to the system, and each page of
    the next one costs a fault.
    """
    global _limit
    _limit = _ALL
    _set(_MMAP_THRESHOLD, _limit)
    _set(_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Have buffers given back to the system as they are freed inside.

    Where large tensors pass through and small ones made of them stay, kept buffers would have holes
    that nothing fits into, and the process would grow as if the large ones had stayed.
    """
    _set(_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        _set(_MMAP_THRESHOLD, _limit)


def _set(option: int, value: int) -> None:
    try:
        ctypes.CDLL(None).mallopt(option, value)
    except (AttributeError, OSError, TypeError):
        return
