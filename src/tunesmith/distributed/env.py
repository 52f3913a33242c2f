"""Whether torchrun started this process, and the store it shares with the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Thread
from typing import Any


def launched_world_size(environment: Mapping[str, str] | None = None) -> int:
    """How many ranks this process was started as one of, 1 if it was started by itself."""
    found = os.environ if environment is None else environment
    if "RANK" not in found or "MASTER_ADDR" not in found:
        return 1
    return int(found.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the first rank, or alone: the one whose output is shown."""
    return launched_world_size() == 1 or os.environ["RANK"] == "0"


def restarted(environment: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun has started the ranks anew, after one of them ended."""
    found = os.environ if environment is None else environment
    return int(found.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch_id() -> str | None:
    """By what torchrun knows this job, however often it starts the ranks."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def shared_store() -> Any:
    """The small key-value store of this attempt, which outlives any rank if torchrun keeps it."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]


def call_with_timeout(act: Callable[[], object], seconds: float) -> Thread:
    """Do `act` with that store, and wait so long at most: its machine may be gone. The thread goes
    on if it takes longer.
    """

    def acts() -> None:
        with suppress(RuntimeError, ValueError):  # the store is gone, or the group
            act()

    thread = Thread(target=acts, daemon=True)
    thread.start()
    thread.join(seconds)
    return thread


def shared_key(name: str) -> str:
    """A key of that store which is nobody else's."""
    return f"tunesmith/{name}"
