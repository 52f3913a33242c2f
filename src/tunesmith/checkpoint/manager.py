"""A run's state on its way to a checkpoint and back: what of it is kept, who writes, and when.

A save copies what it needs and lets the run go on while a thread writes; or it writes at once. One
checkpoint is written at a time. Several ranks agree between steps on how far they are, so that no
thread ever sends anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

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
from tunesmith.checkpoint.optimizer import load_optimizer, own_bytes, own_items
from tunesmith.checkpoint.rng import capture_rng, restore_rng
from tunesmith.checkpoint.snapshot import Snapshot
from tunesmith.checkpoint.writer_thread import Background, State
from tunesmith.config.dump import science_dict
from tunesmith.errors import CheckpointError, TunesmithError
from tunesmith.metrics.environment import versions
from tunesmith.model.memory.estimate import free_memory, show
from tunesmith.train.job import Job

SPARED = 2
"""By itself a run copies what it saves if this many times as much memory is free."""

Told = Callable[[Mapping[str, Any]], None]
"""Takes a record for metrics.jsonl."""


class Kept(Protocol):
    """A part of a run with tensors of its own in a checkpoint."""

    def tensors(self) -> Mapping[str, Tensor]: ...
    def restore(self, tensors: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a run has come."""

    step: int = 0
    best: dict[str, float] | None = None  # {"step", "nll"} of the first held-out set
    owed: bool = False  # an evaluation of this step that was left in the middle


@dataclass(slots=True)
class _Flight:
    """A checkpoint that is being written."""

    state: TrainState
    best: int | None
    part: Any = None  # this rank's SavedPart, until all ranks have written theirs


