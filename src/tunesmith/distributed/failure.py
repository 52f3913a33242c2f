"""Which rank was lost, and which of the others says so."""

from __future__ import annotations

import os
import time
from typing import Any

from tunesmith.distributed.launched import launched, shared_store
from tunesmith.errors import RunError, TunesmithError

SECONDS = 2.0
"""How long those who notice a loss wait for each other to say that they live."""


class LostRankError(RunError):
    """Another rank ended; `living` are those that noticed."""

    def __init__(self, message: str, *, living: tuple[int, ...], hint: str) -> None:
        super().__init__(message, hint=hint)
        self.living = living


def lost_rank(rank: int, count: int, store: Any, error: Exception) -> LostRankError:
    """The error of a rank that could not reach another one."""
    try:
        living = _living(rank, count, store)
    except RuntimeError:  # without torchrun the first rank holds the store
        living = tuple(range(1, count))
    gone = [r for r in range(count) if r not in living]
    names = ", ".join(str(r) for r in gone[:8])
    if not gone:
        what = f"the ranks lost their connection: {str(error).splitlines()[0]}"
    elif len(gone) == 1:
        what = f"rank {names} of {count} ended or can't be reached"
    else:
        what = f"ranks {names} of {count} ended or can't be reached"
    hint = "its own message, if it had one, says why; `tunesmith resume RUN` goes on"
    return LostRankError(what, living=living, hint=hint)


def _living(rank: int, count: int, store: Any) -> tuple[int, ...]:
    """The ranks that have noticed the loss too."""
    store.set(f"tunesmith/alive/{rank}", b"1")
    until = time.monotonic() + SECONDS
    living: tuple[int, ...] = (rank,)
    while time.monotonic() < until and len(living) < count - 1:
        time.sleep(0.05)
        living = tuple(r for r in range(count) if store.check([f"tunesmith/alive/{r}"]))
    return living


def is_told_here(error: TunesmithError) -> bool:
    """Whether this process is the one to show the error: a message that all ranks have is shown
    once, and the loss of a rank only where that rank had no message of its own.
    """
    if launched() == 1:
        return True
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    if not dist.is_initialized():
        return rank == 0
    try:
        return _is_told(error, rank, shared_store())
    except RuntimeError:  # whoever holds the store is gone: without torchrun the first rank
        return isinstance(error, LostRankError) and rank == min(error.living)


def _is_told(error: TunesmithError, rank: int, store: Any) -> bool:
    text = str(error).encode()
    if isinstance(error, LostRankError):
        time.sleep(SECONDS / 4)
        return not store.check(["tunesmith/told"]) and rank == min(error.living)
    if rank == 0:
        store.set("tunesmith/told", text)
        return True
    until = time.monotonic() + SECONDS / 2
    while time.monotonic() < until:
        if store.check(["tunesmith/told"]):
            return store.get("tunesmith/told") != text
        time.sleep(0.05)
    store.set("tunesmith/told", text)
    return True
