"""Cached SHA-256 digests of large files, so that an unchanged file is not read through again.

A file counts as unread as soon as its device, inode, size or one of its times is another than it
was: the times are the system's, to the nanosecond, and the second of them can't be set back by a
program. Small files are always read.
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
"""Bytes from which a file is worth remembering; fewer are read in less than a second."""
SETTLED = 2.0
"""Seconds since a file's last change, without which the next could bear the same time."""


class DigestCache:
    """Digests of files in a folder of its own, one small file for each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def digest(
        self, path: Path, kind: str, compute: Callable[[], str], *, written_here: bool = False
    ) -> str:
        """The digest of that kind: what `compute` returned for this state of the file, else what it
        returns now. `written_here`: this process wrote the file, and nobody else does.

        Raises:
            OSError: the file can't be read; never because nothing can be remembered.
        """
        before = path.stat()
        if before.st_size < LEAST:
            return compute()
        place = self.folder / _name(before, kind)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            known, ended, _ = place.read_text(encoding="ascii").partition("\n")
            if ended:  # not what a machine that lost its power left empty
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
        """Forget what was not asked for since that time, in seconds since the epoch."""
        with contextlib.suppress(OSError):
            for place in self.folder.iterdir():
                with contextlib.suppress(OSError):
                    if place.stat().st_mtime < before:
                        place.unlink()


def _name(state: os.stat_result, kind: str) -> str:
    stamp = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    return hashlib.sha256(f"{kind} {stamp}".encode()).hexdigest()[:40]
