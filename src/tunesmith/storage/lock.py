"""Lock of a run folder (filelock: `flock` on Unix): one process at a time may write in it.

The operating system holds the lock on an open file, so the lock ends with its process however that
ends, and no clock is needed. The file's contents only name the holder.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import InputError

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK = ".lock"
"""Its name in the run folder."""

_LOCKLESS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(slots=True)
class FolderLock:
    """A lock that is held until `release`, and what must be said about it."""

    held: BaseFileLock | None
    notes: tuple[str, ...] = ()

    def release(self) -> None:
        """Let other processes have the folder. May be called twice, and in a forked child."""
        # In a forked child filelock has closed its copy of the file, and nothing is held there.
        if self.held is not None and self.held.is_locked:
            with suppress(FileNotFoundError):  # the folder of a run that did not begin is removed
                os.truncate(self.held.lock_file, 0)
            self.held.release()


def take_lock(folder: Path) -> FolderLock:
    """Hold `folder` for this process.

    On a file system without locks nothing is held, and `notes` says so.

    Raises:
        InputError: another process holds it; it is named.
        OSError: the folder can't be written in.
    """
    # Imported here, because filelock imports asyncio and most commands take no lock.
    from filelock import FileLock, Timeout

    path = folder.absolute() / LOCK
    before = _holder(path)
    lock = FileLock(
        path,
        thread_local=False,  # a signal handler or another thread may release it
        # A soft lock is a file that outlives a killed process, and would keep the next one out.
        fallback_to_soft=False,
        preserve_lock_file=True,
        on_acquired=_write_holder,
    )
    try:
        lock.acquire(blocking=False)
    except Timeout:
        named = f" ({_named(before)})" if before else ""
        raise InputError(
            f"another process is training in this folder{named}",
            where=str(folder),
            hint="wait for it, stop it, or give another folder with --out",
        ) from None
    except OSError as error:
        if error.errno not in _LOCKLESS:
            raise
        note = f"{folder}: its file system has no locks; don't start a second run in it"
        return FolderLock(None, (note,))
    return FolderLock(lock, _notes(folder, before))


def _write_holder(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(
        descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0
    )


def _notes(folder: Path, before: dict[str, Any] | None) -> tuple[str, ...]:
    if before is None or before["host"] == socket.gethostname():
        return ()
    # Some network mounts keep locks on each host alone; then only the user can know.
    return (
        f"{folder}: was held by {_named(before)}, which did not end in order; a network file "
        "system may not show its lock here: see that it is gone",
    )


def _holder(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"pid", "host"} <= found.keys() else None


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"
