"""A run's state on its way to a checkpoint and back: what of it is kept, and who writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.config.dump import science_dict
from tunesmith.train.checkpoint import (
    TrainState,
    load_checkpoint,
    parts_folder,
    save_checkpoint,
)
from tunesmith.train.job import Job
from tunesmith.train.metrics import versions
from tunesmith.train.optimizer_state import load_optimizer, parts_writer, whole_optimizer
from tunesmith.train.rng import capture_rng, restore_rng


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


class Saving:
    """Writes a run's checkpoints and takes them over."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._job = job
        self._folder = folder
        self._asked_micro_tokens = job.micro_tokens
        self._saved: int | None = None

    def save(self, at: Standing, kept: Sequence[Kept]) -> bool:
        """Save a checkpoint, unless that of this step was the last one; True if it was not."""
        if self._saved == at.step:
            return False
        best = int(at.best["step"]) if at.best else None
        state = TrainState(
            step=at.step,
            model={name: tensor for one in kept for name, tensor in one.tensors().items()},
            optimizer=whole_optimizer(self._job),
            rng=capture_rng(),
            meta=self.meta(at),
            parts=parts_writer(self._job),
        )
        if self._job.ranks.first:
            keep = self._job.recipe.checkpoint.keep
            save_checkpoint(self._folder, state, keep=keep, best=best, good=self._saved)
        elif state.parts is not None:
            state.parts(parts_folder(self._folder, at.step))
        self._job.ranks.meet()
        self._saved = at.step
        return True

    def forget(self) -> None:
        """The step that was saved last is to be saved again, since more of it is known."""
        self._saved = None

    def restore(self, checkpoint: Path, kept: Sequence[Kept]) -> Standing:
        """Go on from a checkpoint, to the bit where it was saved."""
        state = load_checkpoint(checkpoint)
        load_optimizer(self._job, checkpoint, state)
        for one in kept:
            one.restore(state.model)
        restore_rng(state.rng)
        self._saved = state.step
        owed = state.meta.get("owed_evaluation", False)
        return Standing(state.step, state.meta.get("best"), owed)

    def meta(self, at: Standing) -> dict[str, Any]:
        """What a resume must find the same, and what it takes over."""
        job = self._job
        return {
            "science": science_dict(job.recipe),
            "versions": versions(),
            "world_size": job.ranks.count,
            "threads": torch.get_num_threads(),
            "device": str(job.device.type),
            "deterministic": job.recipe.device.deterministic,
            "micro_tokens": job.micro_tokens,
            "micro_tokens_asked": self._asked_micro_tokens,
            "owed_evaluation": at.owed,
            "data": dict(job.prepared.content_hashes),
            "best": at.best,
        }
