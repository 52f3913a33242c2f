"""The old policy of PSFT (arXiv 2508.17784): each target's log-probability at the start of an outer
batch.

An outer batch is a number of consecutive optimizer steps. Before the first of them the model goes
over the documents of all of them without gradients. What it finds is kept by path and not by place,
so that a resume that cuts its micro-batches otherwise finds it too; checkpoints hold it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.data.microbatch.planner import MicrobatchPlan
from tunesmith.train.path_hash import target_keys


class OldPolicy:
    """Log-probabilities by target; empty before step `first`, where psft begins."""

    def __init__(self, *, first: int, steps: int) -> None:
        self.first = first
        self.steps = steps
        self._keys: NDArray[np.int64] = np.empty(0, np.int64)
        self._logprob: NDArray[np.float32] = np.empty(0, np.float32)

    @property
    def empty(self) -> bool:
        """True while there is no old policy."""
        return len(self._keys) == 0

    def begins(self, step: int) -> bool:
        """True if a new old policy is due before this step (from 0)."""
        return step >= self.first and (step - self.first) % self.steps == 0

    def take(self, plans: Sequence[MicrobatchPlan], logprobs: Sequence[Tensor]) -> None:
        """Keep the log-probabilities of the targets of `plans`, in place of all earlier ones."""
        keys = np.concatenate([target_keys(plan) for plan in plans])
        values = torch.cat([found.detach().float().cpu() for found in logprobs]).numpy()
        self._keys, first = np.unique(keys, return_index=True)
        self._logprob = values[first]

    def find(self, plan: MicrobatchPlan) -> Tensor:
        """The kept log-probability of each target of the plan, [N]."""
        keys = target_keys(plan)
        places = np.searchsorted(self._keys, keys)
        assert bool((self._keys[np.minimum(places, len(self._keys) - 1)] == keys).all())
        return torch.from_numpy(self._logprob[places])

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        if self.empty:
            return {}
        return {
            "outer.key": torch.from_numpy(self._keys),
            "outer.logprob": torch.from_numpy(self._logprob),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint holds."""
        if "outer.key" not in tensors:  # saved before psft began
            return
        self._keys = tensors["outer.key"].numpy()
        self._logprob = tensors["outer.logprob"].numpy()
