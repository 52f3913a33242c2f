"""Rank failure: find out which rank was lost, and let one of the living ranks report it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from tunesmith.distributed.env import (
    call_with_timeout,
    launched_world_size,
    shared_key,
    shared_store,
)
from tunesmith.distributed.hang_alarm import HUNG
from tunesmith.errors import RunError, TunesmithError, first_line

T = TypeVar("T")

SECONDS = 2.0
"""How long those who notice a loss wait for each other to say that they live."""


class LostRankError(RunError):
    """Another rank ended; `living` are those that noticed, None if they can't be asked."""

    def __init__(self, message: str, *, living: tuple[int, ...] | None, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.living = living


def lost_rank(rank: int, count: int, store: Any, error: Exception) -> LostRankError:
    """The error of a rank that could not reach another one."""
    living = _store_answer(lambda: _living(rank, count, store))
    gone = [r for r in range(count) if r not in (living or ())]
    names = ", ".join(str(r) for r in gone[:8])
    if living is None:
        what = f"the machine of rank 0 of {count} is down or can't be reached"
    elif not gone:
        what = f"the ranks lost their connection: {first_line(error)}"
    elif len(gone) == 1:
        what = f"rank {names} of {count} ended or can't be reached"
    else:
        what = f"ranks {names} of {count} ended or can't be reached"
    hint = "its own message, if it had one, says why; `tunesmith resume RUN` goes on"
    return LostRankError(what, living=living, hint=hint)


def _living(rank: int, count: int, store: Any) -> tuple[int, ...]:
    """The ranks that have noticed the loss too."""
    store.set(shared_key(f"alive/{rank}"), b"1")
    until = time.monotonic() + SECONDS
    living: tuple[int, ...] = (rank,)
    while time.monotonic() < until and len(living) < count - 1:
        time.sleep(0.05)
        living = tuple(r for r in range(count) if store.check([shared_key(f"alive/{r}")]))
    return living


def _store_answer(ask: Callable[[], T]) -> T | None:
    """What `ask` finds in the store, None if the store doesn't answer: its machine may be gone."""
    found: list[T] = []
    call_with_timeout(lambda: found.append(ask()), 2 * SECONDS)
    return found[0] if found else None


def is_told_here(error: TunesmithError) -> bool:
    """Whether this process is the one to show the error: a message that all ranks have is shown
    once, and the loss of a rank only where that rank had no message of its own.
    """
    if launched_world_size() == 1:
        return True
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    if not dist.is_initialized():
        return rank == 0
    lost = isinstance(error, LostRankError)
    told = None
    if not (isinstance(error, LostRankError) and error.living is None):
        told = _store_answer(lambda: _is_told(error, rank, shared_store()))
    if told is None:
        return not lost or os.environ.get("LOCAL_RANK", "0") == "0"
    return told


def _is_told(error: TunesmithError, rank: int, store: Any) -> bool:
    text, told = str(error).encode(), shared_key("told")
    if isinstance(error, LostRankError):
        time.sleep(SECONDS / 4)
        known = any(store.check([key]) for key in (told, shared_key(HUNG)))
        return not known and rank == min(error.living or (rank,))
    if rank == 0:
        store.set(told, text)
        return True
    until = time.monotonic() + SECONDS / 2
    while time.monotonic() < until:
        if store.check([told]):
            return store.get(told) != text
        time.sleep(0.05)
    store.set(told, text)
    return True


def exit_if_lost(error: TunesmithError, code: int) -> int:
    """The exit code; after the loss of a rank this process ends here and now, since its group
    can't be taken down without the lost one.
    """
    if isinstance(error, LostRankError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
