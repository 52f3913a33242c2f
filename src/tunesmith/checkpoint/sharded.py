"""Sharded optimizer state with torch.distributed.checkpoint (DCP): saved by any number of ranks,
read by any other number.

A save has three acts: all ranks agree on who writes what, each writes its own part without the
others, and the first one writes down what the parts are. Only the first act sends anything, and
the results of the second; so the writing itself may go on beside the next steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from tunesmith.distributed.grad_sync import ShardedSync


class StatefulOptimizer(Protocol):
    """What is needed of an optimizer."""

    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class SavedPart:
    """This rank's part of a state on its way into `folder`; all ranks must make theirs at once.

    Args:
        folder: made by then, and seen by all ranks.
        state: what this rank holds, by name; it must stay as it is until `write` is done.
        shards: where that belongs in the whole.
    """

    def __init__(self, folder: Path, state: Mapping[str, Tensor], shards: ShardedSync) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        self._world = shards.world
        self._planner = _Planner(state)
        self._writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
        self._metadata: Any = None
        first = self._world.is_main
        places = shards.to_dtensors(state, bare=True)
        self._planner.set_up_planner(places, self._writer.storage_meta(), first)
        self._writer.set_up_storage_writer(first, rank=self._world.rank, use_collectives=True)
        local_plan = self._writer.prepare_local_plan(self._planner.create_local_plan())
        plans = self._gathered(local_plan)
        if first:
            plans, self._metadata = self._planner.create_global_plan(plans)
            plans = self._writer.prepare_global_plan(plans)
        self._plan = self._scattered(plans)

    def write(self) -> list[Any]:
        """Write this rank's file and bring it to the disk; nothing is sent. Returns what `finish`
        needs of each rank.

        Raises:
            OSError: it can't be written.
        """
        plan = self._planner.finish_plan(self._plan)
        try:
            return self._writer.write_data(plan, self._planner).wait()
        except RuntimeError as error:  # torch's writer tells the system's error in its context
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, OSError):
                    raise cause from error
                cause = cause.__cause__ or cause.__context__
            raise

    def finish(self, results: list[Any]) -> Any:
        """Give the first rank what every rank wrote; returns a function that it calls to complete
        the folder, on any thread. All ranks must come.
        """
        found = self._gathered(results)
        return partial(self._writer.finish, self._metadata, found) if self._world.is_main else None

    def _gathered(self, local: Any) -> list[Any]:
        """What each rank has, on the first one."""
        import torch.distributed as dist

        found: list[Any] | None = [None] * self._world.size if self._world.is_main else None
        with self._world.naming_lost_rank():
            dist.gather_object(local, found, dst=0)
        return found or []

    def _scattered(self, each: list[Any]) -> Any:
        """What the first rank has for this one."""
        import torch.distributed as dist

        box: list[Any] = [None]
        with self._world.naming_lost_rank():
            dist.scatter_object_list(box, each if self._world.is_main else None, src=0)
        return box[0]


class _Planner(DefaultSavePlanner):
    """Plans with tensors that have a place but no contents, and writes those of this rank."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._held = held

    def lookup_object(self, index: Any) -> Any:
        """The rank's own tensor."""
        return self._held[index.fqn].detach()


@torch.no_grad()
def load_parts(folder: Path, optimizer: StatefulOptimizer, shards: ShardedSync | None) -> None:
    """Take over the state in `folder`: of this rank's parts, or whole where `shards` is None."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    state = optimizer.state_dict()
    given: dict[str, Any] = state if shards is None else shards.to_dtensors(state)
    load(given, storage_reader=FileSystemReader(folder), no_dist=shards is None)
    for key, tensor in given.items():
        local = getattr(tensor, "_local_tensor", tensor)
        if local.device != state[key].device:  # shards that rest in the host's memory
            state[key].copy_(local)
    optimizer.load_state_dict(state)


@torch.no_grad()
def load_whole(
    whole: Mapping[str, Tensor], optimizer: StatefulOptimizer, shards: ShardedSync | None
) -> None:
    """Take over a state of whole tensors: this rank's parts of it, or all."""
    optimizer.load_state_dict(whole if shards is None else shards.local_parts(whole))
