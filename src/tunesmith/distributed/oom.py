"""Work that every rank of a group finishes, or none: memory can run out on one of them alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from tunesmith.distributed.peer_check import PeerOutOfMemoryError
from tunesmith.distributed.world import World

_SAID = ("can't allocate memory", "out of memory", "alloc_failed")
"""How torch's allocators and libraries say it where they have no exception of its own."""


class CollectiveOOM(MemoryError):
    """Memory ran out on `ranks`, and every rank of the group knows."""

    def __init__(self, said: str, ranks: tuple[int, ...]) -> None:
        super().__init__(said)
        self.ranks = ranks


def is_out_of_memory(error: BaseException) -> bool:
    """True if the error says that memory could not be had, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _SAID)


class PeerCheck(Protocol):
    """`asking.ask` with those that exchange something inside."""

    def __call__(self, *, failed: bool = False) -> None: ...


@contextmanager
def all_ranks_or_none(world: World, ask: PeerCheck | None = None) -> Iterator[None]:
    """Where memory runs out inside on any rank, all raise the same error at the end.

    Where ranks wait for each other inside, they `ask` before they do.

    Raises:
        CollectiveOOM: as said; on a process alone the error itself.
    """
    if world.is_single:
        yield
        return
    said: str | None = None
    heard = False
    try:
        yield
        if ask is not None:
            ask()  # one may have failed after the last exchange
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        heard = isinstance(error, PeerOutOfMemoryError)
        said = str(error)
    # Out here the error is gone, and with it the tensors that its frames held.
    own = said is not None and not heard
    if own and ask is not None:
        ask(failed=True)
    failed = world.all_reduce_max([float(own and rank == world.rank) for rank in range(world.size)])
    if any(failed):
        where = tuple(rank for rank, one in enumerate(failed) if one)
        raise CollectiveOOM(said or f"out of memory on rank {where[0]}", where)
