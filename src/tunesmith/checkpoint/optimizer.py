"""The optimizer in a checkpoint: whole in one file, or in parts that several ranks wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from tunesmith.checkpoint.folder import PARTS, TrainState
from tunesmith.errors import RunError
from tunesmith.train.job import Job


def local_items(job: Job) -> Iterator[tuple[str, Tensor]]:
    """What of the optimizer this rank writes: all, its part, or nothing where the first rank writes
    for all.
    """
    if job.grad_sync.sharded is None and not job.world.is_main:
        return iter(())
    return job.optimizer.state_items()


def local_bytes(job: Job) -> int:
    """Bytes of `own_items`."""
    writes = job.grad_sync.sharded is not None or job.world.is_main
    return job.optimizer.saved_bytes if writes else 0


def load_optimizer(job: Job, checkpoint: Path, state: TrainState) -> None:
    """Take over the optimizer, and with it the trained weights, whoever saved them.

    Raises:
        RunError: it is of another model.
    """
    parts = checkpoint / PARTS
    try:
        if job.grad_sync.sharded is None and not parts.is_dir():
            job.optimizer.load_state_dict(state.optimizer)
            return
        from tunesmith.checkpoint.sharded import load_parts, load_whole

        if parts.is_dir():
            load_parts(parts, job.optimizer, job.grad_sync.sharded)
        else:
            load_whole(state.optimizer, job.optimizer, job.grad_sync.sharded)
    except (KeyError, ValueError) as error:
        raise RunError(
            f"the checkpoint is of another model: {error}", where=str(checkpoint)
        ) from error
