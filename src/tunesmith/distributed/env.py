"""torchrun's environment variables, and the key-value store that the ranks share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Thread
from typing import Any


def launched_world_size(environment: Mapping[str, str] | None = None) -> int:
    """The world size that torchrun announced to this process; 1 without torchrun."""
    found = os.environ if environment is None else environment
    if "RANK" not in found or "MASTER_ADDR" not in found:
        return 1
    return int(found.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True for rank 0 and for a single process: the one that prints."""
    return launched_world_size() == 1 or os.environ["RANK"] == "0"


def restarted(environment: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun has restarted the ranks after one of them ended."""
    found = os.environ if environment is None else environment
    return int(found.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch_id() -> str | None:
    """torchrun's id of this job, the same over all restarts; None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def shared_store() -> Any:
    """The process group's key-value store. It outlives any rank if torchrun's agent keeps it."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]


def call_with_timeout(act: Callable[[], object], seconds: float) -> Thread:
    """Call `act`, which uses the store, in a thread, and wait at most so many seconds for it: the
    store's machine may be down. The thread keeps running if it takes longer.
    """

    def acts() -> None:
        with suppress(RuntimeError, ValueError):  # the store is gone, or the group
            act()

    thread = Thread(target=acts, daemon=True)
    thread.start()
    thread.join(seconds)
    return thread


def shared_key(name: str) -> str:
    """A key of the store that belongs to Tunesmith alone."""
    return f"tunesmith/{name}"
