"""A model-parallel group: ranks that compute each micro-batch together, by context or tensor
parallelism (Megatron's term).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tunesmith.distributed.peer_check import check_peers


@dataclass(frozen=True, slots=True)
class ModelParallelGroup:
    """A group of `size` ranks, of which this one is `rank`. Without a process `group` nothing is
    sent, which is used to measure one rank's memory in a single process.
    """

    size: int = 1
    rank: int = 0
    group: Any = None
    check_group: Any = None  # ranks of the check before each collective (`peer_check.py`), or None

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sums over the group, in place."""
        import torch.distributed as dist

        if self.group is not None:
            self.check_peers()
            dist.all_reduce(values, group=self.group)
        return values

    def check_peers(self, *, failed: bool = False) -> None:
        """Learn whether every rank of the coming collective is still able to join it, or tell the
        others that this one is not.

        Raises:
            PeerOutOfMemoryError: another rank is out of memory.
        """
        if self.check_group is not None:
            check_peers(self.check_group, failed=failed)
