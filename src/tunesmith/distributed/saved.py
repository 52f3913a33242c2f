"""An optimizer's state on disk in parts, by torch's distributed checkpoints: saved by any number of
ranks, read by any other, or by a process alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.distributed.shard import Sharded


class Stateful(Protocol):
    """What is needed of an optimizer."""

    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


def save_parts(folder: Path, optimizer: Stateful, shards: Sharded) -> None:
    """Write every rank's part into `folder`, which the first rank makes; all ranks must come.

    Files are on the disk when this returns.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    shards.meet()
    state: dict[str, Any] = shards.spread(optimizer.state_dict())
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    save(state, storage_writer=writer)


@torch.no_grad()
def load_parts(folder: Path, optimizer: Stateful, shards: Sharded | None) -> None:
    """Take over the state in `folder`: of this rank's parts, or whole where `shards` is None."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    state = optimizer.state_dict()
    given: dict[str, Any] = state if shards is None else shards.spread(state)
    load(given, storage_reader=FileSystemReader(folder), no_dist=shards is None)
    optimizer.load_state_dict(state)


@torch.no_grad()
def load_whole(whole: Mapping[str, Tensor], optimizer: Stateful, shards: Sharded | None) -> None:
    """Take over a state of whole tensors: this rank's parts of it, or all."""
    optimizer.load_state_dict(whole if shards is None else shards.parts_of(whole))
