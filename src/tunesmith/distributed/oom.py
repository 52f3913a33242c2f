"""Collective out-of-memory handling: an OOM on one rank raises the same error on every rank."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from tunesmith.distributed.peer_check import PeerOutOfMemoryError
from tunesmith.distributed.world import World

_OOM_TEXT = re.compile(
    "can't allocate memory|out of memory|alloc_failed"
    "|could not create a (primitive(?! descriptor)|memory object)"
)
"""Messages of torch's allocators and libraries that raise a plain RuntimeError.

The last two are oneDNN's, whose errors carry no status: it says so where its compiler or a buffer
gets no memory, as under an address-space limit, and might say the same of a fault of its own.
Counting them costs little: such a fault returns at every size, and the run soon ends with this
message as the reason. Not counting them would end a run that could go on. Of what it does not
implement, oneDNN says "could not create a primitive descriptor": that is no lack of memory.
"""


class CollectiveOOM(MemoryError):
    """`ranks` ran out of memory, and every rank raised this error."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


def is_out_of_memory(error: BaseException) -> bool:
    """True if the error says that memory could not be allocated, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OOM_TEXT.search(str(error).lower()))


class PeerCheck(Protocol):
    """`ModelParallelGroup.check_peers` of the ranks that communicate inside the block."""

    def __call__(self, *, failed: bool = False) -> None: ...


@contextmanager
def all_ranks_or_none(world: World, check_peers: PeerCheck | None = None) -> Iterator[None]:
    """Run the block on every rank; if any rank runs out of memory in it, all raise the same error.

    Where ranks communicate inside the block, `check_peers` checks the peers before each collective.

    Raises:
        CollectiveOOM: some rank ran out of memory. A single process raises its own error.
    """
    if world.is_single:
        yield
        return
    message: str | None = None
    peer_failed = False
    try:
        yield
        if check_peers is not None:
            check_peers()  # a peer may have failed after the last collective
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        peer_failed = isinstance(error, PeerOutOfMemoryError)
        message = str(error)
    # Out here the error is gone, and with it the tensors that its frames held.
    failed_here = message is not None and not peer_failed
    if failed_here and check_peers is not None:
        check_peers(failed=True)
    failed = world.all_reduce_max(
        [float(failed_here and rank == world.rank) for rank in range(world.size)]
    )
    if any(failed):
        where = tuple(rank for rank, one in enumerate(failed) if one)
        raise CollectiveOOM(message or f"out of memory on rank {where[0]}", where)
