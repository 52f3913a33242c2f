"""The world of a run (torch.distributed): rank, world size, process groups and host-side
collectives.

Host-side values go by gloo; only gradients and activations use nccl on GPUs.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tunesmith.distributed.context_parallel import ContextParallel
from tunesmith.distributed.env import launched_world_size, restarted, shared_key, shared_store
from tunesmith.distributed.model_parallel_group import ModelParallelGroup
from tunesmith.distributed.rank_failure import lost_rank
from tunesmith.distributed.rendezvous import rendezvous
from tunesmith.distributed.tensor_parallel_ops import TensorParallel

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
PeerCheckScope = Literal["group", "all", "nobody"]

TIMEOUT_MINUTES = 30.0
"""Minutes that a rank waits in a collective before it reports the other ranks as lost."""
POLL = 0.02
"""Seconds between two polls of the store in `store_barrier`."""
_WAITS = itertools.count()
_NO_CP, _NO_TP = ContextParallel(), TensorParallel()


@dataclass(frozen=True, slots=True)
class World:
    """All `size` processes of a run, of which this one is `rank`. The default is a single process.

    All ranks must call the collectives in the same order. On a single process a collective returns
    its argument.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # ranks on this machine
    restarted: bool = False  # torchrun has started the ranks of this job before
    cp: ContextParallel = _NO_CP  # ranks that share each micro-batch's tokens
    tp: TensorParallel = _NO_TP  # ranks that hold one copy of the layers

    @property
    def is_main(self) -> bool:
        """True for the rank that writes and prints."""
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        return self.size == 1

    @property
    def dp_size(self) -> int:
        """Data-parallel size: micro-batches that are computed at the same time."""
        return max(1, self.size // self.model_parallel.size)

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank: which of these micro-batches this rank works on."""
        return self.rank // self.model_parallel.size

    @property
    def rng_rank(self) -> int:
        """The stream of random numbers of this rank. Tensor-parallel ranks share one, because they
        compute the same hidden states and must draw the same dropout masks.
        """
        return self.rank // self.tp.size

    @property
    def model_parallel(self) -> ModelParallelGroup:
        """The ranks that compute one micro-batch together, by context or tensor parallelism."""
        return self.cp if self.tp.size == 1 else self.tp

    def with_context_parallel(
        self,
        size: int,
        *,
        timeout_minutes: float = TIMEOUT_MINUTES,
        peer_check: PeerCheckScope = "group",
    ) -> World:
        """This world with context-parallel groups of `size` neighbouring ranks.

        `size` divides the world size. `timeout_minutes` is as in `connect`. `peer_check` says which
        ranks check each other before an all-to-all (see `peer_check.py`). It must be `all` where
        FSDP makes every rank wait for every other one inside a pass.
        """
        if size == 1:
            return self
        import torch.distributed as dist

        group_of_rank: ContextParallel | None = None
        for first in range(0, self.size, size):
            members = range(first, first + size)
            group = dist.new_group(list(members), timeout=timedelta(minutes=timeout_minutes))
            if self.rank in members:
                checked = {"group": group, "all": dist.group.WORLD, "nobody": None}[peer_check]
                group_of_rank = ContextParallel(size, self.rank - first, group, checked)
        assert group_of_rank is not None
        return replace(self, cp=group_of_rank)

    def with_tensor_parallel(
        self, size: int, *, timeout_minutes: float = TIMEOUT_MINUTES, peer_check: bool = True
    ) -> World:
        """This world with tensor-parallel groups of `size` neighbouring ranks.

        `size` divides the world size. `timeout_minutes` is as in `connect`. `peer_check` says
        whether the ranks of a group check each other before each all-reduce.
        """
        if size == 1:
            return self
        import torch.distributed as dist

        def make_groups(members: Sequence[range]) -> Any:
            # every rank must call new_group for every group, in the same order
            made = [
                dist.new_group(list(g), timeout=timedelta(minutes=timeout_minutes)) for g in members
            ]
            return next(m for g, m in zip(members, made, strict=True) if self.rank in g)

        copies = [range(first, first + size) for first in range(0, self.size, size)]
        same_shard = [range(part, self.size, size) for part in range(size)]
        group = make_groups(copies)
        checked = group if peer_check else None
        dp_group = make_groups(same_shard)
        return replace(self, tp=TensorParallel(size, self.rank % size, group, checked, dp_group))

    def device(self, device: torch.device) -> torch.device:
        """The device of this rank: of the kind of `device`, numbered by local rank on CUDA."""
        import torch

        if self.is_single or device.type != "cuda":
            return device
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def all_reduce_sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over all ranks; every rank gets the same bits. float64, any shape."""
        return values if self.is_single else self._all_reduce(values, "SUM")

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """The maximum of each value over all ranks."""
        if self.is_single:
            return list(values)
        return self._all_reduce(np.asarray(values, np.float64), "MAX").tolist()

    def all_reduce_min(self, value: float) -> float:
        """The minimum of the value over all ranks."""
        return -self.all_reduce_max([-value])[0]

    def _all_reduce(self, values: NDArray[np.float64], how: str) -> NDArray[np.float64]:
        import torch
        import torch.distributed as dist

        sent = torch.from_numpy(values.astype(np.float64, copy=True))
        with self.naming_lost_rank():
            dist.all_reduce(sent, op=getattr(dist.ReduceOp, how))
        return sent.numpy()

    def broadcast_object(self, value: T | None = None) -> T:
        """Rank 0's value, on every rank. It must be picklable."""
        if self.is_single:
            return value  # pyright: ignore[reportReturnType]
        import torch.distributed as dist

        box = [value]
        with self.naming_lost_rank():
            dist.broadcast_object_list(box, src=0)
        return box[0]  # pyright: ignore[reportReturnType]

    def gather_object(self, value: T) -> list[T]:
        """Every rank's value, on rank 0; other ranks get only their own. It must be picklable."""
        if self.is_single:
            return [value]
        import torch.distributed as dist

        box: list[Any] | None = [None] * self.size if self.is_main else None
        with self.naming_lost_rank():
            dist.gather_object(value, box, dst=0)
        return [value] if box is None else box

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors in place with those of rank 0."""
        if self.is_single:
            return
        import torch.distributed as dist

        with self.naming_lost_rank():
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def barrier(self) -> None:
        """Wait for every rank, for at most the timeout of a collective; a lost rank is reported."""
        self.all_reduce_max([0.0])

    def store_barrier(self) -> None:
        """Wait for every rank without a timeout, by polling the store.

        For long phases of one rank, such as data preparation, in which a collective would time out.
        """
        if self.is_single:
            return
        store = shared_store()
        place = shared_key(f"wait/{next(_WAITS)}")
        if store.add(f"{place}/here", 1) == self.size:
            store.set(f"{place}/all", b"1")
        while not store.check([f"{place}/all"]):  # polled, so that signals get through
            time.sleep(POLL)

    def main_process_first(self, act: Callable[[], T]) -> T:
        """Do `act` on rank 0 first, then on one rank of each other machine, then on all others.

        Later ranks find what earlier ones wrote to a cache, whether the cache is shared by all
        machines or local to each.
        """
        if self.is_single:
            return act()
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        found: T | None = None
        for number in range(3):
            if number == turn:
                found = act()
            self.store_barrier()
        return found  # pyright: ignore[reportReturnType]

    @contextmanager
    def naming_lost_rank(self) -> Iterator[None]:
        """Turn a communication error inside into an error that names the lost rank.

        Raises:
            RunError: another rank ended or can't be reached.
        """
        try:
            yield
        except RuntimeError as error:
            if self.is_single or not _is_communication_error(error):
                raise
            raise lost_rank(self.rank, self.size, shared_store(), error) from error

    def close(self) -> None:
        """Destroy the process group, after every rank has finished."""
        if not self.is_single:
            import torch.distributed as dist

            self.store_barrier()
            dist.destroy_process_group()


def connect(kind: str = "auto", *, timeout_minutes: float = TIMEOUT_MINUTES) -> World:
    """Initialise the process group of the ranks that torchrun started; a single process if it
    started none.

    `kind` is that of the device: on CUDA, device tensors go by nccl and host tensors by gloo.
    `timeout_minutes`: how long a rank waits for another one in a collective.
    """
    if launched_world_size() == 1:
        return World(restarted=restarted())
    import torch
    import torch.distributed as dist

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    local_count = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    was_restarted = restarted()
    if not dist.is_initialized():
        on_gpu = kind in ("auto", "cuda") and torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        timeout = timedelta(minutes=timeout_minutes)
        with rendezvous(rank, timeout=timeout) as met:
            dist.init_process_group(
                backend, store=met.store, rank=rank, world_size=count, timeout=timeout
            )
            was_restarted = not met.first
    return World(rank, count, local, local_count, restarted=was_restarted)


def _is_communication_error(error: RuntimeError) -> bool:
    import torch
    import torch.distributed as dist

    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed", "connection reset"))
