"""Ranks ask each other before they wait for each other, since memory can run out on one alone.

Inside a micro-batch a rank waits for what others send: slices of heads, the rest of a layer. It
would wait for good for one that has failed. So before each such exchange all of its ranks meet, and
one that has failed comes to the next meeting, wherever the others have it, to say so. Nothing that
could fail stands between a meeting and its exchange.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_RANKS = 64
"""Ranks that may ask each other before each layer: gloo's message to all takes a hop for each, and
must not take longer than the layer.
"""


class PeerOutOfMemoryError(MemoryError):
    """Memory ran out on another rank, for which this one would have waited."""


def check_peers(group: Any, *, failed: bool = False) -> None:
    """Meet the ranks of `group`, each of which must come as often as the others.

    It is a message of 4 bytes in the host's memory, by gloo.

    Raises:
        MemoryElsewhereError: one of them has `failed`; not on that rank itself.
    """
    import torch.distributed as dist

    said = torch.tensor([float(failed)], device="cpu")
    dist.all_reduce(said, op=dist.ReduceOp.MAX, group=group)
    if not failed and bool(said):
        raise PeerOutOfMemoryError("out of memory on another rank")


def check_all_peers(*, failed: bool = False) -> None:
    """The same with all ranks of the run."""
    import torch.distributed as dist

    check_peers(dist.group.WORLD, failed=failed)


def can_check(device: str) -> bool:
    """Whether ranks on such a device may meet before each exchange inside a pass.

    On a CPU they wait for each other there in any case. A GPU's exchanges are queued ahead of it,
    which is what lets it compute meanwhile; meetings on the host would end that in every layer.
    """
    return device == "cpu"


def can_retry(count: int, device: str) -> bool:
    """Whether so many ranks that share layers can drop a step together when memory runs out on one.

    FSDP must be able to begin anew after a pass that was left in the middle; torch 2.13's is.
    """
    from torch.distributed.fsdp import FSDPModule

    return can_check(device) and count <= MAX_RANKS and hasattr(FSDPModule, "reset_iter_state")


def check_before_collectives(module: Any) -> None:
    """Have all ranks ask each other before this module of FSDP's gathers weights or adds up
    gradients.
    """
    group = module._get_fsdp_state()._fsdp_param_group
    if group is not None:
        module.set_custom_all_gather(CheckedCollective(group._all_gather_comm))
        module.set_custom_reduce_scatter(CheckedCollective(group._reduce_scatter_comm))


class CheckedCollective:
    """A collective of FSDP's, before which all ranks meet; it has its memory by then."""

    def __init__(self, collective: Any) -> None:
        self._collective = collective

    def allocate(self, *size: Any, **options: Any) -> Tensor:
        """As the collective does."""
        return self._collective.allocate(*size, **options)

    def __call__(self, *tensors: Any, **options: Any) -> Any:
        check_all_peers()
        return self._collective(*tensors, **options)