class Saving:
    """Writes a run's checkpoints and takes them over. All ranks must call it alike.

    `told` gets a record of each checkpoint once it is whole.
    """

    def __init__(self, job: Job, folder: Path, told: Told) -> None:
        self._job = job
        self._folder = folder
        self._told = told
        self._asked_micro_tokens = job.micro_tokens
        self._versions = versions()  # reading them takes as long as a small model's save
        self._begun: int | None = None  # step of the newest checkpoint, whole or not
        self._good: int | None = None  # step of the newest that is known to be whole
        self._flight: _Flight | None = None
        self._work = Background()
        self._beside: bool | None = None  # whether steps go on while one is written
        self._optimizer_copy, self._other_copy = Snapshot(), Snapshot()

    def save(self, at: Standing, kept: Sequence[Kept]) -> None:
        """Begin a checkpoint, unless that of this step was the last one; one that is still being
        written is waited for.

        Raises:
            CheckpointError: one can't be written, this or the last.
        """
        if self._begun == at.step:
            return
        self.settle()
        if self._beside is None:
            self._beside = self._goes_beside()
        self._begun = at.step
        best = int(at.best["step"]) if at.best else None
        if self._job.ranks.first:
            keep = self._job.recipe.checkpoint.keep
            aside = begin_checkpoint(self._folder, at.step, keep=keep, spared={best, self._good})
            if self._job.reduce.sharded is not None:
                with writing_told(self._folder, at.step):
                    (aside / "parts").mkdir()
        state = self._state(at, kept)
        self._flight = _Flight(state, best)
        if self._job.reduce.sharded is None:
            self._complete()
        else:
            self._write_part()
        if not self._beside:
            self.settle()

    @property
    def state(self) -> State:
        """Of the writing on this rank; ranks agree on the largest and hand it to `proceed`."""
        return self._work.state

    def proceed(self, agreed: State) -> None:
        """Do what is next for the checkpoint in flight, where all ranks have done what is theirs.

        Raises:
            CheckpointError: it can't be written.
        """
        flight = self._flight
        if flight is None or agreed == State.BUSY:
            return
        if agreed == State.FAILED:
            self._flight = None
            self._raise_error(flight)
        found = self._work.result()
        if flight.part is not None:
            part, flight.part = flight.part, None
            finish = part.finish(found)
            flight.state = replace(flight.state, finish_parts=finish)
            self._complete()
            return
        self._flight, self._good = None, flight.state.step
        self._told({"kind": "event", "event": "checkpoint", "step": flight.state.step})

    def settle(self) -> None:
        """Wait until no checkpoint is being written.

        Raises:
            CheckpointError: it can't be written.
        """
        while self._flight is not None:
            self._work.join()
            self.proceed(State(int(self._job.ranks.most([self.state])[0])))

    def leave(self, error: BaseException) -> None:
        """The run ends by an error: a checkpoint that this rank can complete alone is completed,
        one that can't be is told.
        """
        flight, self._flight = self._flight, None
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

    def forget(self) -> None:
        """The step that was saved last is to be saved again, since more of it is known."""
        self._begun = None

    def restore(self, checkpoint: Path, kept: Sequence[Kept]) -> Standing:
        """Go on from a checkpoint, to the bit where it was saved."""
        state = load_checkpoint(checkpoint)
        load_optimizer(self._job, checkpoint, state)
        for one in kept:
            one.restore(state.model)
        restore_rng(state.rng)
        self._begun = self._good = state.step
        owed = state.meta.get("owed_evaluation", False)
        return Standing(state.step, state.meta.get("best"), owed)

    def meta(self, at: Standing) -> dict[str, Any]:
        """What a resume must find the same, and what it takes over."""
        job = self._job
        return {
            "science": science_dict(job.recipe),
            "versions": self._versions,
            "world_size": job.ranks.size,
            "context": job.ranks.context.count,
            "tensor": job.ranks.split.count,
            "threads": torch.get_num_threads(),
            "device": str(job.device.type),
            "kernels": job.chosen["kernels"],
            "compile": job.chosen["compile"],
            "deterministic": job.recipe.device.deterministic,
            "micro_tokens": job.micro_tokens,
            "micro_tokens_asked": self._asked_micro_tokens,
            "owed_evaluation": at.owed,
            "data": dict(job.prepared.content_hashes),
            "best": at.best,
        }

    def _goes_beside(self) -> bool:
        asked = self._job.recipe.checkpoint.background
        if asked != "auto":
            return asked
        needed = own_bytes(self._job)
        free = free_memory(torch.device("cpu")) // self._job.ranks.local_count
        if self._job.ranks.least(free - SPARED * needed) >= 0:
            return True
        said = (
            f"checkpoints are written between steps: copies of {show(needed)} would be needed to "
            f"write beside them, and {show(free)} are free"
        )
        self._tell(self._begun or 0, "checkpoint_waits", said)
        return False

    def _state(self, at: Standing, kept: Sequence[Kept]) -> TrainState:
        others = ((name, tensor) for one in kept for name, tensor in one.tensors().items())
        own = own_items(self._job)
        return TrainState(
            step=at.step,
            model=self._other_copy.take(others) if self._beside else dict(others),
            optimizer=self._optimizer_copy.take(own) if self._beside else dict(own),
            rng=capture_rng(),
            meta=self.meta(at),
        )

    def _write_part(self) -> None:
        """Agree with the other ranks on the parts, and begin with this one's."""
        from tunesmith.checkpoint.sharded import SavedPart

        flight, shards = self._flight, self._job.reduce.sharded
        assert flight is not None
        assert shards is not None
        self._job.ranks.meet()  # the first rank has made the folder
        step, part = flight.state.step, flight.state.optimizer
        flight.part = SavedPart(parts_folder(self._folder, step), part, shards)
        flight.state = replace(flight.state, optimizer={})

        def write() -> Any:
            with writing_told(self._folder, step, first=self._job.ranks.first):
                return flight.part.write()

        self._work.start(write, here=not self._beside)

    def _complete(self) -> None:
        """Begin with what the first rank does alone."""
        flight = self._flight
        assert flight is not None

        def write() -> None:
            if self._job.ranks.first:
                complete_checkpoint(
                    self._folder, flight.state, keep=self._job.recipe.checkpoint.keep,
                    best=flight.best, between=self._work.between,
                )  # fmt: skip

        self._work.start(write, here=not self._beside)

    def _raise_error(self, flight: _Flight) -> None:
        if self._work.state == State.FAILED:
            self._work.result()
        raise CheckpointError(
            "another rank can't write its part of the checkpoint",
            where=str(self._folder / "checkpoints" / f"step-{flight.state.step}"),
        )

    def _tell(self, step: int, event: str, message: str) -> None:
        self._told({"kind": "event", "event": event, "step": step, "message": message})
