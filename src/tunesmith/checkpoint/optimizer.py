"""The optimizer in a checkpoint: in one file, or sharded by torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tunesmith.checkpoint.folder import PARTS, TrainState
from tunesmith.distributed.grad_sync import ShardedSync
from tunesmith.distributed.world import World
from tunesmith.errors import RunError
from tunesmith.optim import Optimizer


@dataclass(frozen=True, slots=True)
class SavedOptimizer:
    """An optimizer with the ranks over which its state is replicated or `sharded`."""

    optimizer: Optimizer
    sharded: ShardedSync | None
    world: World

    def local_items(self) -> Iterator[tuple[str, Tensor]]:
        """The state that this rank writes: all of it, its shards, or nothing where rank 0 writes
        for all ranks.
        """
        if self.sharded is None and not self.world.is_main:
            return iter(())
        return self.optimizer.state_items()

    @property
    def local_bytes(self) -> int:
        """Bytes of `local_items`."""
        writes = self.sharded is not None or self.world.is_main
        return self.optimizer.saved_bytes if writes else 0

    def load(self, checkpoint: Path, state: TrainState) -> None:
        """Take over the optimizer state, and with it the trained weights, however it was saved.

        Raises:
            RunError: it is of another model.
        """
        parts = checkpoint / PARTS
        try:
            if self.sharded is None and not parts.is_dir():
                self.optimizer.load_state_dict(state.optimizer)
                return
            from tunesmith.checkpoint.sharded import load_parts, load_whole

            if parts.is_dir():
                load_parts(parts, self.optimizer, self.sharded)
            else:
                load_whole(state.optimizer, self.optimizer, self.sharded)
        except (KeyError, ValueError) as error:
            raise RunError(
                f"the checkpoint is of another model: {error}", where=str(checkpoint)
            ) from error
