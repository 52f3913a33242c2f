"""Ranks that work on each micro-batch together, whatever it is that they deal among themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tunesmith.distributed.peer_check import ask


@dataclass(frozen=True, slots=True)
class Sharers:
    """A group of `count` ranks of which this one is number `place`. Without a `group` the others
    are only played: nothing is sent.
    """

    count: int = 1
    place: int = 0
    group: Any = None
    asked: Any = None  # who meets before each exchange, see `asking`; None where nobody does

    def add(self, values: Tensor) -> Tensor:
        """Sums over the group."""
        import torch.distributed as dist

        if self.group is not None:
            self.ask()
            dist.all_reduce(values, group=self.group)
        return values

    def ask(self, *, failed: bool = False) -> None:
        """Hear whether all who will exchange are still at it, or say that this rank is not.

        Raises:
            MemoryElsewhereError: memory ran out on another rank.
        """
        if self.asked is not None:
            ask(self.asked, failed=failed)
