"""The processes of a run, as one of them sees them."""

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
"""Minutes that a rank waits for the others inside a step before it calls them lost."""
POLL = 0.02
"""Seconds between two looks of a rank that waits for one that prepares data or writes results."""
_WAITS = itertools.count()
_NOBODY, _WHOLE = ContextParallel(), TensorParallel()


@dataclass(frozen=True, slots=True)
class World:
    """A group of `count` processes; this one is `rank`. A process alone is the default.

    All ranks must call the methods that send in the same order. On a process alone they give back
    what they got.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # ranks on this machine
    restarted: bool = False  # torchrun has started the ranks of this job before
    cp: ContextParallel = _NOBODY  # those with whom this rank shares the tokens of a micro-batch
    tp: TensorParallel = _WHOLE  # those with whom it holds one copy of the layers

    @property
    def is_main(self) -> bool:
        """True for the rank that writes and prints."""
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        return self.size == 1

    @property
    def dp_size(self) -> int:
        """To how many micro-batches are dealt at a time: ranks that share one count once."""
        return max(1, self.size // self.model_parallel.size)

    @property
    def dp_rank(self) -> int:
        """Which of them this rank works on."""
        return self.rank // self.model_parallel.size

    @property
    def rng_rank(self) -> int:
        """Which of several streams of random numbers is this rank's: ranks that compute the same
        hidden states draw the same.
        """
        return self.rank // self.tp.size

    @property
    def model_parallel(self) -> ModelParallelGroup:
        """Those who work on a micro-batch together, whichever way."""
        return self.cp if self.tp.size == 1 else self.tp

    def with_context_parallel(
        self,
        size: int,
        *,
        timeout_minutes: float = TIMEOUT_MINUTES,
        peer_check: PeerCheckScope = "group",
    ) -> World:
        """These ranks with every `context` neighbours sharing the tokens of a micro-batch.

        `context` divides their count. `patience` as in `connect`. `asking`: who meets before such
        neighbours wait for each other; it must be `all` where ranks wait for others inside, too.
        """
        if size == 1:
            return self
        import torch.distributed as dist

        own: ContextParallel | None = None
        for first in range(0, self.size, size):
            members = range(first, first + size)
            group = dist.new_group(list(members), timeout=timedelta(minutes=timeout_minutes))
            if self.rank in members:
                asked = {"group": group, "all": dist.group.WORLD, "nobody": None}[peer_check]
                own = ContextParallel(size, self.rank - first, group, asked)
        assert own is not None
        return replace(self, context=own)

    def with_tensor_parallel(
        self, size: int, *, timeout_minutes: float = TIMEOUT_MINUTES, peer_check: bool = True
    ) -> World:
        """These ranks with every `count` neighbours holding the parts of one copy of the layers.

        `count` divides theirs. `patience` as in `connect`. `asking`: whether they meet before they
        wait for each other.
        """
        if size == 1:
            return self
        import torch.distributed as dist

        def own_of(groups: Sequence[range]) -> Any:
            made = [
                dist.new_group(list(g), timeout=timedelta(minutes=timeout_minutes)) for g in groups
            ]
            return next(m for g, m in zip(groups, made, strict=True) if self.rank in g)

        copies = [range(first, first + size) for first in range(0, self.size, size)]
        alike = [range(place, self.size, size) for place in range(size)]
        own = own_of(copies)
        asked = own if peer_check else None
        split = TensorParallel(size, self.rank % size, own, asked, dp_group=own_of(alike))
        return replace(self, split=split)

    def device(self, device: torch.device) -> torch.device:
        """The device of this rank, of the kind of `device`."""
        import torch

        if self.is_single or device.type != "cuda":
            return device
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def all_reduce_sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over the ranks, the same bits on each."""
        return values if self.is_single else self._all_reduce(values, "SUM")

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the ranks."""
        if self.is_single:
            return list(values)
        return self._all_reduce(np.asarray(values, np.float64), "MAX").tolist()

    def all_reduce_min(self, value: float) -> float:
        """The smallest value of all ranks."""
        return -self.all_reduce_max([-value])[0]

    def _all_reduce(self, values: NDArray[np.float64], how: str) -> NDArray[np.float64]:
        import torch
        import torch.distributed as dist

        sent = torch.from_numpy(values.astype(np.float64, copy=True))
        with self.naming_lost_rank():
            dist.all_reduce(sent, op=getattr(dist.ReduceOp, how))
        return sent.numpy()

    def broadcast_object(self, value: T | None = None) -> T:
        """What the first rank has, on every rank; it must be picklable."""
        if self.is_single:
            return value  # pyright: ignore[reportReturnType]
        import torch.distributed as dist

        box = [value]
        with self.naming_lost_rank():
            dist.broadcast_object_list(box, src=0)
        return box[0]  # pyright: ignore[reportReturnType]

    def gather_object(self, value: T) -> list[T]:
        """What each rank has, on the first; the others get only their own. It must be picklable."""
        if self.is_single:
            return [value]
        import torch.distributed as dist

        box: list[Any] | None = [None] * self.size if self.is_main else None
        with self.naming_lost_rank():
            dist.gather_object(value, box, dst=0)
        return [value] if box is None else box

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with those of the first rank."""
        if self.is_single:
            return
        import torch.distributed as dist

        with self.naming_lost_rank():
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def barrier(self) -> None:
        """Wait for every rank, as long as a step may take; the loss of one is noticed."""
        self.all_reduce_max([0.0])

    def store_barrier(self) -> None:
        """Wait until every rank is here, however long that takes."""
        if self.is_single:
            return
        store = shared_store()
        place = shared_key(f"wait/{next(_WAITS)}")
        if store.add(f"{place}/here", 1) == self.size:
            store.set(f"{place}/all", b"1")
        while not store.check([f"{place}/all"]):  # polled, so that signals get through
            time.sleep(POLL)

    def main_process_first(self, act: Callable[[], T]) -> T:
        """Do `act` on the first rank, then on one rank of each other machine, then on the rest.

        What the earlier ones leave in a cache the later ones find there, be it one for all machines
        or one for each.
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
        """An error of communication inside becomes one that says which rank was lost.

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
        """Leave the group, once all have finished."""
        if not self.is_single:
            import torch.distributed as dist

            self.store_barrier()
            dist.destroy_process_group()


def connect(kind: str = "auto", *, timeout_minutes: float = TIMEOUT_MINUTES) -> World:
    """Meet the other ranks that torchrun started; alone where it started none.

    `kind` is that of the device: on a GPU gradients go by nccl, and everything else by gloo.
    `patience`: minutes that a rank waits for another one inside a step.
    """
    if launched_world_size() == 1:
        return World(restarted=restarted())
    import torch
    import torch.distributed as dist

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    local_count = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    again = restarted()
    if not dist.is_initialized():
        on_gpu = kind in ("auto", "cuda") and torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        timeout = timedelta(minutes=timeout_minutes)
        with rendezvous(rank, timeout=timeout) as met:
            dist.init_process_group(
                backend, store=met.store, rank=rank, world_size=count, timeout=timeout
            )
            again = not met.first
    return World(rank, count, local, local_count, restarted=again)


def _is_communication_error(error: RuntimeError) -> bool:
    import torch
    import torch.distributed as dist

    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed", "connection reset"))
