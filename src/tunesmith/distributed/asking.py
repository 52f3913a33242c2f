"""Ranks ask each other before they wait for each other, since memory can run out on one alone.

Inside a micro-batch a rank waits for what others send: slices of heads, the rest of a layer. It
would wait for good for one that has failed. So before each such exchange all of its ranks meet, and
one that has failed comes to the next meeting, wherever the others have it, to say so. Nothing that
could fail stands between a meeting and its exchange.
"""

from __future__ import annotations

from typing import Any

import torch


class MemoryElsewhereError(MemoryError):
    """Memory ran out on another rank, for which this one would have waited."""


def ask(group: Any, *, failed: bool = False) -> None:
    """Meet the ranks of `group`, each of which must come as often as the others.

    It is a message of 4 bytes in the host's memory, by gloo on whatever device the ranks are.

    Raises:
        MemoryElsewhereError: one of them has `failed`; not on that rank itself.
    """
    import torch.distributed as dist

    said = torch.tensor([float(failed)], device="cpu")
    dist.all_reduce(said, op=dist.ReduceOp.MAX, group=group)
    if not failed and bool(said):
        raise MemoryElsewhereError("out of memory on another rank")
