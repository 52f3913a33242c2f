"""Cached digests of large files, so that an unchanged file is not read through at each start.

A file counts as changed as soon as its device, inode, size, mtime or ctime differs. The times are
the system's, to the nanosecond, and a program can't set the ctime back. Small files are always
read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

LEAST = 1 << 28
"""Smaller files are always read, which takes less than a second."""
SETTLED = 2.0
"""A digest is stored only if the file's last change is at least this many seconds ago: a write
right after it could leave the same timestamp.
"""


class DigestCache:
    """Digests of files, each stored in one small file of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def digest(
        self, path: Path, kind: str, compute: Callable[[], str], *, written_here: bool = False
    ) -> str:
        """The digest of a file: the stored one for this state of the file, else what `compute`
        returns now.

        `written_here`: this process wrote the file, and no other process does.

        Raises:
            OSError: the file can't be read. That a digest can't be stored is no error.
        """
        before = path.stat()
        if before.st_size < LEAST:
            return compute()
        place = self.folder / _name(before, kind)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            known, ended, _ = place.read_text(encoding="ascii").partition("\n")
            if ended:  # an empty file is what a power failure may leave
                os.utime(place)
                return known
        started = time.time()
        found = compute()
        settled = written_here or started - max(before.st_mtime, before.st_ctime) > SETTLED
        if settled and _name(path.stat(), kind) == place.name:
            with contextlib.suppress(OSError):
                self._remember(place, found)
        return found

    def _remember(self, place: Path, found: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = place.with_name(f".{place.name}.{uuid4().hex[:12]}.tmp")
        aside.write_text(f"{found}\n", encoding="ascii")
        aside.rename(place)

    def prune(self, before: float) -> None:
        """Remove digests that were not used since this time, in seconds since the epoch."""
        with contextlib.suppress(OSError):
            for place in self.folder.iterdir():
                with contextlib.suppress(OSError):
                    if place.stat().st_mtime < before:
                        place.unlink()


def _name(state: os.stat_result, kind: str) -> str:
    stamp = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    return hashlib.sha256(f"{kind} {stamp}".encode()).hexdigest()[:40]
