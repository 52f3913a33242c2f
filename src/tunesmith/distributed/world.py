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

from tunesmith.distributed.context_parallel import Context
from tunesmith.distributed.env import launched, restarted, shared_key, shared_store
from tunesmith.distributed.model_parallel_group import Sharers
from tunesmith.distributed.rank_failure import lost_rank
from tunesmith.distributed.rendezvous import meeting
from tunesmith.distributed.tensor_parallel_ops import Split

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
Asking = Literal["group", "all", "nobody"]

PATIENCE = 30.0
"""Minutes that a rank waits for the others inside a step before it calls them lost."""
POLL = 0.02
"""Seconds between two looks of a rank that waits for one that prepares data or writes results."""
_WAITS = itertools.count()
_NOBODY, _WHOLE = Context(), Split()


@dataclass(frozen=True, slots=True)
class World:
    """A group of `count` processes; this one is `rank`. A process alone is the default.

    All ranks must call the methods that send in the same order. On a process alone they give back
    what they got.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_count: int = 1  # ranks on this machine
    restarted: bool = False  # torchrun has started the ranks of this job before
    context: Context = _NOBODY  # those with whom this rank shares the tokens of a micro-batch
    split: Split = _WHOLE  # those with whom it holds one copy of the layers

    @property
    def first(self) -> bool:
        """True for the rank that writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def groups(self) -> int:
        """To how many micro-batches are dealt at a time: ranks that share one count once."""
        return max(1, self.size // self.sharers.count)

    @property
    def own_group(self) -> int:
        """Which of them this rank works on."""
        return self.rank // self.sharers.count

    @property
    def drawing(self) -> int:
        """Which of several streams of random numbers is this rank's: ranks that compute the same
        hidden states draw the same.
        """
        return self.rank // self.split.count

    @property
    def sharers(self) -> Sharers:
        """Those who work on a micro-batch together, whichever way."""
        return self.context if self.split.count == 1 else self.split

    def sharing(
        self, context: int, *, patience: float = PATIENCE, asking: Asking = "group"
    ) -> World:
        """These ranks with every `context` neighbours sharing the tokens of a micro-batch.

        `context` divides their count. `patience` as in `connect`. `asking`: who meets before such
        neighbours wait for each other; it must be `all` where ranks wait for others inside, too.
        """
        if context == 1:
            return self
        import torch.distributed as dist

        own: Context | None = None
        for first in range(0, self.size, context):
            members = range(first, first + context)
            group = dist.new_group(list(members), timeout=timedelta(minutes=patience))
            if self.rank in members:
                asked = {"group": group, "all": dist.group.WORLD, "nobody": None}[asking]
                own = Context(context, self.rank - first, group, asked)
        assert own is not None
        return replace(self, context=own)

    def splitting(self, count: int, *, patience: float = PATIENCE, asking: bool = True) -> World:
        """These ranks with every `count` neighbours holding the parts of one copy of the layers.

        `count` divides theirs. `patience` as in `connect`. `asking`: whether they meet before they
        wait for each other.
        """
        if count == 1:
            return self
        import torch.distributed as dist

        def own_of(groups: Sequence[range]) -> Any:
            made = [dist.new_group(list(g), timeout=timedelta(minutes=patience)) for g in groups]
            return next(m for g, m in zip(groups, made, strict=True) if self.rank in g)

        copies = [range(first, first + count) for first in range(0, self.size, count)]
        alike = [range(place, self.size, count) for place in range(count)]
        own = own_of(copies)
        asked = own if asking else None
        split = Split(count, self.rank % count, own, asked, alike=own_of(alike))
        return replace(self, split=split)

    def device(self, device: torch.device) -> torch.device:
        """The device of this rank, of the kind of `device`."""
        import torch

        if self.alone or device.type != "cuda":
            return device
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def add(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over the ranks, the same bits on each."""
        return values if self.alone else self._reduced(values, "SUM")

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the ranks."""
        if self.alone:
            return list(values)
        return self._reduced(np.asarray(values, np.float64), "MAX").tolist()

    def least(self, value: float) -> float:
        """The smallest value of all ranks."""
        return -self.most([-value])[0]

    def _reduced(self, values: NDArray[np.float64], how: str) -> NDArray[np.float64]:
        import torch
        import torch.distributed as dist

        sent = torch.from_numpy(values.astype(np.float64, copy=True))
        with self.guarded():
            dist.all_reduce(sent, op=getattr(dist.ReduceOp, how))
        return sent.numpy()

    def share(self, value: T | None = None) -> T:
        """What the first rank has, on every rank; it must be picklable."""
        if self.alone:
            return value  # pyright: ignore[reportReturnType]
        import torch.distributed as dist

        box = [value]
        with self.guarded():
            dist.broadcast_object_list(box, src=0)
        return box[0]  # pyright: ignore[reportReturnType]

    def gather(self, value: T) -> list[T]:
        """What each rank has, on the first; the others get only their own. It must be picklable."""
        if self.alone:
            return [value]
        import torch.distributed as dist

        box: list[Any] | None = [None] * self.size if self.first else None
        with self.guarded():
            dist.gather_object(value, box, dst=0)
        return [value] if box is None else box

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with those of the first rank."""
        if self.alone:
            return
        import torch.distributed as dist

        with self.guarded():
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def meet(self) -> None:
        """Wait for every rank, as long as a step may take; the loss of one is noticed."""
        self.most([0.0])

    def wait(self) -> None:
        """Wait until every rank is here, however long that takes."""
        if self.alone:
            return
        store = shared_store()
        place = shared_key(f"wait/{next(_WAITS)}")
        if store.add(f"{place}/here", 1) == self.size:
            store.set(f"{place}/all", b"1")
        while not store.check([f"{place}/all"]):  # polled, so that signals get through
            time.sleep(POLL)

    def in_turn(self, act: Callable[[], T]) -> T:
        """Do `act` on the first rank, then on one rank of each other machine, then on the rest.

        What the earlier ones leave in a cache the later ones find there, be it one for all machines
        or one for each.
        """
        if self.alone:
            return act()
        turn = 0 if self.first else 1 if self.local_rank == 0 else 2
        found: T | None = None
        for number in range(3):
            if number == turn:
                found = act()
            self.wait()
        return found  # pyright: ignore[reportReturnType]

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """An error of communication inside becomes one that says which rank was lost.

        Raises:
            RunError: another rank ended or can't be reached.
        """
        try:
            yield
        except RuntimeError as error:
            if self.alone or not _of_communication(error):
                raise
            raise lost_rank(self.rank, self.size, shared_store(), error) from error

    def close(self) -> None:
        """Leave the group, once all have finished."""
        if not self.alone:
            import torch.distributed as dist

            self.wait()
            dist.destroy_process_group()


def connect(kind: str = "auto", *, patience: float = PATIENCE) -> World:
    """Meet the other ranks that torchrun started; alone where it started none.

    `kind` is that of the device: on a GPU gradients go by nccl, and everything else by gloo.
    `patience`: minutes that a rank waits for another one inside a step.
    """
    if launched() == 1:
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
        timeout = timedelta(minutes=patience)
        with meeting(rank, timeout=timeout) as met:
            dist.init_process_group(
                backend, store=met.store, rank=rank, world_size=count, timeout=timeout
            )
            again = not met.first
    return World(rank, count, local, local_count, restarted=again)


def _of_communication(error: RuntimeError) -> bool:
    import torch
    import torch.distributed as dist

    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed", "connection reset"))
