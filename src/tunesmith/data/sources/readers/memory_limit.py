"""A memory limit on one read by the operating system (setrlimit RLIMIT_AS)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

LEAST_ROOM = 1 << 31
"""Bytes that decoding may take beyond what the file itself has."""
_STATE, _MEMORY = Path("/proc/self/statm"), Path("/proc/meminfo")


@contextmanager
def address_space_limit(size: int) -> Generator[None, None, None]:
    """Inside, what would take the process more than `LEAST_ROOM` and `size` bytes beyond what it
    has, or most of what the machine has left, ends in a MemoryError.

    It is a limit on the address space, and nothing where the system can't say how much that is.
    Other threads have the same limit meanwhile, so it is for moments.
    """
    used = _used()
    if used is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = used + min(LEAST_ROOM + size, _available() * 3 // 4)
    lowest = min([wanted, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _used() -> int | None:
    """Address space of this process in bytes."""
    try:
        import resource

        return int(_STATE.read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return None


def _available() -> int:
    """Bytes of memory that could be had."""
    for line in _MEMORY.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return LEAST_ROOM
