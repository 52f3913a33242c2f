"""The checkpoint manager: what is saved, by which rank, when, and in the background (as DCP's async
save).

A save copies what it needs and lets the run go on while a thread writes; or it writes at once. One
checkpoint is written at a time. Several ranks agree between steps on how far they are, so that no
thread ever sends anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tunesmith.checkpoint.folder import (
    TrainState,
    begin_checkpoint,
    complete_checkpoint,
    load_checkpoint,
    parts_folder,
    writing_told,
)
from tunesmith.checkpoint.optimizer import SavedOptimizer
from tunesmith.checkpoint.rng import capture_rng, restore_rng
from tunesmith.checkpoint.snapshot import Snapshot
from tunesmith.checkpoint.writer_thread import BackgroundWriter, WriterState
from tunesmith.errors import CheckpointError, TunesmithError
from tunesmith.metrics.environment import versions
from tunesmith.model.memory.estimate import free_memory, show

COPY_FACTOR = 2
"""By itself a run copies what it saves if this many times as much memory is free."""

Told = Callable[[Mapping[str, Any]], None]
"""Takes a record for metrics.jsonl."""


class Stateful(Protocol):
    """A part of a run with tensors of its own in a checkpoint."""

    def tensors(self) -> Mapping[str, Tensor]: ...
    def restore(self, tensors: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    best: dict[str, float] | None = None  # {"step", "nll"} of the first held-out set
    owed: bool = False  # an evaluation of this step that was left in the middle
    micro_tokens: int = 0  # the present value, after any retries
    micro_tokens_asked: int = 0  # the value at the start


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """How many checkpoints are kept, whether they are written in the background, and `identity`:
    entries of the meta data that a resume compares with its own.
    """

    keep: int = 2
    background: bool | Literal["auto"] = "auto"
    identity: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(slots=True)
class _PendingCheckpoint:
    """A checkpoint that is being written."""

    state: TrainState
    best: int | None
    part: Any = None  # this rank's SavedPart, until all ranks have written theirs


class CheckpointManager:
    """Writes a run's checkpoints and takes them over. All ranks must call it alike.

    `told` gets a record of each checkpoint once it is whole.
    """

    def __init__(
        self, saved: SavedOptimizer, options: CheckpointOptions, folder: Path, told: Told
    ) -> None:
        self._saved = saved
        self._options = options
        self._folder = folder
        self._told = told
        self._world = saved.world
        self._versions = versions()  # reading them takes as long as a small model's save
        self._begun: int | None = None  # step of the newest checkpoint, whole or not
        self._good: int | None = None  # step of the newest that is known to be whole
        self.pending: _PendingCheckpoint | None = None  # being written; the same on every rank
        self._work = BackgroundWriter()
        self._beside: bool | None = None  # whether steps go on while one is written
        self._optimizer_copy, self._other_copy = Snapshot(), Snapshot()

    def save(self, progress: Progress, stateful: Sequence[Stateful]) -> None:
        """Begin a checkpoint, unless that of this step was the last one; one that is still being
        written is waited for.

        Raises:
            CheckpointError: one can't be written, this or the last.
        """
        if self._begun == progress.step:
            return
        self.wait()
        if self._beside is None:
            self._beside = self._goes_beside()
        self._begun = progress.step
        best = int(progress.best["step"]) if progress.best else None
        if self._world.is_main:
            aside = begin_checkpoint(
                self._folder, progress.step, keep=self._options.keep, protected={best, self._good}
            )
            if self._saved.sharded is not None:
                with writing_told(self._folder, progress.step):
                    (aside / "parts").mkdir()
        state = self._state(progress, stateful)
        self.pending = _PendingCheckpoint(state, best)
        if self._saved.sharded is None:
            self._complete()
        else:
            self._write_part()
        if not self._beside:
            self.wait()

    @property
    def state(self) -> WriterState:
        """Of the writing on this rank; ranks agree on the largest and hand it to `proceed`."""
        return self._work.state

    def poll(self, agreed: WriterState) -> None:
        """Do what is next for the checkpoint in flight, where all ranks have done what is theirs.

        Raises:
            CheckpointError: it can't be written.
        """
        flight = self.pending
        if flight is None or agreed == WriterState.BUSY:
            return
        if agreed == WriterState.FAILED:
            self.pending = None
            self._raise_error(flight)
        found = self._work.result()
        if flight.part is not None:
            part, flight.part = flight.part, None
            finish = part.finish(found)
            flight.state = replace(flight.state, finish_parts=finish)
            self._complete()
            return
        self.pending, self._good = None, flight.state.step
        self._told({"kind": "event", "event": "checkpoint", "step": flight.state.step})

    def wait(self) -> None:
        """Wait until no checkpoint is being written.

        Raises:
            CheckpointError: it can't be written.
        """
        while self.pending is not None:
            self._work.join()
            self.poll(WriterState(int(self._world.all_reduce_max([self.state])[0])))

    def abort(self, error: BaseException) -> None:
        """The run ends by an error: a checkpoint that this rank can complete alone is completed,
        one that can't be is told.
        """
        flight, self.pending = self.pending, None
        if flight is None:
            return
        if flight.part is not None or not isinstance(error, Exception):
            self._work.abandon()
            return
        step = flight.state.step
        with suppress(TunesmithError):  # `error` is what ends the run
            try:
                self._work.result()
            except Exception as other:
                self._tell(step, "checkpoint_failed", " ".join(str(other).splitlines()))
                return
            self._told({"kind": "event", "event": "checkpoint", "step": step})

    def close(self) -> None:
        """Nothing more is to be saved for now."""
        self._work.close()

    def invalidate(self) -> None:
        """The step that was saved last is to be saved again, since more of it is known."""
        self._begun = None

    def restore(self, checkpoint: Path, stateful: Sequence[Stateful]) -> Progress:
        """Go on from a checkpoint, to the bit where it was saved."""
        state = load_checkpoint(checkpoint)
        self._saved.load(checkpoint, state)
        for one in stateful:
            one.restore(state.model)
        restore_rng(state.rng)
        self._begun = self._good = state.step
        owed = state.meta.get("owed_evaluation", False)
        return Progress(state.step, state.meta.get("best"), owed)

    def meta(self, progress: Progress) -> dict[str, Any]:
        """What a resume must find the same, and what it takes over."""
        return {
            **self._options.identity,
            "versions": self._versions,
            "world_size": self._world.size,
            "context_parallel": self._world.cp.size,
            "tensor_parallel": self._world.tp.size,
            "threads": torch.get_num_threads(),
            "micro_tokens": progress.micro_tokens,
            "micro_tokens_asked": progress.micro_tokens_asked,
            "owed_evaluation": progress.owed,
            "best": progress.best,
        }

    def _goes_beside(self) -> bool:
        if self._options.background != "auto":
            return self._options.background
        needed = self._saved.local_bytes
        free = free_memory(torch.device("cpu")) // self._world.local_size
        if self._world.all_reduce_min(free - COPY_FACTOR * needed) >= 0:
            return True
        said = (
            f"checkpoints are written between steps: copies of {show(needed)} would be needed to "
            f"write beside them, and {show(free)} are free"
        )
        self._tell(self._begun or 0, "checkpoint_waits", said)
        return False

    def _state(self, progress: Progress, stateful: Sequence[Stateful]) -> TrainState:
        others = ((name, tensor) for one in stateful for name, tensor in one.tensors().items())
        local = self._saved.local_items()
        return TrainState(
            step=progress.step,
            model=self._other_copy.take(others) if self._beside else dict(others),
            optimizer=self._optimizer_copy.take(local) if self._beside else dict(local),
            rng=capture_rng(),
            meta=self.meta(progress),
        )

    def _write_part(self) -> None:
        """Agree with the other ranks on the parts, and begin with this one's."""
        from tunesmith.checkpoint.sharded import SavedPart

        flight, shards = self.pending, self._saved.sharded
        assert flight is not None
        assert shards is not None
        self._world.barrier()  # the first rank has made the folder
        step, part = flight.state.step, flight.state.optimizer
        flight.part = SavedPart(parts_folder(self._folder, step), part, shards)
        flight.state = replace(flight.state, optimizer={})

        def write() -> Any:
            with writing_told(self._folder, step, first=self._world.is_main):
                return flight.part.write()

        self._work.start(write, here=not self._beside)

    def _complete(self) -> None:
        """Begin with what the first rank does alone."""
        flight = self.pending
        assert flight is not None

        def write() -> None:
            if self._world.is_main:
                complete_checkpoint(
                    self._folder, flight.state, keep=self._options.keep,
                    best=flight.best, between=self._work.between,
                )  # fmt: skip

        self._work.start(write, here=not self._beside)

    def _raise_error(self, flight: _PendingCheckpoint) -> None:
        if self._work.state == WriterState.FAILED:
            self._work.result()
        raise CheckpointError(
            "another rank can't write its part of the checkpoint",
            where=str(self._folder / "checkpoints" / f"step-{flight.state.step}"),
        )

    def _tell(self, step: int, event: str, message: str) -> None:
        self._told({"kind": "event", "event": event, "step": step, "message": message})
