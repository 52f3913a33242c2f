"""Ranks that work on each micro-batch together, whatever it is that they deal among themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tunesmith.distributed.peer_check import check_peers


@dataclass(frozen=True, slots=True)
class ModelParallelGroup:
    """A group of `count` ranks of which this one is number `place`. Without a `group` the others
    are only played: nothing is sent.
    """

    size: int = 1
    rank: int = 0
    group: Any = None
    check_group: Any = None  # who meets before each exchange, see `asking`; None where nobody does

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sums over the group."""
        import torch.distributed as dist

        if self.group is not None:
            self.check_peers()
            dist.all_reduce(values, group=self.group)
        return values

    def check_peers(self, *, failed: bool = False) -> None:
        """Hear whether all who will exchange are still at it, or say that this rank is not.

        Raises:
            MemoryElsewhereError: memory ran out on another rank.
        """
        if self.check_group is not None:
            check_peers(self.check_group, failed=failed)
