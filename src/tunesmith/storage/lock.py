"""The lock of a run folder: one process at a time, released when that process is gone.

It is the operating system's lock on an open file, so it ends with its process however that ends,
and knows nothing of clocks. The file's contents only name the holder.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tunesmith.errors import InputError

LOCK = ".lock"
"""Its name in the run folder."""

_LOCKLESS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_held: set[int] = set()


@dataclass(slots=True)
class FolderLock:
    """A lock that is held until `release`, and what must be said about it."""

    descriptor: int | None
    notes: tuple[str, ...] = ()

    def release(self) -> None:
        """Let other processes have the folder. May be called twice, and in a forked child."""
        if self.descriptor is not None:
            descriptor, self.descriptor = self.descriptor, None
            if descriptor in _held:  # not in a forked child, which has closed it
                _held.remove(descriptor)
                os.ftruncate(descriptor, 0)
                os.close(descriptor)


def take_lock(folder: Path) -> FolderLock:
    """Hold `folder` for this process.

    On a file system without locks, and on Windows, nothing is held, and `notes` says so.

    Raises:
        InputError: another process holds it; it is named.
        OSError: the folder can't be written in.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        notes = _hold(folder, descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    _held.add(descriptor)
    return FolderLock(descriptor, notes)


def _hold(folder: Path, descriptor: int) -> tuple[str, ...]:
    try:
        fcntl: ModuleType = importlib.import_module("fcntl")
    except ImportError:
        return (f"{folder}: this system has no file locks; don't start a second run in it",)
    before = _holder(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        named = f" ({_named(before)})" if before else ""
        raise InputError(
            f"another process is training in this folder{named}",
            where=str(folder),
            hint="wait for it, stop it, or give another folder with --out",
        ) from None
    except OSError as error:
        if error.errno not in _LOCKLESS:
            raise
        return (f"{folder}: its file system has no locks; don't start a second run in it",)
    if before and before["host"] != socket.gethostname():
        # Some network mounts keep locks on each host alone; then only the user can know.
        return (
            f"{folder}: was held by {_named(before)}, which did not end in order; a network file "
            "system may not show its lock here: see that it is gone",
        )
    return ()


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _holder(descriptor: int) -> dict[str, Any] | None:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"pid", "host"} <= found.keys() else None


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"


def _let_go_in_child() -> None:
    # A forked child shares its parent's locks; it must not outlive the parent with them.
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
