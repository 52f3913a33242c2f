"""The user's cache folder for what can be made again: prepared documents, file lists of the hub."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_folder() -> Path:
    """TUNESMITH_CACHE, else `tunesmith` in the user's cache folder."""
    if named := os.environ.get("TUNESMITH_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tunesmith"
