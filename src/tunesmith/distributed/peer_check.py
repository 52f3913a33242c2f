"""A 4-byte all-reduce before each collective, so that an OOM on one rank raises on all of them
instead of deadlocking.

Inside a micro-batch a rank waits for what the others send: shards of heads, or the rest of a
layer's weights. It would wait forever for a rank that has failed. So before each such collective
all of its ranks exchange a flag, and a rank that has failed joins the next exchange, wherever the
others have reached it, to raise that flag. Between a check and its collective nothing is allocated
that could fail.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_RANKS = 64
"""The most ranks that check each other before each layer: gloo's all-reduce takes a hop for each
rank and must not take longer than the layer itself.
"""


class PeerOutOfMemoryError(MemoryError):
    """Another rank, for which this one would have waited, is out of memory."""


def check_peers(group: Any, *, failed: bool = False) -> None:
    """All-reduce a flag over the ranks of `group`; every rank must call it equally often.

    The message is 4 bytes in host memory, by gloo.

    Raises:
        PeerOutOfMemoryError: another rank has `failed`. It is not raised on that rank itself.
    """
    import torch.distributed as dist

    flag = torch.tensor([float(failed)], device="cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    if not failed and bool(flag):
        raise PeerOutOfMemoryError("out of memory on another rank")


def check_all_peers(*, failed: bool = False) -> None:
    """`check_peers` with all ranks of the run."""
    import torch.distributed as dist

    check_peers(dist.group.WORLD, failed=failed)


def can_check(device: str) -> bool:
    """Whether ranks on such a device check each other before each collective inside a pass.

    On a CPU the ranks block in the collective anyway. On a GPU collectives are queued ahead of the
    computation, which lets both overlap; a check on the host would stop that in every layer.
    """
    return device == "cpu"


def can_retry(count: int, device: str) -> bool:
    """Whether `count` FSDP ranks can abandon a step together after an OOM on one, and retry it.

    FSDP must be able to restart after an aborted pass; torch has `reset_iter_state` since 2.13.
    """
    from torch.distributed.fsdp import FSDPModule

    return can_check(device) and count <= MAX_RANKS and hasattr(FSDPModule, "reset_iter_state")


def check_before_collectives(module: Any) -> None:
    """Check all ranks before this FSDP module's all-gathers and reduce-scatters."""
    group = module._get_fsdp_state()._fsdp_param_group
    if group is not None:
        module.set_custom_all_gather(CheckedCollective(group._all_gather_comm))
        module.set_custom_reduce_scatter(CheckedCollective(group._reduce_scatter_comm))


class CheckedCollective:
    """An FSDP collective with a check of all ranks before it, made once its memory is allocated."""

    def __init__(self, collective: Any) -> None:
        self._collective = collective

    def allocate(self, *size: Any, **options: Any) -> Tensor:
        """Allocates as the collective itself does."""
        return self._collective.allocate(*size, **options)

    def __call__(self, *tensors: Any, **options: Any) -> Any:
        check_all_peers()
        return self._collective(*tensors, **options)
