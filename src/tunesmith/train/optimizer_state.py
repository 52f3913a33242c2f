"""The optimizer in a checkpoint: whole in one file, or in parts that several ranks wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from tunesmith.errors import RunError
from tunesmith.train.checkpoint import PARTS, TrainState
from tunesmith.train.job import Job


def whole_optimizer(job: Job) -> Mapping[str, Tensor]:
    """What of the optimizer goes into the file of this rank: all, or nothing where all ranks write
    parts, or where another rank writes.
    """
    if job.reduce.sharded is not None or not job.ranks.first:
        return {}
    return job.optimizer.state_dict()


def parts_writer(job: Job) -> Callable[[Path], None] | None:
    """What writes this rank's part into a folder, together with the others; None if it has all."""
    shards = job.reduce.sharded
    if shards is None:
        return None
    from tunesmith.distributed.saved import save_parts

    return lambda folder: save_parts(folder, job.optimizer, shards)


def load_optimizer(job: Job, checkpoint: Path, state: TrainState) -> None:
    """Take over the optimizer, and with it the trained weights, whoever saved them.

    Raises:
        RunError: it is of another model.
    """
    parts = checkpoint / PARTS
    try:
        if job.reduce.sharded is None and not parts.is_dir():
            job.optimizer.load_state_dict(state.optimizer)
            return
        from tunesmith.distributed.saved import load_parts, load_whole

        if parts.is_dir():
            load_parts(parts, job.optimizer, job.reduce.sharded)
        else:
            load_whole(state.optimizer, job.optimizer, job.reduce.sharded)
    except (KeyError, ValueError) as error:
        raise RunError(
            f"the checkpoint is of another model: {error}", where=str(checkpoint)
        ) from error
