"""Spike detection: steps whose loss or gradient norm exceeds a multiple of the running median."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WINDOW = 100
"""Steps of which the median is taken, at most."""
LEAST = 20
"""Steps that must have been seen before one can stand out."""


@dataclass(frozen=True, slots=True)
class Spike:
    """A number of a step that is more than its allowed multiple of the median before it."""

    what: str  # "loss" or "grad_norm"
    value: float
    median: float

    @property
    def factor(self) -> float:
        """How many times the median it is; infinite over a median of 0."""
        return self.value / self.median if self.median else float("inf")


class Spikes:
    """Compares each step with the running medians of the steps before it.

    `limits` has for "loss" and "grad_norm" the multiple of the median from which on a step stands
    out, None for never. A step that stands out counts in the medians to come like any other: a new
    level is reported until it is the usual one.
    """

    def __init__(self, limits: Mapping[str, float | None]) -> None:
        self._limits = dict(limits)
        self._seen: dict[str, list[float]] = {name: [] for name in limits}

    def see(self, values: Mapping[str, float]) -> list[Spike]:
        """Take a step's numbers; returns those that stand out."""
        found: list[Spike] = []
        for name, limit in self._limits.items():
            seen = self._seen[name]
            if limit is not None and len(seen) >= LEAST:
                spike = Spike(name, values[name], float(np.median(seen)))
                if spike.value > limit * spike.median:
                    found.append(spike)
            seen.append(values[name])
            del seen[:-WINDOW]
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What was seen, for a checkpoint."""
        return {
            f"spikes.{name}": torch.tensor(seen, dtype=torch.float64)
            for name, seen in self._seen.items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint holds."""
        for name in self._seen:
            if f"spikes.{name}" in tensors:  # older checkpoints have none
                self._seen[name] = tensors[f"spikes.{name}"].tolist()
